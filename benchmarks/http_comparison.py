"""Measures the throughput of an HTTP server and of its batch scheduler without HTTP, in turns."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from http_client import Connection
from PIL import Image

from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.http.app import make_app
from ldm_runtime.http.served_model import ModelOptions
from ldm_runtime.http.served_models import ServedModels
from ldm_runtime.http.server import listening_socket
from ldm_runtime.http.server_options import ServerOptions
from ldm_runtime.request import Request

__all__ = ["PROMPTS", "compared"]

PROMPTS = ("a small red circle", "a large blue square", "a green triangle on a white background", "a yellow star")


def compared(bundle: Path, backend: str, *, clients: int, steps: Sequence[int], images: int, rounds: int) -> list[Any]:
    """Throughput over HTTP as a share of that of the batch scheduler, and the processor time of each image.

    Server and scheduler are one: this process, in which ``ldm-export serve``'s application runs on its batch scheduler.
    Over HTTP, clients in another process receive PNG images in base64, which are checked after the time has been taken.
    Without HTTP, the same number of clients in this process receive arrays of pixels. Every client waits for its image
    before it asks for the next. In every other round, the half without HTTP comes first.

    Args:
        bundle: The model.
        backend: Name of the engine.
        clients: Number of clients.
        steps: Numbers of steps per image; each is compared.
        images: Number of images in each half of a round.
        rounds: Number of rounds.
    """
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as others,
        _serving(bundle, backend, clients) as (url, scheduler),
    ):
        found = []
        for count in steps:
            seconds, cpu = {"http": list[float](), "alone": list[float]()}, {"http": 0.0, "alone": 0.0}
            for number in range(-1, rounds):  # the first round is not counted: engines compile for its shapes
                for half in ("http", "alone") if number % 2 else ("alone", "http"):
                    begun = time.process_time()
                    if half == "http":
                        took = others.submit(_over_http, url, clients, count, images).result()
                    else:
                        took = asyncio.run(_alone(scheduler, clients, count, images))
                    if number >= 0:
                        seconds[half].append(took)
                        cpu[half] += time.process_time() - begun
            ratios = [alone / http for http, alone in zip(*seconds.values(), strict=True)]
            found.append(
                {
                    "steps": count,
                    "images_per_round": images,
                    "throughput_ratios": [round(ratio, 3) for ratio in ratios],
                    "median_throughput_ratio": round(statistics.median(ratios), 3),
                    "total_throughput_ratio": round(sum(seconds["alone"]) / sum(seconds["http"]), 3),
                    "images_per_second": {
                        half: round(images * rounds / sum(every), 1) for half, every in seconds.items()
                    },
                    "cpu_ms_per_image": {half: round(1000 * total / rounds / images, 2) for half, total in cpu.items()},
                }
            )
    return found


@contextmanager
def _serving(bundle: Path, backend: str, clients: int) -> Iterator[tuple[str, BatchScheduler]]:
    """The address of a server in this process, and its batch scheduler."""
    models = ServedModels.open([bundle], ModelOptions({"backend": backend}))
    model = next(iter(models.bundles.values())).current
    assert model is not None
    options = ServerOptions(port=0, max_client_requests=clients)
    with Path(os.devnull).open("w") as log, listening_socket(options) as listener:
        app = make_app(models, options, lambda line: print(line, file=log))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", model.scheduler
        finally:
            server.should_exit = True
            thread.join()
            models.close()


def _over_http(url: str, clients: int, steps: int, images: int) -> float:
    numbers, answers = iter(range(images)), list[bytes]()

    async def client() -> None:
        async with Connection(url) as http:
            for number in numbers:
                fields = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "steps": steps}
                status, answer = await http.post(fields)
                assert status == 200, answer
                answers.append(answer)

    seconds = asyncio.run(_seconds(client, clients))
    found = [json.loads(answer)["data"][0] for answer in answers]
    assert sorted(entry["seed"] for entry in found) == list(range(images))
    for entry in found:
        Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))).load()
    return seconds


async def _alone(scheduler: BatchScheduler, clients: int, steps: int, images: int) -> float:
    numbers = iter(range(images))

    async def client() -> None:
        for number in numbers:
            request = Request(PROMPTS[number % len(PROMPTS)], seed=number, num_inference_steps=steps)
            await asyncio.wrap_future(scheduler.submit(request).future)

    return await _seconds(client, clients)


async def _seconds(client: Any, clients: int) -> float:
    """Seconds until all clients have ended."""
    begun = time.monotonic()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.monotonic() - begun
