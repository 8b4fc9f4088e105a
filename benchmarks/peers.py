"""Measures ldm-export and other runtimes in turns, with the same weights, prompts and initial noise.

The other runtimes are diffusers on torch (eager in float32 and bfloat16, and compiled), ONNX Runtime with the export
of optimum-onnx, and OpenVINO with that of optimum-intel (bf16, and int8 by NNCF). Each runs in a process and an
environment of its own below --work. The script first creates missing environments, random weights, exports and
quantized models.

    python benchmarks/peers.py --work /tmp/peers --bundle build/shapes --checkpoint demo/ldm_export_demo/checkpoint
    python benchmarks/peers.py --work /tmp/peers --bundle build/large --checkpoint large --random-weights --what unet
    python benchmarks/peers.py --work /tmp/peers --bundle build/sd --random-weights --steps 5 \
        --checkpoint benchmarks/configs/stable-diffusion-v1-5 --reference "optimum-intel bf16"

All runtimes alternate if they fit into memory together. Otherwise they are measured in groups, each with the
reference. For Stable Diffusion, whole images of optimum's own pipelines are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import peer_checkpoint
from peer_environments import HERE, PYTHONPATH, environment_python, run
from peer_list import CONVERSIONS, PEERS, REFERENCE, Peer, stable_diffusion_peers
from rich.console import Console
from rich.table import Table

from ldm_export.bench.figures import Timing, machine, speedup
from ldm_export.bench.worker_pool import Facts, Worker, rounds
from ldm_export.demo import default_prompts
from ldm_runtime.errors import BackendError
from ldm_runtime.images import psnr

GUIDANCE, SEED, TOKENS, WARM_STEPS = 6.0, 7, 77, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments, exports and weights")
    parser.add_argument("--bundle", type=Path, required=True, help="the checkpoint's bundle")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a diffusers folder")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="the checkpoint has no weights: use random ones",
    )
    parser.add_argument(
        "--what", choices=("unet", "image"), default="image", help="measure one UNet step or whole images (default)"
    )
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument(
        "--reference", choices=PEERS, default=REFERENCE, metavar="PEER", help="what the others are compared with"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1, help="images per call; each is guided and takes two rows")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory", type=float, default=14.0, metavar="GB", help="memory limit of one group")
    parser.add_argument("--prepare", action="store_true", help="create what is missing, without timing")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    peers = PEERS
    if family_of(args.checkpoint) == "StableDiffusionPipeline":
        peers = stable_diffusion_peers()
        if args.what == "unet" or args.reference not in peers:
            parser.error(f"Stable Diffusion: give --what image and --reference, one of {', '.join(peers)}")
    args.only = [name for name in args.only if name in peers]
    if args.what == "unet":
        args.only = [name for name in args.only if not peers[name].changes_image]
    checkpoint, exports = prepare(args, peers)
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
    for number, group in enumerate(groups(peers, args, size)):
        measure(args, {name: peers[name] for name in group}, number, checkpoint, exports, facts)
        if args.json:  # after each group, so that an error does not lose earlier figures
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(facts, indent=2) + "\n")
    show(facts)


def family_of(checkpoint: Path) -> str:
    """Return the pipeline class of a diffusers folder."""
    name: str = json.loads((checkpoint / "model_index.json").read_text())["_class_name"]
    return name


def prepare(args: argparse.Namespace, peers: dict[str, Peer]) -> tuple[Path, Path]:
    """Create what the runtimes need; return the checkpoint with weights and the folder of its exports."""
    name, chosen = args.bundle.absolute().name, [peers[peer] for peer in (args.reference, *args.only)]
    for environment in {peer.environment for peer in chosen} - {""}:
        environment_python(args.work, environment)
    checkpoint = args.checkpoint
    if args.random_weights:
        checkpoint = args.work / f"{name}-checkpoint"
        peer_checkpoint.write(args.checkpoint, checkpoint)
    exports = args.work / f"{name}-exports"
    for file, (script, what) in CONVERSIONS.items():
        needed = any(file in peer.needs for peer in chosen)
        if needed and not (exports / file).exists():
            extra = ["--random"] if args.random_weights and what == "int8" else []
            run(args.work, "optimum", [script, what, str(checkpoint), str(exports), *extra])
    return checkpoint, exports


def groups(peers: dict[str, Peer], args: argparse.Namespace, size: int) -> list[list[str]]:
    """Return the runtimes in groups that fit into memory, with the reference first in each."""
    result = [[args.reference]]
    for name in args.only:
        if name != args.reference:
            share = sum(peers[peer].share for peer in (*result[-1], name))
            if size * share > args.memory * 1e9 and len(result[-1]) > 1:
                result.append([args.reference])
            result[-1].append(name)
    return result


def measure(
    args: argparse.Namespace, peers: dict[str, Peer], group: int, checkpoint: Path, exports: Path, facts: Facts
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
        for name, peer in peers.items():
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
                    raise SystemExit(f"{name}: failed, but it is the reference: {error}") from None
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
            "cpu_seconds": float(np.median([answer["cpu_seconds"] for answer in facts_of_runs])),
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
    table = Table(
        "",
        f"× {facts['reference']}",
        "seconds",
        "spread",
        "CPU seconds",
        "GB",
        "error",
        title=f"{facts['bundle']}: {what}",
    )
    for name, peer in facts["peers"].items():
        seconds = peer["seconds"]
        numbers = (f"{peer['speedup']:.2f}", f"{seconds['median']:.4g}", f"{seconds['spread']:.0%}")
        numbers += (f"{peer['cpu_seconds']:.4g}",)
        table.add_row(name, *numbers, f"{peer['peak_bytes'] / 1e9:.2f}", f"{peer['error']:.2g}")
    Console().print(table)


if __name__ == "__main__":
    main()
