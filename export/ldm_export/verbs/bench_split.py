"""``ldm-export bench --quality --split-levels``: where to split the UNet for feature caching."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ldm_export.report.lenient_json import finite, mappings
from ldm_export.screen import Screen
from ldm_export.verbs.options import unwritten
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BuildError
from ldm_runtime.pipeline import LatentDiffusionPipeline

__all__ = ["SPLIT_COLUMNS", "open_pipeline", "run_split_levels", "split_rows"]

SPLIT_COLUMNS = ["layers", "cache\nevery", "time\n(s)", "faster", "dB\nmean", "dB\nworst", "correct"]


def run_split_levels(
    args: argparse.Namespace, bundle: Bundle, requests: Sequence[dict[str, Any]], min_psnr: float, screen: Screen
) -> None:
    """Measure every level on the requests, and store the best in the bundle with ``--save``.

    Raises:
        LdmError: The UNet cannot be split, or an option cannot be used.
    """
    from ldm_export.bench.split_levels import measure_split_levels, split_facts
    from ldm_export.bundle.feature_cache_layers import FEATURE_CACHE
    from ldm_export.demo import demo_grader

    if args.steps is not None or args.precision not in (None, ["fp32"]):
        raise BuildError("--split-levels: got --steps or --precision; levels are compared in fp32, leave them out")

    try:
        with screen.bar("loading") as bar:
            levels = measure_split_levels(
                bundle,
                requests,
                lambda split: open_pipeline(args, split, "fp32"),
                demo_grader(bundle),
                lambda what, done, total: bar.to(done, total, what),
            )
        options = {name: value for name, value in requests[0].items() if isinstance(value, int | float)}
        facts = split_facts(levels, min_psnr, options)
        if args.save:
            bundle.with_measured({FEATURE_CACHE: facts}, {})
    except OSError as error:
        raise unwritten(args.bundle, error, "free some disk space or measure a copy") from None
    if args.json:
        screen.json({**facts, "saved": args.save})
        return
    screen.table(f"{bundle.folder.name}: {len(requests)} images", SPLIT_COLUMNS, split_rows(facts))
    screen.result(f"fastest with {min_psnr:g} dB in every image: {facts['layers']} layers")
    if args.save:
        screen.result(f"stored: `ldm-export build CHECKPOINT -o {args.bundle} --feature-cache auto` splits there")


def open_pipeline(args: argparse.Namespace, bundle: Bundle, precision: str) -> LatentDiffusionPipeline:
    """Open a bundle on the engine, device and threads of the command line."""
    return LatentDiffusionPipeline.from_bundle(
        bundle, precision=precision, backend=args.backend[0], device=args.device, threads=args.threads
    )


def split_rows(facts: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table with ``SPLIT_COLUMNS``, from the manifest's ``measured.feature_cache``, which is untrusted."""
    return [
        [
            *(_figure(row.get(name), ".0f") for name in ("layers", "cache_every")),
            *(_figure(row.get("seconds"), ".3g"), _figure(row.get("faster"), ".2f") + "×"),
            *(_figure(row.get(name), ".1f", "same") for name in ("mean_psnr", "worst_psnr")),
            _figure(row.get("correct"), ".0%"),
        ]
        for row in mappings(facts.get("levels"))
    ]


def _figure(value: Any, form: str, missing: str = "") -> str:
    return missing if (number := finite(value)) is None else format(number, form)
