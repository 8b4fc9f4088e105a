"""``ldm-export bench --quality``: seconds against image quality."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import astuple, replace
from itertools import cycle, islice
from typing import Any

from ldm_export.screen import Screen
from ldm_export.verbs.options import chosen_prompts, real_number, unwritten
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BuildError
from ldm_runtime.number_checks import integer, number
from ldm_runtime.quality import QualityRecord

__all__ = ["QUALITY_COLUMNS", "add_quality_arguments", "quality_rows", "run_quality"]

MIN_PSNR = 35.0
MAX_IMAGES = 1000
DEMO_PROMPTS = 96
"""Most different prompts of the demo model."""
QUALITY_COLUMNS = [
    *("graph", "steps", "cache every", "guidance every"),
    *("seconds", "speed", "dB mean", "dB worst", "correct"),
]


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
        "--save",
        action="store_true",
        help="with --quality: store the settings and figures in the bundle, for `generate --budget`",
    )


def run_quality(args: argparse.Namespace, screen: Screen) -> None:
    """Run ``ldm-export bench --quality``.

    Raises:
        LdmError: The bundle or an option cannot be used.
    """
    from ldm_export.bench.speed_quality import measure_quality, quality_settings
    from ldm_export.demo import demo_grader
    from ldm_runtime.pipeline import LatentDiffusionPipeline

    if args.output is not None or len(args.backend) > 1:
        raise BuildError("--quality: got -o or several backends, expected one backend and no chart; leave them out")
    least = number("min-psnr", MIN_PSNR if args.min_psnr is None else args.min_psnr)
    bundle, count = Bundle.open(args.bundle), integer("runs", args.runs, 1, MAX_IMAGES)
    given = {"guidance_scale": args.guidance, "eta": args.eta, "height": args.height, "width": args.width}
    options = {name: value for name, value in given.items() if value is not None}
    settings = quality_settings(bundle, args.steps, args.precision)

    def opened(precision: str) -> LatentDiffusionPipeline:
        return LatentDiffusionPipeline.from_bundle(
            bundle, precision=precision, backend=args.backend[0], device=args.device, threads=args.threads
        )

    with screen.bar("loading") as bar:
        record = measure_quality(
            settings,
            [{**request, **options} for request in _requests(bundle, count)],
            opened,
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


def quality_rows(record: QualityRecord) -> list[list[str]]:
    """Rows of a table with ``QUALITY_COLUMNS``, the fastest setting first."""
    reference = record.reference.seconds
    return [
        [
            *map(str, astuple(one.setting)),
            f"{one.seconds:.3g}",
            f"{reference / one.seconds:.2f}×",
            *("same" if value is None else f"{value:.1f}" for value in (one.mean_psnr, one.worst_psnr)),
            "" if one.correct is None else f"{one.correct:.0%}",
        ]
        for one in sorted(record.results, key=lambda one: one.seconds)
    ]


def _requests(bundle: Bundle, count: int) -> Sequence[dict[str, Any]]:
    """Requests for ``count`` images: held-out prompts of the demo model, or a model's defaults in turn."""
    from ldm_export.demo import calibration_prompts
    from ldm_export.requests import requests_for

    split = calibration_prompts(bundle, 0, min(count, DEMO_PROMPTS))
    prompts = chosen_prompts(None, bundle) if split is None else split[1]
    return [dict(request) for request in islice(cycle(requests_for(bundle.manifest.model, prompts)), count)]
