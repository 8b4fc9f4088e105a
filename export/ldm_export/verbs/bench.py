"""``ldm-export bench``: time a bundle, part by part and end to end."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ldm_export.screen import Screen, human_bytes
from ldm_export.verbs.options import PRECISIONS, unwritten
from ldm_runtime.atomic_files import write_whole
from ldm_runtime.backends.selection import BACKENDS
from ldm_runtime.errors import BuildError


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """The verb's options."""
    verb.add_argument("bundle", type=Path)
    verb.add_argument(
        "--backend", nargs="+", choices=BACKENDS, default=["auto"], help="one or several, which take turns"
    )
    verb.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, help="one or several, each with every backend (default: its own)"
    )
    verb.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4], metavar="N", help="images a call (1 2 4)")
    verb.add_argument("--steps", type=int, default=50, help="denoising steps of whole pictures (default 50)")
    verb.add_argument("--runs", type=int, default=5, help="rounds (default 5)")
    verb.add_argument("--guidance", type=float, default=6.0, help="guidance scale, 1 for none (default 6)")
    verb.add_argument("--eta", type=float, default=0.3, help="noise of each step, 0 for none (default 0.3)")
    verb.add_argument("--width", type=int, help="pixels, a multiple of 8 (default: the model's)")
    verb.add_argument("--height", type=int, help="pixels, a multiple of 8 (default: the model's)")
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default auto)")
    verb.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    verb.add_argument("-o", "--output", type=Path, metavar="SVG", help="draw the figures here")


def run(args: argparse.Namespace, screen: Screen) -> None:
    """``ldm-export bench``."""
    from ldm_export.bench.benchmark import Combination, Settings, benchmark

    if args.output:
        _check(args.output)
    settings = Settings(
        tuple(dict.fromkeys(args.batch)),
        *(args.steps, args.runs, args.guidance, args.eta, args.height, args.width, args.device, args.threads),
    )
    precisions = dict.fromkeys(args.precision or [None])
    combinations = [Combination(backend, one) for backend in dict.fromkeys(args.backend) for one in precisions]
    with screen.bar("loading") as bar:
        result = benchmark(args.bundle, combinations, settings, lambda what, done, total: bar.to(done, total, what))
    if args.output:
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
    screen.table(f"{result.bundle}: {settings.steps} steps, {settings.runs} rounds", columns, rows)
    for name, facts in result.loaded.items():
        how = "{backend}, {graph} graphs in {arithmetic}".format(**facts["choice"])
        loading = f"loaded in {facts['seconds']:.1f} s, {human_bytes(facts['resident_bytes'])} resident"
        screen.result(f"{name}: {how}; {loading}")
    if args.output:
        screen.result(str(args.output))
    return None


def _check(output: Path) -> None:
    """Refuse before the work what could not be written after it."""
    if output.suffix != ".svg" or output.is_dir():
        raise BuildError(f"{output}: expected the name of a picture that ends in .svg; choose another -o")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BuildError(
            f"{output}: cannot be written ({folder} is no folder, or not ours to write); choose another -o"
        )
