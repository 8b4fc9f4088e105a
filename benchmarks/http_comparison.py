"""Measures the throughput of an HTTP server and of a batch scheduler without HTTP, in turns."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from http_client import Connection
from PIL import Image

from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.request import Request

__all__ = ["PROMPTS", "compared"]

PROMPTS = ("a small red circle", "a large blue square", "a green triangle on a white background", "a yellow star")


def compared(
    url: str, pid: int, scheduler: BatchScheduler, *, clients: int, steps: int, images: int, rounds: int
) -> dict[str, Any]:
    """Throughput over HTTP as a share of that of the scheduler in this process, and the processor time of each image.

    Over HTTP, the time runs until this process has received all answers, with PNG images in base64; they are checked
    afterwards. For the scheduler it runs until all arrays of pixels are there, which are neither encoded nor sent. Both
    have the same clients, each of which waits for its image before it asks for the next. In every other round the
    scheduler comes first.

    Args:
        url: Address of the server.
        pid: Its process.
        scheduler: A scheduler with the server's limits.
        clients: Number of clients, each with one request at a time; over HTTP, each with a connection.
        steps: Steps per image.
        images: Number of images in each half of a round.
        rounds: Number of rounds.
    """
    ratios, served_seconds, alone_seconds = list[float](), list[float](), list[float]()
    cpu = {"server": 0.0, "clients": 0.0, "scheduler_alone": 0.0}
    for number in range(-1, rounds):  # the first round is not counted: engines compile for its shapes
        took = dict[str, float]()
        for half in ("http", "alone") if number % 2 else ("alone", "http"):
            server, own, begun = _cpu(pid), time.process_time(), time.monotonic()
            if half == "http":
                answers = asyncio.run(_served(url, clients, steps, images))
            else:
                asyncio.run(_alone(scheduler, clients, steps, images))
            took[half] = time.monotonic() - begun
            if number >= 0:
                own = time.process_time() - own
                cpu["clients" if half == "http" else "scheduler_alone"] += own
                cpu["server"] += _cpu(pid) - server if half == "http" else 0
        _check(answers)
        if number >= 0:
            ratios.append(took["alone"] / took["http"])
            served_seconds.append(took["http"])
            alone_seconds.append(took["alone"])
    return {
        "steps": steps,
        "images_per_round": images,
        "throughput_ratios": [round(ratio, 3) for ratio in ratios],
        "median_throughput_ratio": round(statistics.median(ratios), 3),
        "images_per_second": {
            "http": round(images / statistics.median(served_seconds), 1),
            "scheduler_alone": round(images / statistics.median(alone_seconds), 1),
        },
        "cpu_ms_per_image": {name: round(1000 * total / rounds / images, 2) for name, total in cpu.items()},
    }


async def _served(url: str, clients: int, steps: int, images: int) -> list[bytes]:
    numbers, answers = iter(range(images)), list[bytes]()

    async def client() -> None:
        async with Connection(url) as http:
            for number in numbers:
                status, answer = await http.post(_fields(number, steps))
                assert status == 200, answer
                answers.append(answer)

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


def _fields(number: int, steps: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "steps": steps}


async def _alone(scheduler: BatchScheduler, clients: int, steps: int, images: int) -> None:
    numbers = iter(range(images))

    async def client() -> None:
        for n in numbers:
            job = scheduler.submit(Request(PROMPTS[n % len(PROMPTS)], seed=n, num_inference_steps=steps))
            await asyncio.wrap_future(job.future)

    await asyncio.gather(*(client() for _ in range(clients)))


def _check(answers: list[bytes]) -> None:
    """Decode all images of the answers, one for each seed."""
    found = [json.loads(answer)["data"][0] for answer in answers]
    assert sorted(entry["seed"] for entry in found) == list(range(len(answers)))
    for entry in found:
        Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))).load()


def _cpu(pid: int) -> float:
    """Processor seconds of another process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
