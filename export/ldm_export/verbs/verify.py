"""``ldm-export verify``: measure a bundle against its checkpoint, its backends or its precisions against each other."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_export.screen import Screen
from ldm_export.verbs.options import PRECISIONS, chosen_prompts, quieten, real_number, unwritten, whole_number
from ldm_export.verbs.original_options import add_embedding_argument, add_original_arguments, open_given
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import VERIFY_PAGE
from ldm_runtime.errors import SpecError

if TYPE_CHECKING:
    from ldm_export.quality.measures import ComponentResult

__all__ = ["add_arguments", "run"]


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options."""
    verb.add_argument("bundle", type=Path)
    verb.add_argument(
        "--against",
        type=Path,
        metavar="CHECKPOINT",
        help="checkpoint to compare with (default: its demo model)",
    )
    verb.add_argument("--prompts", type=Path, metavar="FILE", help="text file with one prompt per line (default: four)")
    verb.add_argument("--steps", type=whole_number, help="denoising steps of the images (default: the model's)")
    verb.add_argument("--precision", choices=PRECISIONS, help="precision of the graphs (default: the bundle's)")
    verb.add_argument(
        "--tolerance", type=real_number, help="maximum error of a component, relative to its largest value"
    )
    verb.add_argument("--max-pixel", type=whole_number, help="maximum pixel difference, in 1/255 (default 1 for fp32)")
    verb.add_argument(
        "--min-psnr", type=real_number, metavar="DB", help="minimum PSNR of an image in dB (default 45 for fp16)"
    )
    verb.add_argument("--random-weights", action="store_true", help="the bundle was built with --random-weights")
    add_original_arguments(verb)
    add_embedding_argument(verb)
    others = verb.add_mutually_exclusive_group()
    others.add_argument(
        "--backends",
        metavar="LIST",
        help="compare backends with the first of them instead, e.g. onnxruntime,openvino:fp32; polygraphy and "
        "polygraphy-tensorrt run the graphs and the engines with Polygraphy's runners",
    )
    others.add_argument(
        "--layers", action="store_true", help="compare half-precision graphs with fp32 tensor by tensor instead"
    )


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Run ``ldm-export verify``; return 1 if a figure exceeds its tolerance."""
    if args.backends or args.layers:
        return _backends(args, screen) if args.backends else _layers(args, screen)
    from ldm_export.extras import needs

    with needs("export"):
        from ldm_export.demo import demo_task
        from ldm_export.families import family_named
        from ldm_export.quality.measures import TOLERANCES
        from ldm_export.quality.verification import verify
        from ldm_export.quality.verification_page import page
    quieten(args.verbose)
    bundle = Bundle.open(args.bundle)
    requests = family_named(bundle.manifest.family).requests(chosen_prompts(args.prompts, bundle))
    checkpoint = open_given(args.against, args, demo_task(bundle))
    precision = args.precision or bundle.precision
    bounds = {"component": args.tolerance, "pixel": args.max_pixel, "psnr": args.min_psnr}
    for option, value in zip(("tolerance", "max-pixel", "min-psnr"), bounds.values(), strict=True):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise SpecError(f"--{option}: got {value}, expected a finite number >= 0")
    tolerance = replace(TOLERANCES[precision], **{name: value for name, value in bounds.items() if value is not None})
    with screen.bar("verifying") as bar:
        result = verify(
            bundle,
            checkpoint,
            requests,
            args.steps,
            precision,
            tolerance,
            on_progress=lambda part, done, total: bar.to(done, total, part),
        )
    reports = {VERIFY_PAGE: page(result).encode()}
    try:
        bundle.with_measured({"verify": result.facts()}, reports)
    except OSError as error:
        raise unwritten(args.bundle, error, "free some disk space or verify a copy") from None
    if args.json:
        screen.json(result.facts())
    else:
        rows = [[c.name, *_figures(c)] for c in result.components]
        screen.table("components, compared with torch", ["component", "max error", "cosine", "PSNR dB"], rows)
        rows = [[p.label, f"{p.max_pixel}/255", _decibel(p.psnr)] for p in result.images]
        screen.table("images, compared with diffusers", ["request", "max pixel", "PSNR dB"], rows)
        screen.result(str(args.bundle / VERIFY_PAGE))
        for failure in result.failures:
            screen.result(f"beyond tolerance: {failure}")
    return 1 if result.failures else 0


def _backends(args: argparse.Namespace, screen: Screen) -> int:
    from ldm_export.quality.comparison import compare, facts, parse_runs
    from ldm_export.requests import requests_for

    runs = parse_runs(args.backends, args.precision)
    bundle = Bundle.open(args.bundle)
    requests = requests_for(bundle.manifest.model, chosen_prompts(args.prompts, bundle))
    with screen.bar("loading") as bar:
        differences = compare(bundle, runs, requests, args.steps, lambda what, done, total: bar.to(done, total, what))
    try:
        bundle.with_measured({"backends": facts(runs, differences)}, {})
    except OSError as error:
        raise unwritten(args.bundle, error, "free some disk space or verify a copy") from None
    failures = [one.failure for one in differences if one.failure]
    if args.json:
        screen.json(facts(runs, differences))
    else:
        rows = [[f"{one.part}, {one.run}", *_figures(one.result)] for one in differences]
        screen.table(f"compared with {runs[0]}, on the same inputs", ["part", "max error", "cosine", "PSNR dB"], rows)
        for failure in failures:
            screen.result(f"beyond tolerance: {failure}")
    return 1 if failures else 0


def _layers(args: argparse.Namespace, screen: Screen) -> int:
    from ldm_export.extras import needs

    with needs("export"):
        from ldm_export.quality.layerwise import compare_layers, first_beyond
        from ldm_export.quality.measures import TOLERANCES
        from ldm_export.quality.real_feeds import real_feeds
        from ldm_export.requests import requests_for
        from ldm_runtime.pipeline import LatentDiffusionPipeline
    bundle = Bundle.open(args.bundle)
    precision = args.precision or bundle.precision
    if precision == "fp32":
        raise SpecError("--layers: got fp32, which is the reference; give --precision fp16, bf16 or int8")
    threshold = TOLERANCES[precision].component if args.tolerance is None else args.tolerance
    with LatentDiffusionPipeline.from_bundle(
        bundle, backend="onnxruntime", device="cpu", precision="fp32", keep_loaded=False
    ) as pipeline:
        requests = requests_for(bundle.manifest.model, chosen_prompts(args.prompts, bundle))
        feeds = real_feeds(pipeline, bundle.file, requests[:1]).components
    components: dict[str, dict[str, Any]] = {}
    beyond = False
    with screen.bar("comparing", len(feeds)) as bar:
        for done, (name, feed) in enumerate(feeds.items()):
            bar.to(done, len(feeds), name)
            row = {
                tensor: array[-1:] for tensor, array in feed.items()
            }  # one row: all tensors of a call stay in memory
            layers = compare_layers(bundle.graph(name, precision), bundle.graph(name, "fp32"), row)
            first, worst = first_beyond(layers, threshold), max(layers, key=lambda layer: layer.error)
            beyond = beyond or first is not None
            components[name] = {"tensors": len(layers), "first_beyond": first, "worst": worst}
    if args.json:
        screen.json({"precision": precision, "threshold": threshold, "components": _plain(components)})
        return int(beyond)
    rows = []
    for name, facts in components.items():
        for what in ("first_beyond", "worst"):
            if layer := facts[what]:
                figures = [f"{layer.error:.2e}", f"{layer.largest:.4g}"]
                rows.append([f"{name}, {what.replace('_', ' ')}", layer.tensor, *figures])
    screen.table(f"{precision} against fp32, threshold {threshold:g}", ["", "tensor", "error", "largest"], rows)
    for name, facts in components.items():
        if first := facts["first_beyond"]:
            screen.result(f"{name}: differs first at {first.tensor}, computed by {first.node} in {first.dtype}")
        else:
            screen.result(f"{name}: all {facts['tensors']} tensors are within {threshold:g} of their largest value")
    return int(beyond)


def _plain(components: dict[str, Any]) -> dict[str, Any]:
    """Return JSON values, with None for infinite errors."""

    def plain(layer: Any) -> Any:
        return {**asdict(layer), "error": layer.error if math.isfinite(layer.error) else None} if layer else None

    return {
        name: {"tensors": facts["tensors"], **{key: plain(facts[key]) for key in ("first_beyond", "worst")}}
        for name, facts in components.items()
    }


def _figures(result: ComponentResult) -> list[str]:
    return [f"{result.max_error:.2e}", f"{result.cosine:.7f}", _decibel(result.psnr)]


def _decibel(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"
