"""Bundles of the small checkpoints in ``paper_rows``, built once per test run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_export.bundle.build import build
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.originals import open_original
from ldm_runtime.bundle import Bundle
from tests.support.paper_models import Row
from tests.support.paper_rows import CATEGORIES, make_row, vocabulary
from tests.support.shared import SharedFolders

__all__ = ["BUILT", "PaperBundle", "files_of", "paper_bundle"]

BUILT = ("cin256-v2", "bsr_sr", "inpainting_big", "semantic_synthesis", "layout2img")
"""One model of each family that only these tests build."""


@dataclass(frozen=True)
class PaperBundle:
    """A row, and a read-only folder with its checkpoint, its yaml and its fp32 bundle."""

    row: Row
    folder: Path

    @property
    def bundle(self) -> Bundle:
        """The bundle."""
        return Bundle.open(self.folder / "bundle")

    def checkpoint(self) -> Checkpoint:
        """The checkpoint, opened."""
        return _opened(self.row.name, self.folder)


def paper_bundle(shared: SharedFolders, name: str) -> PaperBundle:
    """The bundle of a row; read-only."""
    row = make_row(name)

    def make(folder: Path) -> None:
        row.checkpoint.save(folder)
        if name == "layout2img":
            (folder / "categories.txt").write_text("\n".join(CATEGORIES) + "\n")
        build(_opened(name, folder), folder / "bundle")

    return PaperBundle(row, shared.once(f"paper-{name}", make))


def _opened(name: str, folder: Path) -> Checkpoint:
    categories = folder / "categories.txt"
    return open_original(
        folder / "model.ckpt",
        folder / "model.yaml",
        vocabulary(name, folder),
        categories=categories if categories.exists() else None,
    )


def files_of(row: Row, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Options of ``generate`` and ``client`` with files in ``folder``, and the same fields of a request."""

    def image(name: str, array: Any) -> Path:
        Image.fromarray(array).save(folder / f"{name}.png")
        return folder / f"{name}.png"

    if row.name == "cin256-v2":
        return ["--label", "7"], {"labels": [7]}
    if row.name == "layout2img":
        layout = [["Cat", [0.1, 0.2, 0.5, 0.25]], [2, [0, 0, 1, 1]]]
        (folder / "boxes.json").write_text(json.dumps(layout))
        return ["--layout", str(folder / "boxes.json")], {"layout": layout}
    if row.name == "semantic_synthesis":
        classes = row.options["segmentation"][0]
        return ["--segmentation", str(image("classes", classes))], {"segmentation": classes}
    picture = np.rint(row.options["image"][0].transpose(1, 2, 0) * 255).astype(np.uint8)
    options, fields = ["--image", str(image("picture", picture))], {"image": picture}
    if row.name == "inpainting_big":
        mask = np.rint(row.options["mask"][0, 0] * 255).astype(np.uint8)
        return [*options, "--mask", str(image("mask", mask))], {**fields, "mask": mask[..., None]}
    return options, fields
