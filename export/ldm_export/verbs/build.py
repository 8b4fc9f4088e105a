"""``ldm-export build``: export a checkpoint into a bundle."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_export.demo import TASKS
from ldm_export.screen import Screen, human_bytes
from ldm_export.verbs.int8_options import add_int8_arguments, given_options, inputs_of, settings_of, show
from ldm_export.verbs.options import PRECISIONS, chosen_prompts, number_or_auto, quieten, unwritten
from ldm_export.verbs.original_options import add_embedding_argument, add_original_arguments, open_given
from ldm_runtime.backends.engine_match import PACKAGES
from ldm_runtime.bundle_layout import CUDA_VARIANT
from ldm_runtime.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ldm_export.demo import Model
    from ldm_export.engine.request import EngineRequest
    from ldm_export.families import Family
    from ldm_export.requests import RequestFields

__all__ = ["add_arguments", "run"]

HALF = ("fp16", "bf16")
AXES = {"batch": "images", "height": "pixels", "width": "pixels", "chunks": "chunks of a long prompt (--prompt-chunks)"}
"""Axis of an engine with bounds on the command line -> its unit."""
RANGED = 16
"""Maximum number of requests with which the ranges for half precision are measured."""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options."""
    verb.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        help="diffusers folder or original checkpoint file (default: the demo model)",
    )
    verb.add_argument(
        "--demo",
        choices=TASKS,
        metavar="TASK",
        help=f"build the demo model of this task instead of a checkpoint: {', '.join(TASKS)} (default {TASKS[0]})",
    )
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="bundle folder to write")
    verb.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="precision of weights and arithmetic (default fp32)"
    )
    verb.add_argument(
        "--feature-cache",
        type=number_or_auto,
        default=1,
        metavar="LAYERS",
        help="layers of the UNet's last up block that a step with cached features computes (--cache-every); 0 writes "
        "no graphs for such steps; auto takes what `bench --quality --split-levels --save` has stored in the bundle "
        "that is written again (default 1)",
    )
    add_original_arguments(verb)
    add_embedding_argument(verb)
    verb.add_argument(
        "--no-safety-checker",
        action="store_true",
        help="leave out the checkpoint's safety checker, so that no image is checked",
    )
    engines = verb.add_argument_group("engines")
    engines.add_argument(
        "--target",
        choices=(*PACKAGES, CUDA_VARIANT),
        help=f"also build TensorRT engines for this package, or fp16 graphs for ONNX Runtime on CUDA ({CUDA_VARIANT})",
    )
    engines.add_argument(
        "--compute-capability",
        metavar="LIST",
        help="compute capabilities of the GPUs to build for, e.g. 8.6,8.9 (tensorrt-rtx)",
    )
    for name, unit in AXES.items():
        engines.add_argument(
            f"--{name}", metavar="MIN:OPT:MAX", help=f"{unit} of one call: minimum, optimum and maximum"
        )
    engines.add_argument(
        "--refittable",
        action="store_true",
        help="build engines whose weights can be replaced without rebuilding (needs a GPU)",
    )
    engines.add_argument(
        "--version-compatible",
        action="store_true",
        help="build plans that later versions and the lean runtime run too (tensorrt; none has been run yet)",
    )
    engines.add_argument(
        "--timing-cache",
        metavar="FILE",
        help="timing cache: a file of kernel timings that later builds reuse (tensorrt)",
    )
    add_int8_arguments(verb)
    verb.add_argument(
        "--random-weights",
        action="store_true",
        help="use random weights, so that a folder of configs is enough, e.g. to measure memory",
    )


