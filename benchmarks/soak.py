"""Sends thousands of mixed requests to a Triton server, some cancelled, some invalid, and checks every outcome.

No request may be lost, and memory must not grow. Every tenth image is compared with an image that this process
generates. The script uses loopback only, and limits the number of requests and the time. `make test` creates the
environment that it needs.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from tritonclient.utils import InferenceServerException

from ldm_export.cli import main as ldm_export
from ldm_export_demo.grammar import held_out_prompts
from ldm_runtime import LatentDiffusionPipeline, Request

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.support.triton_client import Grpc  # noqa: E402
from tests.support.triton_server import TritonServer  # noqa: E402

BAD = (
    ({"PROMPT": ""}, "empty prompt"),
    ({"STEPS": 0}, "steps: got 0"),
    ({"HEIGHT": 65}, "height: got 65"),
    ({"ETA": -1.0}, "eta: got -1"),
    ({"SEED": [1, 2]}, "2 seeds for 1 images"),
    ({"PROMPT": b"\xff"}, "no UTF-8"),
)
FLAT = 0.10
"""Largest growth of memory between a quarter of the requests and the end."""


def wish_of(rng: random.Random, prompts: list[str]) -> dict:
    """Return a random request: prompt, seed, steps, guidance, eta, size and priority."""
    height, width = rng.choice([(64, 64)] * 6 + [(96, 64), (64, 96)])
    return {
        "PROMPT": rng.choice(prompts),
        "SEED": rng.randrange(8),
        "STEPS": rng.choice((2, 4, 6, 10)),
        "GUIDANCE": rng.choice((1.0, 6.0)),
        "ETA": rng.choice((0.0, 0.3)),
        "HEIGHT": height,
        "WIDTH": width,
        "PRIORITY": rng.randrange(5),
    }


def generated(pipeline: LatentDiffusionPipeline, wish: dict) -> np.ndarray:
    names = ("PROMPT", "SEED", "STEPS", "GUIDANCE", "ETA", "HEIGHT", "WIDTH")
    prompt, seed, steps, guidance, eta, height, width = (wish[name] for name in names)
    request = Request(
        prompt, seed=seed, num_inference_steps=steps, guidance_scale=guidance, eta=eta, height=height, width=width
    )
    for step in pipeline.steps(request):
        latents = step.latents
    return np.stack([np.asarray(image) for image in pipeline.decode(latents)])


def one(grpc: Grpc, number: int, args: argparse.Namespace, prompts: list[str]) -> tuple[str, dict, np.ndarray | None]:
    """Send one request; return its outcome, its inputs, and its image if it is to be compared."""
    rng = random.Random(number)
    wish, chance = wish_of(rng, prompts), rng.random()
    if chance < args.bad:
        change, expected = rng.choice(BAD)
        try:
            grpc.ask(wish | change).result()
        except InferenceServerException as error:
            fits_message = expected in error.message()
            return ("invalid, right error" if fits_message else f"invalid, wrong error: {error.message()}"), wish, None
        return "invalid, but an image came", wish, None
    if chance < args.bad + args.cancel:
        call = grpc.ask(wish | {"STEPS": 200})
        time.sleep(rng.random() * 0.5)
        call.call.cancel()
        try:
            call.result()
        except InferenceServerException as error:
            return ("cancelled" if "ancel" in str(error) else f"cancelled, wrong error: {error}"), wish, None
        return "cancelled too late, an image came", wish, None
    image = grpc.ask(wish).result().as_numpy("IMAGE")
    fits = image.shape == (1, wish["HEIGHT"], wish["WIDTH"], 3) and image.dtype == np.uint8
    return ("an image" if fits else f"an image of {image.shape}"), wish, image if number % 10 == 0 else None


def memory(server: TritonServer) -> float:
    """Return the bytes in use by the server and its models, each page counted once (PSS)."""
    session = ["ps", "-o", "pid=", "-s", str(server.process.pid)]
    total = 0
    for pid in subprocess.run(session, capture_output=True, text=True, check=True).stdout.split():
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue  # ended since
        total += next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("build/shapes"))
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrent", type=int, default=24)
    parser.add_argument("--cancel", type=float, default=0.05, help="share of requests that are cancelled")
    parser.add_argument("--bad", type=float, default=0.05, help="share of requests that are invalid")
    parser.add_argument("--seconds", type=float, default=1500, help="time limit")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    prompts = held_out_prompts(8, 8, seed=0)
    outcomes, samples, compared = Counter[str](), [], []
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        options = ["--only", "ldm", "--backend", "onnxruntime", "--precision", "fp32", "--quiet"]
        if ldm_export(["triton", str(args.bundle), "-o", str(repository), *options]):
            return 1
        server = TritonServer(repository, Path(folder) / "log")
        server.start()
        grpc, over, begun = Grpc(server.grpc), threading.Event(), time.monotonic()
        try:
            with Progress(console=Console(stderr=True)) as bar, ThreadPoolExecutor(args.concurrent) as threads:
                task = bar.add_task("requests", total=args.requests)

                def run(number: int) -> None:
                    if time.monotonic() - begun > args.seconds:
                        outcomes["not sent, time limit reached"] += 1
                        return
                    try:
                        outcome, wish, image = one(grpc, number, args, prompts)
                    except Exception as error:
                        outcome, wish, image = f"lost: {type(error).__name__}: {error}", {}, None
                    outcomes[outcome] += 1
                    if image is not None:
                        compared.append((wish, image))
                    bar.advance(task)

                def watch() -> None:
                    while not over.wait(2):
                        samples.append({"done": sum(outcomes.values()), "bytes": memory(server)})

                watcher = threading.Thread(target=watch)
                watcher.start()
                list(threads.map(run, range(args.requests)))
                over.set()
                watcher.join()
            seconds = time.monotonic() - begun
            if server.process.poll() is not None:
                print(server.log.read_text(errors="replace")[-3000:], file=sys.stderr)
                print(f"tritonserver ended with {server.process.returncode}: {outcomes}", file=sys.stderr)
                return 1
            time.sleep(2)
            figures = server.figures()
            samples.append({"done": sum(outcomes.values()), "bytes": memory(server)})
        finally:
            grpc.client.close()
            server.stop()
    with LatentDiffusionPipeline.from_bundle(args.bundle, backend="onnxruntime", precision="fp32") as pipeline:
        worst = max(int(np.abs(image.astype(int) - generated(pipeline, wish)).max()) for wish, image in compared)
    quarter = next(sample for sample in samples if sample["done"] >= args.requests / 4)
    growth = samples[-1]["bytes"] / quarter["bytes"] - 1
    good = {"an image", "invalid, right error", "cancelled", "cancelled too late, an image came"}
    lost = sum(count for outcome, count in outcomes.items() if outcome not in good)
    idle = figures["ldm_queue_length"] == figures["ldm_running_requests"] == 0
    passed = not lost and growth <= FLAT and worst <= 1 and idle and sum(outcomes.values()) == args.requests
    facts = {
        "machine": platform.processor() or platform.machine(),
        "tools": {name: version(name) for name in ("onnxruntime", "tritonclient")} | {"tritonserver": "2.51.0"},
        "requests": args.requests,
        "concurrent": args.concurrent,
        "seconds": round(seconds, 1),
        "outcomes": dict(outcomes.most_common()),
        "lost": lost,
        "compared": len(compared),
        "largest difference of a pixel": worst,
        "memory growth from a quarter on": round(growth, 4),
        "memory": samples[:: max(1, len(samples) // 40)] + samples[-1:],
        "left running or waiting": 0 if idle else figures["ldm_queue_length"] + figures["ldm_running_requests"],
        "server's figures": figures,
        "passed": passed,
    }
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    printed = {name: value for name, value in facts.items() if name not in ("memory", "server's figures")}
    Console().print_json(json.dumps(printed))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
