"""``ldm-export generate``: make pictures from a bundle; needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_export.screen import Screen
from ldm_export.verbs.image_options import add_request, check_output, write_pictures
from ldm_export.verbs.options import PRECISIONS
from ldm_runtime.backends.selection import BACKENDS
from ldm_runtime.errors import SpecError

MAX_THREADS = 1024


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """The verb's options."""
    verb.add_argument("bundle", type=Path)
    add_request(verb)
    verb.add_argument(
        "--guidance-interval",
        nargs=2,
        type=float,
        default=(0.0, 1.0),
        metavar=("START", "END"),
        help="shares of the steps that are guided; the others take half the time and change the picture (default 0 1)",
    )
    verb.add_argument(
        "--guidance-every",
        type=int,
        default=1,
        metavar="STEPS",
        help="compute the direction of guidance each so many steps and hold it between: with 2 three quarters of the "
        "work, with 3 two thirds, and nearly the same picture (default 1, exact)",
    )
    verb.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="fp32 is exact (default: the bundle's, or bf16 where it is faster; told)",
    )
    verb.add_argument("--backend", choices=BACKENDS, default="auto", help="what runs it (default: the fastest here)")
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default auto)")
    verb.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    verb.add_argument("--cache", type=Path, metavar="FOLDER", help="keep what OpenVINO compiles, to start sooner")


def run(args: argparse.Namespace, screen: Screen) -> None:
    """``ldm-export generate``."""
    from ldm_runtime.pipeline import LatentDiffusionPipeline
    from ldm_runtime.request import Request, fresh_seed

    check_output(args)
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
            cache=args.cache,
            keep_loaded=False,
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
            for step in pipeline.steps(request, tuple(args.guidance_interval), args.guidance_every):
                bar.to(step.index + 1, step.total)
            images = pipeline.decode(step.latents)
    written = write_pictures(args, images)
    if args.json:
        choice = None if loaded.choice is None else loaded.choice.facts()
        screen.json({"files": [str(path) for path in written], "seed": seed, "choice": choice})
        return
    screen.note(f"seed {seed}; {loaded.choice}")
    for path in written:
        screen.result(str(path))
