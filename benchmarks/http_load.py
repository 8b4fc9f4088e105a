"""Sends many requests to the HTTP server at the same time, and compares it with the batch scheduler alone.

The server runs in a process of its own. 50 clients send 1,000 requests: 5% are cancelled while they run, and 5% are
invalid. Every request must end as expected. The same load then runs again, to see whether memory grows further. Memory
is the resident size of the server after each hundred requests. Then valid requests run in turns over HTTP and on the
batch scheduler without HTTP (``http_comparison``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
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
from urllib.request import urlopen

from http_client import Connection
from http_comparison import PROMPTS, compared

from ldm_export.bench.figures import machine

VALID, CANCELLED, INVALID = "valid", "cancelled", "invalid"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10, help="steps per image of the load")
    parser.add_argument("--compared-steps", type=int, nargs="+", default=[10, 50], help="of the comparisons")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each comparison")
    parser.add_argument("--images", type=int, default=100, help="images in each half of a round")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    busy = os.getloadavg()[0]
    command = [sys.executable, "-m", "ldm_export.cli", "serve", str(args.bundle), "--port", "0"]
    command += ["--backend", args.backend, "--max-client-requests", str(2 * args.clients)]  # a cancelled one ends later
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        url = _address(server)
        load, again = (asyncio.run(_load(url, server.pid, args)) for _ in range(2))
    finally:
        server.terminate()
        server.wait(60)
    sizes = {"clients": args.clients, "images": args.images, "rounds": args.rounds}
    comparisons = compared(args.bundle, args.backend, steps=args.compared_steps, **sizes)
    facts = {
        "machine": machine(),
        "python": platform.python_version(),
        "load_average_before": round(busy, 2),
        "settings": {name: getattr(args, name) for name in ("requests", "clients", "steps", "backend")},
        "loads": [load, again],
        "comparisons": comparisons,
        "exit_code": server.returncode,
    }
    print(json.dumps(facts, indent=2))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return int(bool(load["wrong"] or again["wrong"]) or server.returncode != 0)


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
    outcomes, wrong, memory = Counter[str](), list[str](), list[int]()
    first_bytes: dict[str, list[float]] = {"sent": [], "admitted": []}

    async def client() -> None:
        async with Connection(url) as http:
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
                        first_bytes["sent"].append(seconds)
                        first_bytes["admitted"].append(seconds - http.until_admission)

    begun = time.monotonic()
    await asyncio.gather(*(client() for _ in range(args.clients)))
    seconds = time.monotonic() - begun
    with urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    memory.append(_resident(pid))
    counted = {name: float(value) for name, value in re.findall(r'ldm_requests_total\{.*outcome="(\w+)"\} (\S+)', text)}
    return {
        "outcomes": dict(outcomes),
        "wrong": wrong,
        "counted_by_the_server": counted,
        "seconds": round(seconds, 1),
        "first_byte_ms": {f"since_{name}": _milliseconds(sorted(times)) for name, times in first_bytes.items()},
        "resident_mb": [round(size / 2**20, 1) for size in memory],
    }


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum of sorted times."""
    chosen = {"median": statistics.median(seconds), "p95": seconds[int(0.95 * len(seconds))], "most": seconds[-1]}
    return {name: round(1000 * value, 1) for name, value in chosen.items()}


async def _request(http: Connection, number: int, kind: str, steps: int) -> float | None:
    """One request; the seconds until the first byte of a stream."""
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "steps": steps}
    if kind == INVALID:
        status, answer = await http.post({**body, "steps": 0})
        assert status == 400 and json.loads(answer)["error"]["param"] == "steps", answer
        return None
    if kind == VALID and number % 2:
        status, answer = await http.post(body)
        assert status == 200 and json.loads(answer)["data"][0]["seed"] == number, answer
        return None
    begun, first, event = time.monotonic(), None, b""
    async for event in http.stream(body | {"stream": True, "progress": True}):
        first = first or time.monotonic() - begun
        if kind == CANCELLED and b'"step": 1' in event:
            await http.reconnect()
            return first
    assert event.startswith(b"event: image_generation.completed"), event[:60]
    return first


def _resident(pid: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
