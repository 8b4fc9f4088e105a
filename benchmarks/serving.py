"""What serving costs beside the UNet itself: the engine room, Triton before it, and the UNet called at each step.

Three ways to draw the same pictures take turns in each round: the UNet alone at that batch (what is possible), the
engine room in this process, and a real Triton server whose `ldm_stream` runs the UNet in its process or calls the model
`unet` at each step. Then what a step costs without any UNet, at the size of the published model.
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
from ldm_runtime.ddim import DDIM
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ldm_export.cli import main as ldm_export
from ldm_export_demo.grammar import held_out_prompts
from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.batching.batch import Batch
from ldm_runtime.batching.counters import Counters
from ldm_runtime.batching.job import Job
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.request import Geometry
from ldm_runtime.specs import Axis

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.support.triton_client import Grpc  # noqa: E402
from tests.support.triton_server import TritonServer  # noqa: E402

CONCURRENT = (1, 2, 4, 8, 16)
ETA, GUIDANCE = 0.3, 6.0
BAR, STEP_BAR = 0.90, 1.0
"""Share of the UNet's own throughput at 16 prompts; milliseconds of other work a step at batch 16."""


def raw(pipeline: LatentDiffusionPipeline, prompts: int, steps: int) -> float:
    """Seconds of ``steps`` UNet calls alone, of so many guided prompts, what they share computed before."""
    rng = np.random.default_rng(0)
    shapes = {spec.name: (2 * prompts, *spec.bounds("opt")[1:]) for spec in pipeline.backends["unet"].inputs}
    sample, context = (rng.standard_normal(shapes[name], np.float32) for name in ("sample", "context"))
    conditioning, times = pipeline.unet.encode(context), np.full(2 * prompts, 500, np.int64)
    begun = time.perf_counter()
    for _ in range(steps):
        pipeline.unet(sample, times, conditioning)
    return time.perf_counter() - begun


def in_the_room(room: BatchScheduler, prompts: list[str], steps: int) -> tuple[float, float, float]:
    """Seconds for all prompts; of them those of text encoder and decoder; milliseconds of other work a step."""
    before, begun = room.figures(), time.perf_counter()
    options = {"num_inference_steps": steps, "eta": ETA, "guidance_scale": GUIDANCE}
    for ticket in [room.submit(Request(prompt, seed=seed, **options)) for seed, prompt in enumerate(prompts)]:
        ticket.result()
    seconds, after = time.perf_counter() - begun, room.figures()
    spent = {stage: after.seconds[stage] - before.seconds[stage] for stage in after.seconds}
    other = (spent["step"] + spent["noise"]) / (after.steps - before.steps) * 1000
    return seconds, spent["encode"] + spent["decode"], other


def over_triton(grpc: Grpc, prompts: list[str], steps: int) -> float:
    """Seconds for all prompts, asked at once over gRPC."""
    begun = time.perf_counter()
    wishes = [
        {"PROMPT": prompt, "SEED": seed, "STEPS": steps, "ETA": ETA, "GUIDANCE": GUIDANCE}
        for seed, prompt in enumerate(prompts)
    ]
    for asked in [grpc.ask(wish) for wish in wishes]:
        asked.result()
    return time.perf_counter() - begun


def without_a_unet(images: int, seconds: float, eta: float, steps: int = 200) -> dict[str, float]:
    """Milliseconds a step of the engine room's own work, for guided images of the published model's size.

    A UNet that takes ``seconds`` and does nothing stands in for the real one; noise is drawn beside it.
    """
    geometry = Geometry(4, Axis("height", 2, 32, 128), Axis("width", 2, 32, 128), 32, 8)
    scheduler = DDIM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    predicted = np.random.default_rng(0).standard_normal((2 * images, 4, 32, 32)).astype(np.float32)

    class Idle:
        def __call__(self, sample: np.ndarray, timestep: np.ndarray, conditioning: object) -> np.ndarray:
            time.sleep(seconds)
            return predicted

    with ThreadPoolExecutor(1) as drawer:
        batch, tally = Batch(Idle(), 2 * images, None, drawer), Counters(2 * images)
        for seed in range(images):
            request = Request("a", seed=seed, eta=eta, guidance_scale=GUIDANCE, num_inference_steps=1000)
            plan, schedule = request.plan(geometry), scheduler.schedule(1000, eta)
            ticket = Job(plan, schedule, priority=2, seconds=None, progress=None, preview_every=0)
            batch.join(ticket, {"context": np.zeros((2, 77, 1280), np.float32)})
        for _ in range(10):
            batch.step(tally)
        before = dict(tally.seconds)
        for _ in range(steps):
            batch.step(tally)
    spent = {stage: (tally.seconds[stage] - before[stage]) / steps * 1000 for stage in ("step", "noise")}
    return {
        "images": images,
        "eta": eta,
        "unet_ms": seconds * 1000,
        "ms": sum(spent.values()),
        "noise_ms": spent["noise"],
    }


