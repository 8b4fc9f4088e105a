"""Options that `generate` and `client` share: what to generate, and where to write the images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm_export.verbs.options import unwritten
from ldm_runtime.atomic_files import write_together
from ldm_runtime.errors import BuildError, SpecError

__all__ = ["add_request", "check_output", "grid_columns", "pictures", "write_images"]


def add_request(verb: argparse.ArgumentParser) -> None:
    """Add the options of a request and of its output."""
    verb.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts to draw; none for a model without text")
    verb.add_argument("-o", "--output", type=Path, default=Path("out.png"), help="PNG to write (default out.png)")
    verb.add_argument("--each", action="store_true", help="beside a grid of several images, write each: out-0.png, …")
    verb.add_argument("--seed", type=int, help="the same seed gives the same images (default: random, printed)")
    verb.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    verb.add_argument("--eta", type=float, help="noise added at each step, 0 for none (default: the model's)")
    verb.add_argument("--guidance", type=float, help="guidance scale, 1 for none (default: the model's)")
    verb.add_argument(
        "--guidance-interval",
        nargs=2,
        type=float,
        metavar=("START", "END"),
        help="share of the steps that use guidance; the others take half the time and change the image (default 0 1)",
    )
    verb.add_argument(
        "--guidance-every",
        type=int,
        metavar="N",
        help="compute the guidance direction at every N-th step and reuse it between: 2 saves a quarter of the work, "
        "3 a third, with nearly the same image (default 1, exact)",
    )
    verb.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to steer away from")
    verb.add_argument("--width", type=int, help="pixels, a multiple of the model's factor (default: the model's)")
    verb.add_argument("--height", type=int, help="pixels, a multiple of the model's factor (default: the model's)")
    verb.add_argument(
        "--images-per-prompt", type=int, default=1, metavar="N", help="images of each prompt or label (default 1)"
    )
    verb.add_argument(
        "--label", type=int, nargs="+", metavar="N", help="classes to draw, for a model conditioned on class labels"
    )
    verb.add_argument(
        "--image",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="images to start from, for super-resolution and inpainting",
    )
    verb.add_argument(
        "--mask", type=Path, nargs="+", metavar="FILE", help="white where an image is repainted, for inpainting"
    )
    verb.add_argument("--count", type=int, metavar="N", help="images, for a model without prompts (default 1)")


def check_output(output: Path) -> None:
    """Refuse an output path that cannot be a file, before any work is done.

    Raises:
        BuildError: The path is a folder.
    """
    if not output.name or output.is_dir():
        raise BuildError(f"{output}: is a folder, expected the name of an image file; choose another -o")


def pictures(files: Sequence[Path] | None) -> list[Image.Image] | None:
    """Read image files; None stays None.

    Raises:
        SpecError: A file is no image, or too large to be one, or the images have different sizes.
    """
    if files is None:
        return None
    found = []
    for file in files:
        try:
            with Image.open(file) as opened:
                found.append(opened.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise SpecError(f"{file}: cannot be read as an image ({error}); give a PNG or JPEG") from None
    if len({one.size for one in found}) != 1:
        raise SpecError(f"{files[0]}: got images of different sizes, expected one size; make several calls")
    return found


def grid_columns(images_per_prompt: int) -> int | None:
    """Columns of the grid: one row per prompt if each has several images; None for a square grid."""
    return images_per_prompt if images_per_prompt > 1 else None


def write_images(output: Path, images: Sequence[Image.Image], columns: int | None, each: bool = False) -> list[Path]:
    """Write one image, or a grid of several; all files are written or none.

    Args:
        output: PNG file to write.
        images: At least one image.
        columns: Columns of the grid; None for a square grid.
        each: Also write each of several images, as output-0.png, output-1.png, ….

    Returns:
        The files written.

    Raises:
        BuildError: They cannot be written.
    """
    from ldm_runtime.images import grid, to_png

    files = {output: grid(images, columns)}
    if each and len(images) > 1:
        files |= {output.with_name(f"{output.stem}-{i}{output.suffix}"): image for i, image in enumerate(images)}
    try:
        write_together({path: to_png(image) for path, image in files.items()})
    except OSError as error:
        raise unwritten(output, error, "choose another -o") from None
    return list(files)
