"""Options shared by `generate` and `client`: the request, and the files to write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm_export.screen import Screen
from ldm_export.verbs.budget_options import add_budget
from ldm_export.verbs.lora_option import add_lora_option
from ldm_export.verbs.options import real_number, unwritten, whole_number
from ldm_export.verbs.prompt_options import add_prompt_options
from ldm_export.verbs.xl_options import add_xl_options
from ldm_runtime.atomic_files import destination, write_together
from ldm_runtime.errors import BuildError, SpecError
from ldm_runtime.regular_files import read_regular

__all__ = [
    "ImageFiles",
    "add_request",
    "check_output",
    "grid_columns",
    "opened_images",
    "read_layouts",
    "write_images",
]

MAX_LAYOUT = 2**20
"""Maximum size of a layout file in bytes."""


@dataclass(frozen=True)
class ImageFiles:
    """Written files, and those of them that existed before."""

    files: tuple[Path, ...]
    replaced: tuple[Path, ...]

    def show(self, screen: Screen, facts: Mapping[str, Any], note: str, json: bool) -> None:
        """Print the files: as JSON with further facts, or one per line after the note."""
        if json:
            names = {"files": self.files, "overwritten": self.replaced}
            screen.json({**{name: [str(path) for path in paths] for name, paths in names.items()}, **facts})
            return
        screen.note(note)
        for path in self.replaced:
            screen.note(f"overwrote {path}")
        for path in self.files:
            screen.result(str(path))


def add_request(verb: argparse.ArgumentParser) -> None:
    """Add the options of a request and of its output."""
    verb.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="text prompts; none for a model without text conditioning"
    )
    verb.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("out.png"),
        help="image to write, in the format of its suffix: .png, .jpg, .webp, .tif, .bmp (default out.png)",
    )
    verb.add_argument(
        "--each", action="store_true", help="write each of several images too, not only their grid: out-0.png, …"
    )
    verb.add_argument(
        "--seed", type=whole_number, help="the same seed gives the same images (default: random, printed)"
    )
    add_budget(verb)
    verb.add_argument(
        "--scheduler",
        metavar="NAME",
        help="another scheduler, by its class name in diffusers, e.g. UniPCMultistepScheduler; it takes the options "
        "that the model's checkpoint gives (default: the model's)",
    )
    verb.add_argument("--eta", type=real_number, help="noise added at each step, 0 for none (default: the model's)")
    verb.add_argument("--guidance", type=real_number, help="guidance scale, 1 for none (default: the model's)")
    verb.add_argument(
        "--guidance-interval",
        nargs=2,
        type=real_number,
        metavar=("START", "END"),
        help="start and end of guidance as shares of the steps; steps without guidance take half the time and change "
        "the image (default 0 1)",
    )
    verb.add_argument(
        "--guidance-every",
        type=whole_number,
        metavar="N",
        help="compute the guidance direction at every N-th step and reuse it at the others: 2 saves a quarter of the "
        "work, 3 a third, with nearly the same image (default 1, exact)",
    )
    verb.add_argument(
        "--cache-every",
        type=whole_number,
        metavar="N",
        help="compute the whole UNet at every N-th step and only its outer layers at the others: 3 halves the work, "
        "with nearly the same image; see docs/guides/feature-caching.md (default 1, exact)",
    )
    verb.add_argument(
        "--full-steps",
        type=whole_number,
        metavar="N",
        help="full steps at the start with --cache-every (default: a tenth of the steps)",
    )
    verb.add_argument(
        "--guidance-rescale",
        type=real_number,
        metavar="SHARE",
        help="rescale guided predictions by this share, against overexposed images, e.g. 0.7 (default 0)",
    )
    add_prompt_options(verb)
    add_xl_options(verb)
    add_lora_option(verb)
    verb.add_argument(
        "--width", type=whole_number, help="pixels, a multiple of the model's factor (default: the model's)"
    )
    verb.add_argument(
        "--height", type=whole_number, help="pixels, a multiple of the model's factor (default: the model's)"
    )
    verb.add_argument(
        "--images-per-prompt",
        type=whole_number,
        default=1,
        metavar="N",
        help="images per prompt, label or input (default 1)",
    )
    verb.add_argument(
        "--label", type=whole_number, nargs="+", metavar="N", help="classes, for a model conditioned on class labels"
    )
    verb.add_argument(
        "--image",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="images to start from: to change as a prompt says, to enlarge, or to repaint in part",
    )
    verb.add_argument(
        "--mask", type=Path, nargs="+", metavar="FILE", help="masks, white where an image is repainted, for inpainting"
    )
    verb.add_argument(
        "--strength",
        type=real_number,
        metavar="SHARE",
        help="share of the steps that run on the image, above 0 and at most 1; low values stay close to it, for image "
        "to image (default 0.8, with a mask 1; for Stable Diffusion XL 0.3 and 0.9999)",
    )
    verb.add_argument(
        "--padding-mask-crop",
        type=whole_number,
        metavar="PIXELS",
        help="generate only the part around the mask, extended by this many pixels on each side, at full size, and "
        "paste it into the image (default: generate the whole image)",
    )
    verb.add_argument(
        "--mask-blur",
        type=real_number,
        metavar="PIXELS",
        help="standard deviation of the Gaussian blur of the mask, 0 to 64; makes the edge soft with "
        "--padding-mask-crop (default: no blur)",
    )
    verb.add_argument(
        "--segmentation",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="images with the number of a class in each pixel, for semantic synthesis",
    )
    verb.add_argument(
        "--layout",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="JSON files, each a list of [category, [x, y, width, height]] in shares of the image, for layout to image",
    )
    verb.add_argument(
        "--count", type=whole_number, metavar="N", help="number of images of a model without prompts (default 1)"
    )


def check_output(output: Path) -> None:
    """Refuse an output path that cannot be an image file, before any work is done.

    Raises:
        BuildError: The path is a folder or special file, or its suffix is that of an unsupported format.
    """
    from ldm_runtime.images import FORMATS

    destination(output)
    if output.suffix.lower() not in FORMATS:
        raise BuildError(f"{output}: expected a name that ends in {', '.join(FORMATS)}; choose another -o")


def opened_images(files: Sequence[Path] | None) -> list[Image.Image] | None:
    """Read image files; None stays None.

    Raises:
        SpecError: A file is not an image, or is too large, animated or truncated; or the images have different sizes.
    """
    from ldm_runtime.input_images import open_image

    if files is None:
        return None
    images = [open_image(file) for file in files]
    if len({one.size for one in images}) != 1:
        raise SpecError(f"{files[0]}: got images of different sizes, expected one size; make several calls")
    return images


def read_layouts(files: Sequence[Path] | None) -> list[Any] | None:
    """Read a layout from each JSON file; None stays None.

    Raises:
        SpecError: A file cannot be read or is not JSON.
    """
    if files is None:
        return None
    layouts = []
    for file in files:
        content = read_regular(file, MAX_LAYOUT, SpecError)
        try:
            layouts.append(json.loads(content))
        except (ValueError, RecursionError) as error:
            raise SpecError(f"{file}: is not JSON ({error}), expected [[category, [x, y, width, height]], …]") from None
    return layouts


def grid_columns(images_per_prompt: int) -> int | None:
    """Columns of the grid: one row per prompt if each has several images; None for a square grid."""
    return images_per_prompt if images_per_prompt > 1 else None


def write_images(output: Path, images: Sequence[Image.Image], columns: int | None, each: bool = False) -> ImageFiles:
    """Write one image, or a grid of several images. Either all files are written or none.

    Args:
        output: File to write, in the format of its suffix.
        images: At least one image.
        columns: Columns of the grid; None for a square grid.
        each: Also write each of several images, as output-0.png, output-1.png, ….

    Returns:
        The files written, and those of them that existed before.

    Raises:
        BuildError: They cannot be written.
        SpecError: The format does not take an image of this size.
    """
    from ldm_runtime.images import grid, to_bytes

    files = {output: grid(images, columns)}
    if each and len(images) > 1:
        files |= {output.with_name(f"{output.stem}-{i}{output.suffix}"): image for i, image in enumerate(images)}
    try:
        replaced = tuple(path for path in files if path.exists())
        write_together({path: to_bytes(image, path.suffix) for path, image in files.items()})
    except OSError as error:
        raise unwritten(output, error, "choose another -o") from None
    return ImageFiles(tuple(files), replaced)
