"""Loads the HTTP server with many clients, and compares it with the batch scheduler alone.

A server in a process of its own gets 1,000 requests from 50 clients: 5% are cancelled while they run, 5% are invalid.
Every request must end as it should. The same valid requests then go to a ``BatchScheduler`` without HTTP, in turns with
the server. Memory is the server's resident size after each hundred requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import httpx2

from ldm_export.bench.figures import machine
from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler

PROMPTS = ("a small red circle", "a large blue square", "a green triangle on a white background", "a yellow star")
VALID, CANCELLED, INVALID = "valid", "cancelled", "invalid"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the comparison")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    command = [sys.executable, "-m", "ldm_export.cli", "serve", str(args.bundle), "--port", "0"]
    command += ["--backend", args.backend, "--max-client-requests", str(2 * args.clients)]  # a cancelled one ends later
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        url = _address(server)
        load = asyncio.run(_load(url, server.pid, args))
        with LatentDiffusionPipeline.from_bundle(args.bundle, backend=args.backend) as pipeline:
            pairs = [_compared(url, pipeline, args) for _ in range(args.rounds)]
    finally:
        server.terminate()
        server.wait(60)
    ratios = [alone / served for served, alone in pairs]
    facts = {
        "machine": machine(),
        "python": platform.python_version(),
        "settings": {name: getattr(args, name) for name in ("requests", "clients", "steps", "backend")},
        **load,
        "throughput_of_the_scheduler_alone": [round(ratio, 3) for ratio in ratios],
        "median_throughput_ratio": round(statistics.median(ratios), 3),
        "exit_code": server.returncode,
    }
    print(json.dumps(facts, indent=2))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return int(bool(load["wrong"]) or server.returncode != 0)


def _address(server: subprocess.Popen[str]) -> str:
    assert server.stderr
    for line in server.stderr:
        if found := re.search(r"open (http://\S+) in", line):
            return found[1]
    raise SystemExit("the server did not start")


async def _load(url: str, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    """All requests, each client one at a time. Returns outcomes, first-byte times of streams, and memory."""
    random = Random(0)
    kinds = random.choices((VALID, CANCELLED, INVALID), (0.90, 0.05, 0.05), k=args.requests)
    waiting: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
    for item in enumerate(kinds):
        waiting.put_nowait(item)
    outcomes, wrong, first_bytes, memory = Counter[str](), list[str](), list[float](), list[int]()

    async def client() -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=600) as http:
            while not waiting.empty():
                number, kind = waiting.get_nowait()
                if number % 100 == 0:
                    memory.append(_resident(pid))
                try:
                    seconds = await _request(http, number, kind, args.steps)
                except Exception as error:
                    wrong.append(f"{number} ({kind}): {type(error).__name__}: {str(error)[:200]}")
                else:
                    outcomes[kind] += 1
                    if seconds is not None:
                        first_bytes.append(seconds)

    begun = time.monotonic()
    await asyncio.gather(*(client() for _ in range(args.clients)))
    seconds = time.monotonic() - begun
    async with httpx2.AsyncClient(base_url=url, timeout=600) as http:
        text = (await http.get("/metrics")).text
    memory.append(_resident(pid))
    counted = {name: float(value) for name, value in re.findall(r'ldm_requests_total\{.*outcome="(\w+)"\} (\S+)', text)}
    first_bytes.sort()
    return {
        "outcomes": dict(outcomes),
        "wrong": wrong,
        "counted_by_the_server": counted,
        "seconds": round(seconds, 1),
        "first_byte_ms": {
            "median": round(1000 * statistics.median(first_bytes), 1),
            "p95": round(1000 * first_bytes[int(0.95 * len(first_bytes))], 1),
            "most": round(1000 * first_bytes[-1], 1),
        },
        "resident_mb": [round(size / 2**20, 1) for size in memory],
    }


async def _request(http: httpx2.AsyncClient, number: int, kind: str, steps: int) -> float | None:
    """One request; the seconds until the first byte of a stream."""
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "steps": steps}
    if kind == INVALID:
        answer = await http.post("/v1/images/generations", json={**body, "steps": 0})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "steps", answer.text
        return None
    if kind == VALID and number % 2:
        answer = await http.post("/v1/images/generations", json=body)
        assert answer.status_code == 200 and answer.json()["data"][0]["seed"] == number, answer.text
        return None
    body |= {"stream": True, "progress": True}
    begun, first, last = time.monotonic(), None, ""
    async with http.stream("POST", "/v1/images/generations", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            first = first or time.monotonic() - begun
            last = line[:60] if line.startswith("event: ") else last
            if kind == CANCELLED and '"step": 1' in line:
                return first
    assert last == "event: image_generation.completed", last
    return first


def _compared(url: str, pipeline: LatentDiffusionPipeline, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds for a hundred images over HTTP, and from a batch scheduler in this process."""
    count = 100

    async def served() -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=600) as http:

            async def one(number: int) -> None:
                body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "steps": args.steps}
                answer = await http.post("/v1/images/generations", json=body)
                assert answer.status_code == 200, answer.text

            numbers = iter(range(count))

            async def client() -> None:
                for number in numbers:
                    await one(number)

            await asyncio.gather(*(client() for _ in range(args.clients)))

    begun = time.monotonic()
    asyncio.run(served())
    over_http = time.monotonic() - begun
    with BatchScheduler(pipeline, Limits(max_rows=32)) as scheduler:
        begun = time.monotonic()
        jobs = [
            scheduler.submit(Request(PROMPTS[n % len(PROMPTS)], seed=n, num_inference_steps=args.steps))
            for n in range(count)
        ]
        for job in jobs:
            job.result(600)
        alone = time.monotonic() - begun
    return over_http, alone


def _resident(pid: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