class Servers:
    """Two Triton servers of one bundle: the UNet in the engine room's process, and called at each step."""

    def __init__(self, bundle: Path, folder: Path):
        self.asked: dict[str, Grpc] = {}
        self._running: list[TritonServer] = []
        for way, options in {"triton": [], "triton_per_step": ["--per-step"]}.items():
            usual = ["--only", "ldm", "--backend", "onnxruntime", "--precision", "fp32", "--quiet"]
            if ldm_export(["triton", str(bundle), "-o", str(folder / way), *usual, *options]):
                raise SystemExit(1)
            server = TritonServer(folder / way, folder / f"{way}.log")
            server.start()
            self._running.append(server)
            self.asked[way] = Grpc(server.grpc)
            while server.figures().get("ldm_ready") != 1:
                time.sleep(0.1)

    def close(self) -> None:
        for grpc in self.asked.values():
            grpc.client.close()
        for server in self._running:
            server.stop()


def measure(bundle: Path, rounds: int, steps: int) -> list[dict[str, float]]:
    """One row for each number of concurrent prompts: medians over the rounds."""
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        LatentDiffusionPipeline.from_bundle(bundle, backend="onnxruntime", precision="fp32") as pipeline,
        BatchScheduler(pipeline) as room,
    ):
        servers = Servers(bundle, Path(folder))
        try:
            for count in track(CONCURRENT, console=Console(stderr=True)):
                prompts = held_out_prompts(0, count, seed=0)
                ways: dict[str, Callable[[], float]] = {
                    "raw": lambda count=count: raw(pipeline, count, steps),
                    **{
                        way: lambda grpc=grpc, prompts=prompts: over_triton(grpc, prompts, steps)
                        for way, grpc in servers.asked.items()
                    },
                }
                found: dict[str, list[float]] = {name: [] for name in (*ways, "room", "models", "other_ms")}
                for number in range(rounds + 1):
                    values = {name: way() for name, way in ways.items()}
                    timed = in_the_room(room, prompts, steps)
                    values |= dict(zip(("room", "models", "other_ms"), timed, strict=True))
                    for name, value in values.items() if number else ():  # the first round warms up
                        found[name].append(value)
                rows.append(_row(count, steps, found))
        finally:
            servers.close()
    return rows


def _row(count: int, steps: int, found: dict[str, list[float]]) -> dict[str, float]:
    middle = {name: statistics.median(values) for name, values in found.items()}

    def share(way: str) -> float:
        return statistics.median(a / b for a, b in zip(found["raw"], found[way], strict=True))

    steps_alone = [whole - models for whole, models in zip(found["room"], found["models"], strict=True)]
    per_step = [(b - a) / steps * 1000 for a, b in zip(found["triton"], found["triton_per_step"], strict=True)]
    return {
        "prompts": count,
        "unet_call_ms": middle["raw"] / steps * 1000,
        "room_steps_share": statistics.median(a / b for a, b in zip(found["raw"], steps_alone, strict=True)),
        "room_share": share("room"),
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
            "share at 16, steps": last["room_steps_share"] >= BAR,
            "share at 16, whole pictures": last["room_share"] >= BAR,
            "share at 16, through Triton": last["triton_share"] >= BAR,
            "own work a step at 16": most <= STEP_BAR,
        },
    }
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    table = Table("prompts", "UNet call", "room, steps", "room, whole", "Triton", "Triton, per step", "a call costs")
    for row in rows:
        shares = (f"{row[f'{way}share']:.1%}" for way in ("room_steps_", "room_", "triton_", "triton_per_step_"))
        call = f"{row['unet_call_ms']:.1f} ms"
        table.add_row(str(row["prompts"]), call, *shares, f"{row['per_step_call_costs_ms']:.2f} ms")
    Console().print(table)
    Console().print_json(json.dumps({"own_work": own, "bars": facts["bars"]}))


if __name__ == "__main__":
    main()
