"""What each verb does: calls the library, then shows or prints what came of it."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_export.screen import Screen, human_bytes
from ldm_runtime.bundle import Bundle, write_together
from ldm_runtime.errors import BuildError, SpecError

if TYPE_CHECKING:
    from ldm_export.engine_build import EngineRequest

MAX_THREADS = 1024


def build(args: argparse.Namespace, screen: Screen) -> None:
    """``ldm-export build``."""
    from ldm_export.extras import needs

    with needs("export"):
        from ldm_export import build as building
        from ldm_export.checkpoint import open_checkpoint
    _quieten(args.verbose)
    begun = time.monotonic()
    engines = _engines(args)
    checkpoint = open_checkpoint(args.checkpoint or building.SHIPPED, random_weights=args.random_weights)
    with screen.bar("reading", None) as bar:
        built = building.build(
            checkpoint, args.output, args.precision, engines, lambda stage, done, total: bar.to(done, total, stage)
        )
    size = sum(fact.size for fact in built.bundle.manifest.files.values())
    made = [name for name, origin in built.origins.items() if origin == "made"]
    if args.json:
        result = {"bundle": str(args.output), "bytes": size, "made": made, "seconds": time.monotonic() - begun}
        screen.json(result)
        return
    what = f"made {', '.join(made)}" if made else "nothing to do, all of it is there"
    screen.note(f"{what}; {time.monotonic() - begun:.0f} s")
    screen.result(f"{args.output}: {human_bytes(size)}, {len(built.bundle.manifest.files)} files")


def _engines(args: argparse.Namespace) -> EngineRequest | None:
    from ldm_export.engine_build import EngineRequest
    from ldm_export.engine_profiles import parse_bounds

    given = {name: getattr(args, name) for name in ("batch", "height", "width")}
    bounds = tuple((name, parse_bounds(name, text)) for name, text in given.items() if text is not None)
    capabilities = tuple(dict.fromkeys((args.compute_capability or "").replace(" ", "").split(",")))
    if args.target is None:
        if bounds or capabilities != ("",):
            raise BuildError("batch, height, width and compute capability are an engine's; give --target too")
        return None
    return EngineRequest(args.target, tuple(filter(None, capabilities)), bounds)


def generate(args: argparse.Namespace, screen: Screen) -> None:
    """``ldm-export generate``."""
    from ldm_runtime.images import grid, to_png
    from ldm_runtime.pipeline import LatentDiffusionPipeline
    from ldm_runtime.request import Request, fresh_seed

    if not args.output.name or args.output.is_dir():
        raise BuildError(f"{args.output}: is a folder, expected the name of a picture; choose another -o")
    if args.threads is not None and not 1 <= args.threads <= MAX_THREADS:
        raise SpecError(f"threads: got {args.threads}, expected 1..{MAX_THREADS}; leave it out for all cores")
    seed = fresh_seed() if args.seed is None else args.seed
    with screen.bar("loading"):
        loaded = LatentDiffusionPipeline.from_bundle(
            args.bundle,
            precision=args.precision,
            backend=args.backend,
            device=args.device,
            threads=args.threads,
        )
    with loaded as pipeline:
        request = Request(
            args.prompts,
            negative_prompt=args.negative_prompt,
            seed=seed,
            eta=args.eta,
            guidance_scale=args.guidance,
            num_inference_steps=args.steps,
            height=args.height,
            width=args.width,
            images_per_prompt=args.images_per_prompt,
        )
        with screen.bar("denoising") as bar:
            for step in pipeline.steps(request):
                bar.to(step.index + 1, step.total)
            images = pipeline.decode(step.latents)
    pictures = {args.output: grid(images, args.images_per_prompt if args.images_per_prompt > 1 else None)}
    if args.each and len(images) > 1:
        stem, suffix = args.output.stem, args.output.suffix
        pictures |= {args.output.with_name(f"{stem}-{index}{suffix}"): image for index, image in enumerate(images)}
    try:
        write_together({path: to_png(picture) for path, picture in pictures.items()})
    except OSError as error:
        raise _unwritten(args.output, error, "choose another -o") from None
    if args.json:
        screen.json({"files": [str(path) for path in pictures], "seed": seed})
        return
    screen.note(f"seed {seed}")
    for path in pictures:
        screen.result(str(path))


def verify(args: argparse.Namespace, screen: Screen) -> int:
    """``ldm-export verify``: 1 where a figure is beyond its tolerance."""
    from ldm_export.extras import needs

    with needs("export"):
        from ldm_export.build import SHIPPED
        from ldm_export.checkpoint import open_checkpoint
        from ldm_export.page import page
        from ldm_export.prompts import PROMPTS
        from ldm_export.verification import TOLERANCES, verify
    _quieten(args.verbose)
    prompts = _lines(args.prompts) if args.prompts else PROMPTS
    bundle = Bundle.open(args.bundle)
    checkpoint = open_checkpoint(args.against or SHIPPED, random_weights=args.random_weights)
    precision = args.precision or bundle.precision
    given = {"component": args.tolerance, "pixel": args.max_pixel, "psnr": args.min_psnr}
    for name, value in given.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise SpecError(f"tolerance of {name}: got {value}, expected a finite number >= 0")
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
        raise _unwritten(args.bundle, error, "free some disk space or verify a copy") from None
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


def inspect(args: argparse.Namespace, screen: Screen) -> None:
    """``ldm-export inspect``."""
    from ldm_export.inspection import inspect_bundle

    bundle = Bundle.open(args.bundle)
    if args.check:
        with screen.bar("checking", len(bundle.manifest.files)) as bar:
            names = list(bundle.manifest.files)
            bundle.check(lambda name: bar.to(names.index(name), what=name))
    facts = inspect_bundle(bundle)
    if args.json:
        screen.json(facts)
        return
    for name, component in facts["components"].items():
        rows = [[direction, text] for direction in ("inputs", "outputs") for text in component[direction]]
        for precision, graph in component["graphs"].items():
            rows.append([precision, f"{graph['file']}, {human_bytes(graph['bytes'])}"])
            if graph.get("operators"):
                most = sorted(graph["operators"].items(), key=lambda item: -item[1])[:8]
                rows.append(["operators", ", ".join(f"{count} {kind}" for kind, count in most)])
            if graph.get("islands"):
                half, *kept = graph["islands"].items()
                reasons = ", ".join(f"{count} {reason}" for reason, count in kept)
                rows.append(["arithmetic", f"{half[1]} nodes in {precision}, in fp32: {reasons}"])
        screen.table(name, ["", ""], rows)
    screen.table("asked", ["", ""], _flat(facts["asked"]))
    screen.table("tools", ["", ""], _flat(facts["tools"]))
    screen.table("measured", ["", ""], _flat(facts["measured"]) or [["nothing yet", "run `ldm-export verify`"]])


def _flat(facts: Any, prefix: str = "") -> list[list[str]]:
    if isinstance(facts, dict):
        return [row for key, value in facts.items() for row in _flat(value, f"{prefix}.{key}" if prefix else key)]
    if isinstance(facts, list):
        return [row for index, value in enumerate(facts) for row in _flat(value, f"{prefix}[{index}]")]
    return [[prefix, f"{facts:.6g}" if isinstance(facts, float) else str(facts)]]


def _decibel(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read as a text file of prompts ({error})") from None
    if not any(lines):
        raise SpecError(f"{path}: got no prompts, expected one a line")
    return [line for line in lines if line]


def _unwritten(path: Path, error: OSError, advice: str) -> BuildError:
    what = f"{error.filename} is no folder" if isinstance(error, FileExistsError) else error.strerror or error
    return BuildError(f"{path}: cannot be written ({what}); {advice}")


def _quieten(verbose: bool) -> None:
    """Keep off the screen what these libraries print by log handlers of their own."""
    import diffusers
    import transformers

    if not verbose:
        diffusers.utils.logging.set_verbosity_error()
        transformers.utils.logging.set_verbosity_error()
