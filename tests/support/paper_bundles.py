"""Bundles of the small checkpoints in ``paper_rows``, built once per test run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm_export.bundle.build import build
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.originals import open_original
from ldm_runtime.bundle import Bundle
from tests.support.paper_models import Row
from tests.support.paper_rows import CATEGORIES, make_row, vocabulary
from tests.support.shared import SharedFolders

__all__ = ["BUILT", "PaperBundle", "paper_bundle"]

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
