"""``ldm-export bench --quality``: seconds against image quality."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from ldm_export.screen import Screen
from ldm_export.verbs.bench_split import open_pipeline, run_split_levels
from ldm_export.verbs.options import chosen_prompts, real_number, unwritten
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BuildError
from ldm_runtime.number_checks import integer, number

__all__ = ["add_quality_arguments", "run_quality"]

MIN_PSNR = 35.0
MAX_IMAGES = 1000
DEMO_PROMPTS = 96
"""Maximum number of different prompts of the demo model."""


def add_quality_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options."""
    verb.add_argument(
        "--quality",
        action="store_true",
        help="compare combinations of --steps, --cache-every, --guidance-every and precisions instead: seconds of an "
        "image, and PSNR against the image without them, over --runs images",
    )
    verb.add_argument(
        "--min-psnr",
        type=real_number,
        metavar="DB",
        help=f"with --quality: name the fastest setting whose images all have this PSNR (default {MIN_PSNR:g})",
    )
    verb.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="with --quality: text file with one prompt per line (default: four; for the demo model held-out ones)",
    )
    verb.add_argument(
        "--save",
        action="store_true",
        help="with --quality: store the settings and figures in the bundle, for `generate --budget`; with "
        "--split-levels the number of layers, for `build --feature-cache auto`",
    )
    verb.add_argument(
        "--split-levels",
        action="store_true",
        help="with --quality: compare the numbers of layers that steps with cached features can compute instead "
        "(`build --feature-cache`)",
    )


def run_quality(args: argparse.Namespace, screen: Screen) -> None:
    """Run ``ldm-export bench --quality``.

    Raises:
        LdmError: The bundle or an option cannot be used.
    """
    from ldm_export.bench.speed_quality import measure_quality, quality_settings
    from ldm_export.demo import demo_grader
    from ldm_export.report.quality_section import QUALITY_COLUMNS, quality_rows
    from ldm_runtime.backends.selection import Wish, select_backend

    if args.output is not None or len(args.backend) > 1:
        raise BuildError("--quality: got -o or several backends, expected one backend and no chart; leave them out")
    least = number("min-psnr", MIN_PSNR if args.min_psnr is None else args.min_psnr)
    bundle, count = Bundle.open(args.bundle), integer("runs", args.runs, 1, MAX_IMAGES)
    given = {"guidance_scale": args.guidance, "eta": args.eta, "height": args.height, "width": args.width}
    options = {name: value for name, value in given.items() if value is not None}
    requests = [{**request, **options} for request in _requests(bundle, args.prompts, count)]
    if args.split_levels:
        run_split_levels(args, bundle, requests, least, screen)
        return
    precisions = args.precision or [select_backend(bundle, args.backend[0], Wish(device=args.device)).choice.precision]
    settings = quality_settings(bundle, args.steps, precisions)
    with screen.bar("loading") as bar:
        record = measure_quality(
            settings,
            requests,
            lambda precision: open_pipeline(args, bundle, precision),
            demo_grader(bundle),
            lambda what, done, total: bar.to(done, total, what),
        )
    record = replace(record, options=options)
    if args.save:
        try:
            bundle.with_quality(record)
        except OSError as error:
            raise unwritten(args.bundle, error, "free some disk space or measure a copy") from None
    chosen = record.fastest(least)
    if args.json:
        facts = {**record.to_json(), "min_psnr": least, "best": chosen.facts()}
        screen.json({**facts, "saved": args.save})
        return
    screen.table(f"{bundle.folder.name}: {count} images", QUALITY_COLUMNS, quality_rows(record))
    screen.result(f"fastest with {least:g} dB in every image: {chosen.setting}; {record.measured(chosen)}")
    if args.save:
        screen.result(f"stored: `ldm-export generate {args.bundle} --budget {least:g}` takes this setting")


def _requests(bundle: Bundle, file: Path | None, count: int) -> Sequence[dict[str, Any]]:
    """Requests for ``count`` images, in turn: prompts of a file, held-out ones of the demo model, or the defaults."""
    from ldm_export.demo import calibration_prompts
    from ldm_export.requests import requests_for

    split = None if file else calibration_prompts(bundle, 0, min(count, DEMO_PROMPTS))
    prompts = chosen_prompts(file, bundle) if split is None else split[1]
    return [dict(request) for request in islice(cycle(requests_for(bundle.manifest.model, prompts)), count)]
