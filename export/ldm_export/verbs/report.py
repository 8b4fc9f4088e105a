"""``ldm-export report``: one HTML page on a bundle's precisions: pictures, quality, size and speed; needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_export.screen import Screen
from ldm_export.verbs.options import lines, unwritten
from ldm_runtime.atomic_files import write_whole
from ldm_runtime.backends.registry import BACKEND_NAMES
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BuildError


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """The verb's options."""
    verb.add_argument("bundle", type=Path)
    verb.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), help="page to write (default report.html)"
    )
    verb.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line (default: four)")
    verb.add_argument("--seed", type=int, default=0, help="of the first picture; the next have the next (default 0)")
    verb.add_argument("--steps", type=int, default=50, help="denoising steps of the pictures (default 50)")
    verb.add_argument(
        "--backend", choices=BACKEND_NAMES, default="auto", help="what draws them (default: the fastest here)"
    )


def run(args: argparse.Namespace, screen: Screen) -> None:
    """``ldm-export report``."""
    from ldm_export.prompts import PROMPTS
    from ldm_export.report.contents import make_report
    from ldm_export.report.page import report_page

    if not args.output.name or args.output.is_dir():
        raise BuildError(f"{args.output}: is a folder, expected the name of a page; choose another -o")
    prompts = lines(args.prompts) if args.prompts else PROMPTS
    bundle = Bundle.open(args.bundle)
    with screen.bar("drawing") as bar:
        report = make_report(
            bundle, prompts, args.seed, args.steps, args.backend, lambda what, done, total: bar.to(done, total, what)
        )
    page = report_page(report).encode()
    try:
        write_whole(args.output, page)
    except OSError as error:
        raise unwritten(args.output, error, "choose another -o") from None
    if args.json:
        screen.json({"page": str(args.output), "bytes": len(page), "precisions": list(report.drawn)})
        return
    screen.result(str(args.output))
