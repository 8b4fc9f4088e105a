"""``ldm-export generate``: make pictures from a bundle; needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_export.screen import Screen
from ldm_export.verbs.options import PRECISIONS, unwritten
from ldm_runtime.backends.choice import BACKENDS
from ldm_runtime.bundle import write_together
from ldm_runtime.errors import BuildError, SpecError

MAX_THREADS = 1024


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """The verb's options."""
    verb.add_argument("bundle", type=Path)
    verb.add_argument("prompts", nargs="+", metavar="PROMPT")
    verb.add_argument("-o", "--output", type=Path, default=Path("out.png"), help="PNG to write (default out.png)")
    verb.add_argument("--each", action="store_true", help="beside a grid of several pictures, write each: out-0.png, …")
    verb.add_argument("--seed", type=int, help="the same seed gives the same pictures (default: a fresh one, told)")
    verb.add_argument("--steps", type=int, default=50, help="denoising steps (default 50)")
    verb.add_argument("--eta", type=float, default=0.3, help="noise of each step, 0 for none (default 0.3)")
    verb.add_argument("--guidance", type=float, default=6.0, help="guidance scale, 1 for none (default 6)")
    verb.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to steer away from")
    verb.add_argument("--width", type=int, help="pixels, a multiple of 8 (default: the model's)")
    verb.add_argument("--height", type=int, help="pixels, a multiple of 8 (default: the model's)")
    verb.add_argument(
        "--images-per-prompt", type=int, default=1, metavar="N", help="pictures of each prompt (default 1)"
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
        raise unwritten(args.output, error, "choose another -o") from None
    if args.json:
        screen.json({"files": [str(path) for path in pictures], "seed": seed, "choice": loaded.choice.facts()})
        return
    screen.note(f"seed {seed}; {loaded.choice}")
    for path in pictures:
        screen.result(str(path))
