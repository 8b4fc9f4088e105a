"""``ldm-export bench --quality``: seconds against image quality."""

from __future__ import annotations

import argparse
from dataclasses import astuple
from itertools import cycle, islice

from ldm_export.screen import Screen
from ldm_export.verbs.options import chosen_prompts, real_number
from ldm_runtime.errors import BuildError
from ldm_runtime.number_checks import integer, number

__all__ = ["add_quality_arguments", "run_quality"]

MIN_PSNR = 35.0
MAX_IMAGES = 1000
COLUMNS = ["graphs", "steps", "cache_every", "guidance_every", "seconds", "speed", "dB mean", "worst"]


def add_quality_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options."""
    verb.add_argument(
        "--quality",
        action="store_true",
        help="compare combinations of steps, --cache-every, --guidance-every and precisions instead: seconds of an "
        "image, and PSNR against the image without them, over --runs images",
    )
    verb.add_argument(
        "--min-psnr",
        type=real_number,
        metavar="DB",
        help=f"with --quality: name the fastest setting whose images all have this PSNR (default {MIN_PSNR:g})",
    )


def run_quality(args: argparse.Namespace, screen: Screen) -> None:
    """Run ``ldm-export bench --quality``.

    Raises:
        LdmError: The bundle or an option cannot be used.
    """
    from ldm_export.bench.speed_quality import best, measure_quality, quality_settings
    from ldm_export.requests import requests_for
    from ldm_runtime.bundle import Bundle
    from ldm_runtime.pipeline import LatentDiffusionPipeline

    if args.output is not None or len(args.backend) > 1:
        raise BuildError("--quality: got -o or several backends, expected one backend and no chart; leave them out")
    least = number("min-psnr", MIN_PSNR if args.min_psnr is None else args.min_psnr)
    bundle, count = Bundle.open(args.bundle), integer("runs", args.runs, 1, MAX_IMAGES)
    known = requests_for(bundle.manifest.model, chosen_prompts(None, bundle))
    given = {"guidance_scale": args.guidance, "eta": args.eta, "height": args.height, "width": args.width}
    shared = {name: value for name, value in given.items() if value is not None}
    requests = [{**request, **shared} for request in islice(cycle(known), count)]
    settings = quality_settings(bundle, args.steps, args.precision)

    def opened(precision: str) -> LatentDiffusionPipeline:
        return LatentDiffusionPipeline.from_bundle(
            bundle, precision=precision, backend=args.backend[0], device=args.device, threads=args.threads
        )

    with screen.bar("loading") as bar:
        results = measure_quality(settings, requests, opened, lambda what, done, total: bar.to(done, total, what))
    chosen = best(results, least)
    if args.json:
        screen.json(
            {
                "settings": [one.facts() for one in results],
                "images": count,
                "min_psnr": least,
                "best": chosen.facts(),
            }
        )
        return
    rows = [
        [
            *map(str, astuple(one.setting)),
            f"{one.seconds:.3g}",
            f"{results[0].seconds / one.seconds:.2f}×",
            _db(one.mean_psnr),
            _db(one.worst_psnr),
        ]
        for one in sorted(results, key=lambda one: one.seconds)
    ]
    screen.table(f"{bundle.folder.name}: {count} images", COLUMNS, rows)
    faster = results[0].seconds / chosen.seconds
    screen.result(f"fastest with {least:g} dB in every image: {chosen.setting}; {faster:.2f}× as fast")


def _db(value: float | None) -> str:
    return "same" if value is None else f"{value:.1f}"
