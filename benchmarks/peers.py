"""Times ldm-export and other runtimes side by side, alternating, with the same weights, prompts and initial noise.

Each runtime has its own process and environment below --work: diffusers on torch (eager float32 and bfloat16, and
compiled), ONNX Runtime with optimum-onnx's export, OpenVINO with optimum-intel's (bf16, and int8 by NNCF). Missing
environments, random weights, exports and quantized models are created first.

    python benchmarks/peers.py --work /tmp/peers --bundle build/shapes --checkpoint demo/ldm_export_demo/checkpoint
    python benchmarks/peers.py --work /tmp/peers --bundle build/large --checkpoint large --random-weights --what unet

Runtimes that fit into memory together alternate; otherwise there are several groups, each with the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peer_checkpoint
from peer_environments import HERE, PYTHONPATH, environment_python, run
from rich.console import Console
from rich.table import Table

from ldm_export.bench.figures import Timing, machine, speedup
from ldm_export.bench.worker_pool import Facts, Worker, rounds
from ldm_export.demo import default_prompts
from ldm_runtime.errors import BackendError
from ldm_runtime.images import psnr

REFERENCE = "diffusers fp32"
GUIDANCE, SEED, TOKENS, WARM_STEPS = 6.0, 7, 77, 2
FILES = {"unet.onnx": "onnx", "unet.xml": "openvino", "unet-int8.xml": "int8"}


@dataclass(frozen=True)
class Peer:
    """A runtime to time: worker script, environment ("" for this one), settings, and bytes per byte of weights."""

    script: str
    environment: str
    settings: dict[str, Any]
    share: float
    needs: str = ""


def torch_peer(dtype: str, compiled: bool = False) -> Peer:
    settings = {"dtype": dtype, "compile": compiled}
    return Peer("torch_worker.py", "torch", settings, (0.6 if dtype == "bfloat16" else 1.1) + 0.3 * compiled)


def openvino_peer(unet: str, share: float) -> Peer:
    return Peer("openvino_worker.py", "optimum", {"unet": unet, "precision": "bf16"}, share, unet)


def ours(backend: str, precision: str, share: float, every: int = 1) -> Peer:
    return Peer("ours_worker.py", "", {"backend": backend, "precision": precision, "every": every}, share)


PEERS = {
    REFERENCE: torch_peer("float32"),
    "diffusers bf16": torch_peer("bfloat16"),
    "torch.compile fp32": torch_peer("float32", True),
    "torch.compile bf16": torch_peer("bfloat16", True),
    "optimum-onnx fp32": Peer("onnxruntime_worker.py", "optimum", {}, 1.4, "unet.onnx"),
    "optimum-intel bf16": openvino_peer("unet.xml", 1.6),
    "optimum-intel int8": openvino_peer("unet-int8.xml", 0.6),
    "ldm-export onnxruntime fp32": ours("onnxruntime", "fp32", 1.4),
    "ldm-export openvino fp32": ours("openvino", "fp32", 2.1),
    "ldm-export float": ours("auto", "float", 1.6),
    "ldm-export int8": ours("auto", "int8", 0.6),
    "ldm-export float, guidance each 3rd step": ours("auto", "float", 1.6, 3),
    "ldm-export int8, guidance each 3rd step": ours("auto", "int8", 1.2, 3),
}
"""The last two reuse guidance between steps; their steps are those of the two runtimes before."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments, exports and weights")
    parser.add_argument("--bundle", type=Path, required=True, help="the checkpoint's bundle")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a diffusers folder")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="config files only: draw the weights",
    )
    parser.add_argument("--what", choices=("unet", "image"), default="image", help="one step, or whole images")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument(
        "--reference", choices=PEERS, default=REFERENCE, metavar="PEER", help="what the others are compared with"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1, help="images, each guided: two rows of the UNet")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory", type=float, default=14.0, metavar="GB", help="memory limit of one group")
    parser.add_argument("--prepare", action="store_true", help="create what is missing, without timing")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.what == "unet":
        args.only = [name for name in args.only if PEERS[name].settings.get("every", 1) == 1]
    checkpoint, exports = prepare(args)
    if args.prepare:
        return
    size = sum(file.stat().st_size for file in (args.bundle / "unet").glob("fp32.onnx*"))
    facts: Facts = {
        "machine": machine(),
        "what": args.what,
        "runs": args.runs,
        "reference": args.reference,
        "peers": {},
        "refused": {},
    }
    facts |= {"steps": args.steps, "batch": args.batch, "weights_bytes": size, "bundle": args.bundle.absolute().name}
    for number, group in enumerate(groups(args.only, args.reference, size, args.memory * 1e9)):
        measure(args, group, number, checkpoint, exports, facts)
        if args.json:  # after each group, so that an error does not lose earlier figures
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(facts, indent=2) + "\n")
    show(facts)


