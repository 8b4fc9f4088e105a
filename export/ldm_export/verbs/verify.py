"""``ldm-export verify``: measure a bundle against its checkpoint."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

from ldm_export.screen import Screen
from ldm_export.verbs.options import PRECISIONS, lines, quieten, unwritten
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """The verb's options."""
    verb.add_argument("bundle", type=Path)
    verb.add_argument("--against", type=Path, metavar="CHECKPOINT", help="default: the shipped shapes model")
    verb.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line (default: four)")
    verb.add_argument("--steps", type=int, default=50, help="denoising steps of the pictures (default 50)")
    verb.add_argument("--precision", choices=PRECISIONS, help="which graphs (default: what the bundle was built for)")
    verb.add_argument("--tolerance", type=float, help="largest error of a component, of its own scale")
    verb.add_argument("--max-pixel", type=int, help="largest difference of a pixel, of 255 (default 1 for fp32)")
    verb.add_argument("--min-psnr", type=float, metavar="DB", help="least PSNR of a picture (default 45 for fp16)")
    verb.add_argument("--random-weights", action="store_true", help="the bundle was built with --random-weights")


def run(args: argparse.Namespace, screen: Screen) -> int:
    """``ldm-export verify``: 1 where a figure is beyond its tolerance."""
    from ldm_export.extras import needs

    with needs("export"):
        from ldm_export.build import SHIPPED
        from ldm_export.checkpoint import open_checkpoint
        from ldm_export.prompts import PROMPTS
        from ldm_export.verification import TOLERANCES, verify
        from ldm_export.verification_page import page
    quieten(args.verbose)
    prompts = lines(args.prompts) if args.prompts else PROMPTS
    bundle = Bundle.open(args.bundle)
    checkpoint = open_checkpoint(args.against or SHIPPED, random_weights=args.random_weights)
    precision = args.precision or bundle.precision
    given = {"component": args.tolerance, "pixel": args.max_pixel, "psnr": args.min_psnr}
    for option, value in zip(("tolerance", "max-pixel", "min-psnr"), given.values(), strict=True):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise SpecError(f"--{option}: got {value}, expected a finite number >= 0")
    tolerance = replace(TOLERANCES[precision], **{name: value for name, value in given.items() if value is not None})
    with screen.bar("verifying") as bar:
        result = verify(
            bundle,
            checkpoint,
            prompts,
            args.steps,
            precision,
            tolerance,
            progress=lambda *told: bar.to(told[1], told[2], told[0]),
        )
    reports = {"report/verify.html": page(result).encode()}
    try:
        bundle.with_measured({"verify": result.facts()}, reports)
    except OSError as error:
        raise unwritten(args.bundle, error, "free some disk space or verify a copy") from None
    if args.json:
        screen.json(result.facts())
    else:
        rows = [[c.name, f"{c.max_error:.2e}", f"{c.cosine:.7f}", _decibel(c.psnr)] for c in result.components]
        screen.table("components, against torch", ["component", "max error", "cosine", "PSNR dB"], rows)
        rows = [[p.prompt, f"{p.max_pixel}/255", _decibel(p.psnr)] for p in result.pictures]
        screen.table("pictures, against diffusers", ["prompt", "max pixel", "PSNR dB"], rows)
        screen.result(str(args.bundle / "report/verify.html"))
        for failure in result.failures:
            screen.result(f"beyond tolerance: {failure}")
    return 1 if result.failures else 0


def _decibel(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"
