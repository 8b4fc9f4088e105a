"""``ldm-export generate``: generate images from a bundle, without torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_export.screen import Screen
from ldm_export.verbs.budget_options import settled_request
from ldm_export.verbs.image_options import (
    add_request,
    check_output,
    grid_columns,
    opened_images,
    read_layouts,
    write_images,
)
from ldm_export.verbs.lora_option import lora_fields
from ldm_export.verbs.options import PRECISIONS, whole_number
from ldm_export.verbs.prompt_options import prompt_fields
from ldm_export.verbs.xl_options import xl_fields
from ldm_runtime.backends.registry import BACKEND_NAMES

if TYPE_CHECKING:
    from ldm_runtime.request import Request

__all__ = ["add_arguments", "run"]


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    verb.add_argument("bundle", type=Path)
    add_request(verb)
    verb.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="precision of the graphs; fp32 is exact (default: the bundle's, or bf16 arithmetic if it is faster)",
    )
    verb.add_argument(
        "--backend", choices=BACKEND_NAMES, default="auto", help="engine (default: the fastest on this machine)"
    )
    verb.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to run on (default auto)"
    )
    verb.add_argument("--threads", type=whole_number, help="CPU threads (default: all cores)")
    verb.add_argument(
        "--no-safety-checker", action="store_true", help="do not check images with the bundle's safety checker"
    )
    verb.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="cache of OpenVINO's compiled models, for faster starts"
    )


def run(args: argparse.Namespace, screen: Screen) -> None:
    """Run the command."""
    from ldm_runtime.bundle import Bundle
    from ldm_runtime.pipeline import LatentDiffusionPipeline
    from ldm_runtime.request import fresh_seed

    check_output(args.output)
    bundle = Bundle.open(args.bundle)
    seed = fresh_seed() if args.seed is None else args.seed
    request, setting = settled_request(_request(args, seed), bundle, args.precision, screen)
    with screen.bar("loading"):
        loaded = LatentDiffusionPipeline.from_bundle(
            bundle,
            precision=args.precision if setting is None else setting.setting.precision,
            backend=args.backend,
            device=args.device,
            threads=args.threads,
            cache=args.cache,
            keep_loaded=False,
            safety_checker=not args.no_safety_checker,
        )
    with loaded as pipeline:
        steps = pipeline.steps(request)
        with screen.bar("denoising") as bar:
            for step in steps:
                bar.to(step.index + 1, step.total)
            generated = pipeline.generation(step.latents, request)
    if generated.flagged is not None and any(generated.flagged):
        count = f"{sum(generated.flagged)} of {len(generated.flagged)}"
        screen.note(f"safety checker: flagged {count} images, which are black; try another prompt or seed")
    image_files = write_images(args.output, generated.images, grid_columns(args.images_per_prompt), args.each)
    choice = loaded.choice
    assert choice is not None  # from_bundle sets it
    facts = {"seed": seed, "choice": choice.facts(), **({} if setting is None else {"setting": setting.facts()})}
    flagged = {} if generated.flagged is None else {"flagged": list(generated.flagged)}
    image_files.show(screen, {**facts, **flagged}, f"seed {seed}; {choice}", args.json)


def _request(args: argparse.Namespace, seed: int) -> Request:
    from ldm_runtime.guidance import FULL_INTERVAL
    from ldm_runtime.request import Request

    return Request(
        args.prompts or None,
        labels=args.label,
        image=opened_images(args.image),
        mask=opened_images(args.mask),
        strength=args.strength,
        padding_mask_crop=args.padding_mask_crop,
        mask_blur=args.mask_blur,
        segmentation=opened_images(args.segmentation),
        layout=read_layouts(args.layout),
        count=args.count,
        seed=seed,
        eta=args.eta,
        guidance_scale=args.guidance,
        num_inference_steps=args.steps,
        height=args.height,
        width=args.width,
        images_per_prompt=args.images_per_prompt,
        guidance_interval=FULL_INTERVAL if args.guidance_interval is None else tuple(args.guidance_interval),
        scheduler=args.scheduler,
        guidance_every=1 if args.guidance_every is None else args.guidance_every,
        cache_every=1 if args.cache_every is None else args.cache_every,
        full_steps=args.full_steps,
        budget=args.budget,
        guidance_rescale=0.0 if args.guidance_rescale is None else args.guidance_rescale,
        **prompt_fields(args),
        **xl_fields(args),
        **lora_fields(args),
    )
