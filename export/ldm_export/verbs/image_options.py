"""What `generate` and `client` share: the options of a request for pictures, and writing them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm_export.verbs.options import unwritten
from ldm_runtime.atomic_files import write_together
from ldm_runtime.errors import BuildError


def add_request(verb: argparse.ArgumentParser) -> None:
    """Options of what to draw and where to put it."""
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


def check_output(args: argparse.Namespace) -> None:
    """Refuse a place for no picture before any work is done.

    Raises:
        BuildError: ``-o`` is a folder.
    """
    if not args.output.name or args.output.is_dir():
        raise BuildError(f"{args.output}: is a folder, expected the name of a picture; choose another -o")


def write_pictures(args: argparse.Namespace, images: Sequence[Image.Image]) -> list[Path]:
    """Write the picture, or a grid of several and with ``--each`` every one too: all of them or none.

    Raises:
        BuildError: they cannot be written.
    """
    from ldm_runtime.images import grid, to_png

    pictures = {args.output: grid(images, args.images_per_prompt if args.images_per_prompt > 1 else None)}
    if args.each and len(images) > 1:
        stem, suffix = args.output.stem, args.output.suffix
        pictures |= {args.output.with_name(f"{stem}-{index}{suffix}"): image for index, image in enumerate(images)}
    try:
        write_together({path: to_png(picture) for path, picture in pictures.items()})
    except OSError as error:
        raise unwritten(args.output, error, "choose another -o") from None
    return list(pictures)
