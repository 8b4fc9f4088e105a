"""Puts samples and their results into one row: ``python -m ldm_export_demo.row SAMPLES RESULT... -o FILE``.

For each result the row shows the sample, its mask if it has one, the result, and the original if there is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm_export_demo.samples import ORIGINALS

__all__ = ["main", "row"]

SIDE, GAP, SPACE = 128, 4, 16
"""Pixels of a shown image along each side, between images of one sample, and between samples."""


def row(samples: Path, results: Sequence[Path]) -> Image.Image:
    """Make the row.

    Args:
        samples: One of the folders that ``samples`` writes.
        results: Image files; the first belongs to the sample 0.png.

    Raises:
        OSError: A file cannot be read.
    """
    groups = [_group(samples, index, result) for index, result in enumerate(results)]
    widths = [len(group) * (SIDE + GAP) - GAP for group in groups]
    sheet = Image.new("RGB", (sum(widths) + SPACE * (len(groups) - 1) + 2, SIDE + 2), "white")
    left = 1
    for group, width in zip(groups, widths, strict=True):
        for position, file in enumerate(group):
            with Image.open(file) as image:
                tile = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
            x = left + position * (SIDE + GAP)
            sheet.paste("silver", (x - 1, 0, x + SIDE + 1, SIDE + 2))  # a frame, since images can be white
            sheet.paste(tile, (x, 1))
        left += width + SPACE
    return sheet


def _group(samples: Path, index: int, result: Path) -> list[Path]:
    mask, original = samples / f"{index}_mask.png", samples / ORIGINALS / f"{index}.png"
    before = [samples / f"{index}.png", *([mask] if mask.exists() else [])]
    return [*before, result, *([original] if original.exists() else [])]


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    about = (__doc__ or "").partition(":")[0]
    parser = argparse.ArgumentParser(prog="python -m ldm_export_demo.row", description=about)
    parser.add_argument("samples", type=Path, metavar="SAMPLES", help="folder of samples of one model")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="results, in the order of the samples")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="image to write")
    args = parser.parse_args(arguments)
    try:
        row(args.samples, args.results).save(args.output)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{args.output}: cannot be made: {error}\n")
    print(args.output)


if __name__ == "__main__":
    main()
