"""Measures what serving costs beside the UNet itself: the batch scheduler, Triton, and a UNet called over Triton.

Each round generates the same images in four ways: UNet calls alone at that batch size (the upper bound); the batch
scheduler in this process; a real Triton server whose `ldm_stream` runs the UNet in its own process; and one that calls
the Triton model `unet` at each step. Then the script measures a step without any UNet, at the size of the published
model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ldm_export.cli import main as ldm_export
from ldm_export_demo.grammar import held_out_prompts
from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.batching.batch import Batch
from ldm_runtime.batching.counters import Counters
from ldm_runtime.batching.job import Job
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.guidance import StepBranches
from ldm_runtime.plan import Plan
from ldm_runtime.schedulers import DDIM

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.support.triton_client import Grpc  # noqa: E402
from tests.support.triton_server import TritonServer  # noqa: E402

CONCURRENT = (1, 2, 4, 8, 16)
ETA, GUIDANCE = 0.3, 6.0
BAR, STEP_BAR = 0.90, 1.0
"""Limits: share of the UNet's own throughput at 16 prompts, and milliseconds of other work per step at batch 16."""


def raw(pipeline: LatentDiffusionPipeline, prompts: int, steps: int) -> float:
    """Seconds of ``steps`` UNet calls alone, for guided prompts; what the steps share is computed before."""
    plan = pipeline.plan(Request(["a"] * prompts, seed=0, guidance_scale=GUIDANCE, num_inference_steps=1))
    conditioning = pipeline.condition(plan, pipeline.begin(plan))
    embedded = pipeline.denoiser.embed(plan.trajectory.timesteps)
    schedule = {name: array.repeat(plan.rows, 0) for name, array in embedded.items()}
    sample = np.random.default_rng(0).standard_normal((plan.rows, *plan.shape[1:]), np.float32)
    begun = time.perf_counter()
    for _ in range(steps):
        pipeline.denoiser(sample, schedule, conditioning)
    return time.perf_counter() - begun


def scheduled(scheduler: BatchScheduler, prompts: list[str], steps: int) -> tuple[float, float, float]:
    """Seconds for all prompts; those of conditioning and decoder among them; milliseconds of other work per step."""
    before, begun = scheduler.snapshot(), time.perf_counter()
    options = {"num_inference_steps": steps, "eta": ETA, "guidance_scale": GUIDANCE}
    for job in [scheduler.submit(Request(prompt, seed=seed, **options)) for seed, prompt in enumerate(prompts)]:
        job.result()
    seconds, after = time.perf_counter() - begun, scheduler.snapshot()
    spent = {stage: after.seconds[stage] - before.seconds[stage] for stage in after.seconds}
    other = (spent["step"] + spent["noise"]) / (after.steps - before.steps) * 1000
    return seconds, spent["encode"] + spent["decode"], other


def over_triton(grpc: Grpc, prompts: list[str], steps: int) -> float:
    """Return the seconds for all prompts, sent at once over gRPC."""
    begun = time.perf_counter()
    wishes = [
        {"PROMPT": prompt, "SEED": seed, "STEPS": steps, "ETA": ETA, "GUIDANCE": GUIDANCE}
        for seed, prompt in enumerate(prompts)
    ]
    for call in [grpc.ask(wish) for wish in wishes]:
        call.result()
    return time.perf_counter() - begun


def without_a_unet(images: int, seconds: float, eta: float, steps: int = 200) -> dict[str, float]:
    """Milliseconds per step of the batch's own work, for guided images of the published model's size.

    A UNet that sleeps for ``seconds`` replaces the real one; noise is generated meanwhile.
    """
    scheduler = DDIM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    trajectory = scheduler.trajectory(1000, eta)
    predicted = np.random.default_rng(0).standard_normal((2 * images, 4, 32, 32)).astype(np.float32)
    both, branches = (StepBranches.BOTH,) * len(trajectory), ("unconditional", "conditional")

    class Idle:
        def __call__(self, sample: np.ndarray, schedule: object, conditioning: object) -> np.ndarray:
            time.sleep(seconds)
            return predicted

    with ThreadPoolExecutor(1) as executor:
        batch, counters = Batch(Idle(), Limits(max_rows=2 * images), executor), Counters(2 * images)
        for seed in range(images):
            plan = Plan(Request("a"), (seed,), (1, 4, 32, 32), None, GUIDANCE, branches, both, trajectory)
            schedule = {"time_embedding": np.zeros((len(trajectory), 1280), np.float32)}
            batch.join(Job(plan), {"context": np.zeros((2, 77, 1280), np.float32)}, schedule)
        for _ in range(10):
            batch.step(counters)
        before = dict(counters.seconds)
        for _ in range(steps):
            batch.step(counters)
    spent = {stage: (counters.seconds[stage] - before[stage]) / steps * 1000 for stage in ("step", "noise")}
    return {
        "images": images,
        "eta": eta,
        "unet_ms": seconds * 1000,
        "ms": sum(spent.values()),
        "noise_ms": spent["noise"],
    }


