"""``ldm-export report``: write an HTML page that compares a bundle's precisions: images, quality, size and speed."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_export.screen import Screen
from ldm_export.verbs.options import chosen_prompts, unwritten, whole_number
from ldm_runtime.atomic_files import destination, write_whole
from ldm_runtime.backends.registry import BACKEND_NAMES
from ldm_runtime.bundle import Bundle

__all__ = ["add_arguments", "run"]


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options."""
    verb.add_argument("bundle", type=Path)
    verb.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), help="page to write (default report.html)"
    )
    verb.add_argument("--prompts", type=Path, metavar="FILE", help="text file with one prompt per line (default: four)")
    verb.add_argument(
        "--seed", type=whole_number, default=0, help="seed of the first image; image i has seed + i (default 0)"
    )
    verb.add_argument("--steps", type=whole_number, help="denoising steps (default: the model's)")
    verb.add_argument(
        "--backend", choices=BACKEND_NAMES, default="auto", help="engine (default: the fastest on this machine)"
    )


def run(args: argparse.Namespace, screen: Screen) -> None:
    """Run ``ldm-export report``."""
    from ldm_export.report.contents import ReportOptions, make_report
    from ldm_export.report.page import report_page
    from ldm_export.requests import requests_for

    destination(args.output)
    bundle = Bundle.open(args.bundle)
    requests = requests_for(bundle.manifest.model, chosen_prompts(args.prompts, bundle))
    options = ReportOptions(args.seed, args.steps, args.backend)
    with screen.bar("drawing") as bar:
        report = make_report(bundle, requests, options, lambda what, done, total: bar.to(done, total, what))
    page = report_page(report).encode()
    replaced = args.output.exists()
    try:
        write_whole(args.output, page)
    except OSError as error:
        raise unwritten(args.output, error, "choose another -o") from None
    if args.json:
        screen.json({"page": str(args.output), "bytes": len(page), "precisions": list(report.results)})
        return
    if replaced:
        screen.note(f"overwrote {args.output}")
    screen.result(str(args.output))
