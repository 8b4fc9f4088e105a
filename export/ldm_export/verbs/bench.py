"""``ldm-export bench``: time a bundle, component by component and end to end."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ldm_export.screen import Screen, human_bytes
from ldm_export.verbs.bench_quality import add_quality_arguments, run_quality
from ldm_export.verbs.options import PRECISIONS, real_number, unwritten, whole_number
from ldm_runtime.atomic_files import destination, write_whole
from ldm_runtime.backends.registry import BACKEND_NAMES
from ldm_runtime.backends.selection import DEVICES
from ldm_runtime.errors import BuildError

__all__ = ["add_arguments", "run"]


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    verb.add_argument("bundle", type=Path)
    verb.add_argument(
        "--backend", nargs="+", choices=BACKEND_NAMES, default=["auto"], help="backends to time (default auto)"
    )
    verb.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        help="precisions to time on each backend (default: the backend's own choice)",
    )
    verb.add_argument(
        "--batch",
        nargs="+",
        type=whole_number,
        default=[1, 2, 4],
        metavar="N",
        help="numbers of images per call (default 1 2 4)",
    )
    verb.add_argument(
        "--steps",
        nargs="+",
        type=whole_number,
        metavar="N",
        help="denoising steps of a generation (default: the model's); with --quality, numbers of steps to compare with "
        "the model's (default: half of them)",
    )
    verb.add_argument("--runs", type=whole_number, default=5, help="timed rounds (default 5)")
    verb.add_argument("--guidance", type=real_number, help="guidance scale, 1 for none (default: the model's)")
    verb.add_argument("--eta", type=real_number, help="noise added at each step, 0 for none (default: the model's)")
    verb.add_argument("--width", type=whole_number, help="pixels (default: the model's)")
    verb.add_argument("--height", type=whole_number, help="pixels (default: the model's)")
    verb.add_argument("--device", choices=DEVICES, default="auto", help="device to run on (default auto)")
    verb.add_argument("--threads", type=whole_number, help="CPU threads (default: all cores)")
    verb.add_argument("-o", "--output", type=Path, metavar="SVG", help="file to write a chart to")
    add_quality_arguments(verb)


def run(args: argparse.Namespace, screen: Screen) -> None:
    """Run ``ldm-export bench``."""
    if args.quality:
        return run_quality(args, screen)
    from ldm_export.bench.bench_results import BenchSettings, Combination
    from ldm_export.bench.benchmark import benchmark

    for option in ("min_psnr", "save", "prompts", "split_levels"):
        if getattr(args, option) not in (None, False):
            raise BuildError(f"--{option.replace('_', '-')}: got it without --quality; add --quality")
    if args.steps is not None and len(args.steps) > 1:
        raise BuildError("--steps: got several numbers without --quality, expected one; add --quality or give one")
    if args.output:
        _check(args.output)
    settings = BenchSettings(
        batches=tuple(dict.fromkeys(args.batch)),
        steps=args.steps[0] if args.steps else None,
        runs=args.runs,
        guidance_scale=args.guidance,
        eta=args.eta,
        height=args.height,
        width=args.width,
        device=args.device,
        threads=args.threads,
    )
    precisions = dict.fromkeys(args.precision or [None])
    combinations = [Combination(backend, one) for backend in dict.fromkeys(args.backend) for one in precisions]
    with screen.bar("loading") as bar:
        result = benchmark(args.bundle, combinations, settings, lambda what, done, total: bar.to(done, total, what))
    if args.output:
        if args.output.exists():
            screen.note(f"overwriting {args.output}")
        try:
            write_whole(args.output, result.chart().encode())
        except OSError as error:
            raise unwritten(args.output, error, "choose another -o") from None
    for name, why in result.refused.items():
        screen.note(f"left out: {name}: {why}")
    if args.json:
        return screen.json(result.facts())
    rows = [
        [
            f"{measure.part}, {measure.batch}",
            measure.combination,
            f"{measure.timing.median * 1e3:,.4g}",
            f"{measure.timing.spread:.0%}",
            f"{measure.ratio:.2f}×",
            "" if measure.images_per_second is None else f"{measure.images_per_second:.3g}",
            human_bytes(measure.peak_bytes),
        ]
        for measure in result.measures
    ]
    columns = ["part, batch", "on", "ms", "spread", "speed", "images/s", "memory"]
    screen.table(f"{result.bundle}: {result.settings.steps} steps, {settings.runs} rounds", columns, rows)
    for name, facts in result.loaded.items():
        how = "{backend}, {graph} graphs in {arithmetic}".format(**facts["choice"])
        loading = f"loaded in {facts['seconds']:.1f} s, {human_bytes(facts['resident_bytes'])} resident"
        screen.result(f"{name}: {how}; {loading}")
    if args.output:
        screen.result(str(args.output))
    return None


def _check(output: Path) -> None:
    """Refuse an output that cannot be written, before any work is done."""
    if output.suffix != ".svg":
        raise BuildError(f"{output}: expected the name of a file that ends in .svg; choose another -o")
    destination(output)
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BuildError(f"{output}: cannot be written ({folder} is not a folder or not writable); choose another -o")