def prepare(args: argparse.Namespace) -> tuple[Path, Path]:
    """Create what the runtimes need; return the checkpoint with weights and the folder of its exports."""
    name, names = args.bundle.absolute().name, (args.reference, *args.only)
    for environment in {PEERS[peer].environment for peer in names} - {""}:
        environment_python(args.work, environment)
    checkpoint = args.checkpoint
    if args.random_weights:
        checkpoint = args.work / f"{name}-checkpoint"
        peer_checkpoint.write(args.checkpoint, checkpoint)
    exports = args.work / f"{name}-exports"
    for file, what in FILES.items():
        needed = any(PEERS[peer].needs == file for peer in names) or (
            file == "unet.xml" and "optimum-intel int8" in names
        )
        if needed and not (exports / file).exists():
            extra = ["--random"] if args.random_weights else []
            run(args.work, "optimum", ["convert.py", what, str(checkpoint), str(exports), *extra])
    return checkpoint, exports


def groups(names: list[str], reference: str, size: int, memory: float) -> list[list[str]]:
    """Return the runtimes in groups that fit into ``memory``, with the reference first in each."""
    result = [[reference]]
    for name in names:
        if name != reference:
            if size * sum(PEERS[peer].share for peer in (*result[-1], name)) > memory and len(result[-1]) > 1:
                result.append([reference])
            result[-1].append(name)
    return result


def measure(
    args: argparse.Namespace, names: list[str], group: int, checkpoint: Path, exports: Path, facts: Facts
) -> None:
    """Time one group and write its figures into ``facts``."""
    shared = {"checkpoint": str(checkpoint), "graphs": str(exports), "models": str(exports), "bundle": str(args.bundle)}
    shared |= {"threads": args.threads, "images": args.what == "image"}
    results = args.work / f"results-{args.bundle.absolute().name}-{args.what}"
    results.mkdir(parents=True, exist_ok=True)
    unet = json.loads((checkpoint / "unet/config.json").read_text())
    side = unet["sample_size"]
    command = {"what": args.what, "batch": args.batch, "seed": SEED, "steps": args.steps, "guidance": GUIDANCE}
    command |= {"latent": [unet.get("in_channels", 4), side, side], "context": [TOKENS, unet["cross_attention_dim"]]}
    command |= {"height": None, "width": None}
    with ExitStack() as stack:
        workers = list[Worker]()
        for name in names:
            peer = PEERS[name]
            python = environment_python(args.work, peer.environment) if peer.environment else Path(sys.executable)
            environment = os.environ | {
                "PYTHONPATH": PYTHONPATH,
                "TORCHINDUCTOR_CACHE_DIR": str(args.work / "inductor"),
            }
            line = [str(python), str(HERE / peer.script)]
            print(f"loading {name}", file=sys.stderr)
            try:
                workers.append(stack.enter_context(Worker(name, line, {**shared, **peer.settings}, environment)))
            except BackendError as error:
                if name == args.reference:
                    raise SystemExit(f"{name} is the reference, but failed: {error}") from None
                print(f"left out: {error}", file=sys.stderr)
                facts["refused"][name] = str(error)
        warm = {**command, "steps": WARM_STEPS, "times": 1}
        if args.what == "image":
            command["times"] = 1
        dot = partial(print, end=".", file=sys.stderr, flush=True)

        texts = default_prompts(None if args.random_weights else args.checkpoint)

        def command_of(number: int) -> Facts:  # new prompts in each round, because encoded prompts are cached
            prompts = [f"{texts[index % len(texts)]}, number {number}" for index in range(args.batch)]
            return {**(warm if number < 0 else command), "prompts": prompts}

        answers = rounds(workers, command_of, args.runs, dot)
        for worker in workers:
            worker.ask({"what": "save", "path": str(results / f"{worker.name}.npy")})
    seconds = [[answer["seconds"] for answer in worker] for worker in answers]
    expected = np.load(results / f"{workers[0].name}.npy").astype(np.float64)
    for worker, runs, facts_of_runs in zip(workers, seconds, answers, strict=True):
        got = np.load(results / f"{worker.name}.npy").astype(np.float64)
        fact = {
            "speedup": speedup(runs, seconds[0]),
            "seconds": Timing.of(runs).facts(),
            "peak_bytes": max(answer["peak_bytes"] for answer in facts_of_runs),
            "load_seconds": worker.facts["seconds"],
            "error": float(np.sqrt(np.square(got - expected).mean() / np.square(expected).mean())),
            "group": group,
            "tools": worker.facts["tools"],
            **({"choice": worker.facts["choice"]} if "choice" in worker.facts else {}),
        }
        if args.what == "image":
            fact["psnr"] = psnr(got, expected, 255.0)
        facts["peers"].setdefault(worker.name, fact)


def show(facts: Facts) -> None:
    what = "one UNet step" if facts["what"] == "unet" else f"images of {facts['steps']} steps"
    table = Table("", f"× {facts['reference']}", "seconds", "spread", "GB", "error", title=f"{facts['bundle']}: {what}")
    for name, peer in facts["peers"].items():
        seconds = peer["seconds"]
        numbers = (f"{peer['speedup']:.2f}", f"{seconds['median']:.4g}", f"{seconds['spread']:.0%}")
        table.add_row(name, *numbers, f"{peer['peak_bytes'] / 1e9:.2f}", f"{peer['error']:.2g}")
    Console().print(table)


if __name__ == "__main__":
    main()
