"""Writes inputs for the super-resolution and the inpainting model: ``python -m ldm_export_demo.samples FOLDER``.

FOLDER/super-resolution gets small images, and their large originals in a folder of their own. FOLDER/inpainting gets
images, NAME.png, and masks of about half of an object, NAME_mask.png. The images are of held-out sentences. Both
folders can be given to ``ldm-export build --precision int8 --inputs``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from ldm_export_demo.inputs import low_resolution, masked_trials, trial_images

__all__ = ["main", "write_samples"]

ORIGINALS = "originals"


def write_samples(folder: Path, count: int) -> list[Path]:
    """Write ``count`` inputs for each of the two models and return their files, without masks and originals.

    Args:
        folder: It is made if it does not exist; files of the same names are replaced.
        count: At least 1.

    Raises:
        OSError: A file cannot be written.
        ValueError: More samples are requested than sentences are held out.
    """
    small, masked = folder / "super-resolution", folder / "inpainting"
    for place in (small / ORIGINALS, masked):
        place.mkdir(parents=True, exist_ok=True)
    files = []
    for index, image in enumerate(trial_images(count)):
        name = f"{index}.png"
        Image.fromarray(low_resolution(image)).save(small / name)
        Image.fromarray(image).save(small / ORIGINALS / name)
        files.append(small / name)
    for index, given in enumerate(masked_trials(count, ("part",))):
        Image.fromarray(given.image).save(masked / f"{index}.png")
        Image.fromarray(given.mask).save(masked / f"{index}_mask.png")
        files.append(masked / f"{index}.png")
    return files


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m ldm_export_demo.samples", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write to")
    parser.add_argument("--count", type=int, default=2, metavar="N", help="samples for each model (default 2)")
    args = parser.parse_args(arguments)
    if args.count < 1:
        parser.error(f"--count: got {args.count}, expected at least 1")
    try:
        files = write_samples(args.folder, args.count)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{args.folder}: cannot be written: {error}\n")
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    main()