def run(args: argparse.Namespace, screen: Screen) -> None:
    """Run ``ldm-export build``.

    Raises:
        LdmError: The checkpoint, an option or the output folder cannot be used.
    """
    from ldm_export.extras import needs

    with needs("export"):
        from ldm_export.bundle.build import BuildOptions, build
        from ldm_export.bundle.int8_report import write_report
        from ldm_export.demo import demo_grader
        from ldm_export.families import family_named
    quieten(args.verbose)
    begun = time.monotonic()
    engines = _engines(args)
    _check_int8_options(args)
    if args.demo and args.checkpoint:
        raise BuildError(f"--demo: got {args.demo} beside the checkpoint {args.checkpoint}; give one of them")
    checkpoint = open_given(args.checkpoint, args, args.demo)
    family = family_named(checkpoint.family)
    conditioning = family.describe(checkpoint).conditioning
    kinds = [entry.kind for entry in conditioning]
    classes = max((entry.settings.get("classes", 0) for entry in conditioning), default=0)
    model = None if args.random_weights else checkpoint.folder
    options = BuildOptions(
        args.precision,
        engines,
        settings_of(args, kinds, model, classes) if args.precision == "int8" else None,
        demo_grader(model),
        requests=_ranged(args, family, kinds, model) if args.precision in HALF else None,
        cuda=args.target == CUDA_VARIANT,
        feature_cache=args.feature_cache,
    )
    with screen.bar("reading", None) as bar:
        built = build(
            checkpoint,
            args.output,
            options=options,
            on_progress=lambda stage, done, total: bar.to(done, total, stage),
        )
        if args.precision == "int8":
            bar.to(0, 1, "report")
            try:
                bundle, report = write_report(built.bundle)
            except OSError as error:
                raise unwritten(args.output, error, "free some disk space") from None
            built = replace(built, bundle=bundle)
    size = sum(fact.size for fact in built.bundle.manifest.files.values())
    new = [name for name, origin in built.origins.items() if origin == "made"]
    if args.json:
        result = {"bundle": str(args.output), "bytes": size, "made": new, "seconds": time.monotonic() - begun}
        screen.json(result)
        return
    what = f"made {', '.join(new)}" if new else "nothing to do, the bundle is complete"
    screen.note(f"{what}; {time.monotonic() - begun:.0f} s")
    if args.precision == "int8":
        show(report, screen)
    screen.result(f"{args.output}: {human_bytes(size)}, {len(built.bundle.manifest.files)} files")


def _ranged(args: argparse.Namespace, family: Family, kinds: Sequence[str], model: Model) -> Sequence[RequestFields]:
    """Return the requests with which the ranges for half precision are measured."""
    if args.inputs is not None:
        return inputs_of(args.inputs, kinds)[:RANGED]
    return family.requests(chosen_prompts(args.prompts, model))[:RANGED]


def _check_int8_options(args: argparse.Namespace) -> None:
    """Check that options of int8 are not given with another precision; --prompts also applies to half precision."""
    if args.precision == "int8":
        return
    shared = ("--prompts", "--inputs")
    foreign = [option for option in given_options(args) if option not in shared or args.precision not in HALF]
    if foreign:
        fitting = f"{', '.join(HALF)} or int8" if set(foreign) <= set(shared) else "int8"
        raise BuildError(f"{', '.join(foreign)}: of {fitting}; give --precision {fitting} too")


def _engines(args: argparse.Namespace) -> EngineRequest | None:
    from ldm_export.engine.profiles import parse_bounds
    from ldm_export.engine.request import EngineRequest

    texts = {name: getattr(args, name) for name in AXES}
    bounds = tuple((name, parse_bounds(name, text)) for name, text in texts.items() if text is not None)
    capabilities = tuple(dict.fromkeys((args.compute_capability or "").replace(" ", "").split(",")))
    if args.target in (None, CUDA_VARIANT):
        if bounds or capabilities != ("",) or args.refittable or args.version_compatible or args.timing_cache:
            raise BuildError(
                "batch, height, width, chunks, compute capability, refittable, version-compatible and timing cache "
                f"apply to engines only; add --target {' or '.join(PACKAGES)}"
            )
        return None
    return EngineRequest(
        args.target,
        tuple(filter(None, capabilities)),
        bounds,
        refittable=args.refittable,
        version_compatible=args.version_compatible,
        timings=args.timing_cache,
    )