class Servers:
    """Two Triton servers of one bundle: the UNet in the process of `ldm_stream`, and called at each step."""

    def __init__(self, bundle: Path, folder: Path):
        self.clients: dict[str, Grpc] = {}
        self._running: list[TritonServer] = []
        for way, options in {"triton": [], "triton_per_step": ["--per-step"]}.items():
            usual = ["--only", "ldm", "--backend", "onnxruntime", "--precision", "fp32", "--quiet"]
            if ldm_export(["triton", str(bundle), "-o", str(folder / way), *usual, *options]):
                raise SystemExit(1)
            server = TritonServer(folder / way, folder / f"{way}.log")
            server.start()
            self._running.append(server)
            self.clients[way] = Grpc(server.grpc)
            while server.figures().get("ldm_ready") != 1:
                time.sleep(0.1)

    def close(self) -> None:
        for grpc in self.clients.values():
            grpc.client.close()
        for server in self._running:
            server.stop()


def measure(bundle: Path, rounds: int, steps: int) -> list[dict[str, float]]:
    """One row for each number of concurrent prompts: medians over the rounds."""
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        LatentDiffusionPipeline.from_bundle(bundle, backend="onnxruntime", precision="fp32") as pipeline,
        BatchScheduler(pipeline) as scheduler,
    ):
        servers = Servers(bundle, Path(folder))
        try:
            for count in track(CONCURRENT, console=Console(stderr=True)):
                prompts = held_out_prompts(0, count, seed=0)
                ways: dict[str, Callable[[], float]] = {
                    "raw": lambda count=count: raw(pipeline, count, steps),
                    **{
                        way: lambda grpc=grpc, prompts=prompts: over_triton(grpc, prompts, steps)
                        for way, grpc in servers.clients.items()
                    },
                }
                times: dict[str, list[float]] = {name: [] for name in (*ways, "scheduler", "models", "other_ms")}
                for number in range(rounds + 1):
                    values = {name: way() for name, way in ways.items()}
                    timed = scheduled(scheduler, prompts, steps)
                    values |= dict(zip(("scheduler", "models", "other_ms"), timed, strict=True))
                    for name, value in values.items() if number else ():  # the first round warms up
                        times[name].append(value)
                rows.append(_row(count, steps, times))
        finally:
            servers.close()
    return rows


def _row(count: int, steps: int, times: dict[str, list[float]]) -> dict[str, float]:
    middle = {name: statistics.median(values) for name, values in times.items()}

    def share(way: str) -> float:
        return statistics.median(a / b for a, b in zip(times["raw"], times[way], strict=True))

    steps_alone = [whole - models for whole, models in zip(times["scheduler"], times["models"], strict=True)]
    per_step = [(b - a) / steps * 1000 for a, b in zip(times["triton"], times["triton_per_step"], strict=True)]
    return {
        "prompts": count,
        "unet_call_ms": middle["raw"] / steps * 1000,
        "scheduler_steps_share": statistics.median(a / b for a, b in zip(times["raw"], steps_alone, strict=True)),
        "scheduler_share": share("scheduler"),
        "triton_share": share("triton"),
        "triton_per_step_share": share("triton_per_step"),
        "other_work_ms_a_step": middle["other_ms"],
        "per_step_call_costs_ms": statistics.median(per_step),
        "pictures_a_minute_raw": 60 * count / middle["raw"],
        "pictures_a_minute_triton": 60 * count / middle["triton"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("build/shapes"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    own = [without_a_unet(n, s, eta) for n in (1, 4, 16) for s in (0.005, 0.02) for eta in (0.0, 0.3)]
    rows = measure(args.bundle, args.rounds, args.steps)
    last, most = rows[-1], max(row["ms"] for row in own if row["images"] == 16)
    facts = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "tools": {name: version(name) for name in ("onnxruntime", "numpy")} | {"tritonserver": "2.51.0"},
        "settings": {"steps": args.steps, "rounds": args.rounds, "eta": ETA, "guidance": GUIDANCE},
        "throughput": rows,
        "own_work": own,
        "bars": {
            "share at 16, steps": last["scheduler_steps_share"] >= BAR,
            "share at 16, whole images": last["scheduler_share"] >= BAR,
            "share at 16, through Triton": last["triton_share"] >= BAR,
            "own work a step at 16": most <= STEP_BAR,
        },
    }
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    table = Table(
        "prompts", "UNet call", "scheduler, steps", "scheduler, whole", "Triton", "Triton, per step", "a call costs"
    )
    for row in rows:
        shares = (
            f"{row[f'{way}share']:.1%}" for way in ("scheduler_steps_", "scheduler_", "triton_", "triton_per_step_")
        )
        call = f"{row['unet_call_ms']:.1f} ms"
        table.add_row(str(row["prompts"]), call, *shares, f"{row['per_step_call_costs_ms']:.2f} ms")
    Console().print(table)
    Console().print_json(json.dumps({"own_work": own, "bars": facts["bars"]}))


if __name__ == "__main__":
    main()
