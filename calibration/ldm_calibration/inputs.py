"""Reads calibration requests from a folder of inputs: images, masks, segmentations, layouts or labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_runtime.errors import SpecError
from ldm_runtime.input_images import open_image
from ldm_runtime.regular_files import read_regular

__all__ = ["INPUTS", "InputFile", "json_fields", "loaded", "read_inputs"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
MASK = "_mask"
"""Suffix of the name of a mask: that of photo.jpg is photo_mask.png, as in the authors' inpainting script."""
MAX_TEXT, MAX_IMAGE = 2**20, 2**28
INPUTS = {
    "image": "images",
    "masked_image": "images, and the mask of NAME.jpg in NAME_mask.png",
    "segmentation": "images of class numbers",
    "layout": "JSON files, each a list of [category, [x, y, width, height]]",
    "label": "labels.txt with one class number per line",
}
"""Kind of conditioning -> description of the files in a folder of inputs."""


@dataclass(frozen=True)
class InputFile:
    """An image file of a request, which is read on use; ``sha256`` identifies its content."""

    path: Path
    sha256: str

    @classmethod
    def of(cls, path: Path) -> InputFile:
        """Check that the file is an image, and compute its digest.

        Raises:
            SpecError: It cannot be read, or is not an image.
        """
        open_image(path)
        return cls(path, hashlib.sha256(read_regular(path, MAX_IMAGE, SpecError)).hexdigest())


def loaded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request with images instead of image files.

    Raises:
        SpecError: A file can no longer be read.
    """
    return {name: open_image(value.path) if isinstance(value, InputFile) else value for name, value in fields.items()}


def json_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request as JSON values. A file is described by name and digest, without its folder."""
    return {
        name: {"file": value.path.name, "sha256": value.sha256} if isinstance(value, InputFile) else value
        for name, value in fields.items()
    }


def read_inputs(folder: Path, kind: str) -> tuple[dict[str, Any], ...]:
    """Return a request for each input in a folder, in the order of file names.

    Args:
        folder: The folder.
        kind: Kind of the model's conditioning, a key of ``INPUTS``.

    Raises:
        SpecError: The folder or a file cannot be used, or the folder has no inputs of this kind.
    """
    if not folder.is_dir():
        raise SpecError(f"{folder}: no such folder, expected {INPUTS[kind]}")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    requests: list[dict[str, Any]] = []
    if kind == "label":
        requests = _labels(folder / "labels.txt")
    elif kind == "layout":
        requests = [{"layout": _layout(path)} for path in files if path.suffix.lower() == ".json"]
    elif kind == "masked_image":
        masks = {path.stem: path for path in images if path.stem.endswith(MASK)}
        for path in images:
            if path.stem in masks:
                continue
            mask = masks.get(f"{path.stem}{MASK}")
            if mask is None:
                raise SpecError(f"{path}: has no mask, expected {path.stem}{MASK}.png beside it")
            requests.append({"image": InputFile.of(path), "mask": InputFile.of(mask)})
    else:
        requests = [{kind: InputFile.of(path)} for path in images]
    if not requests:
        raise SpecError(f"{folder}: got no inputs, expected {INPUTS[kind]}")
    return tuple(requests)


def _labels(file: Path) -> list[dict[str, Any]]:
    words = read_regular(file, MAX_TEXT, SpecError).decode(errors="replace").split()
    try:
        return [{"labels": int(word)} for word in words]
    except ValueError:
        raise SpecError(f"{file}: expected one class number per line") from None


def _layout(file: Path) -> Any:
    content = read_regular(file, MAX_TEXT, SpecError)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{file}: is not JSON ({error}), expected [[category, [x, y, width, height]], …]") from None
