"""A small checkpoint of each published model is recognised, and gives the image of the authors' equations.

The pipeline runs the torch modules that a build traces; ``test_paper_bundles`` runs the built graphs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_export.originals import open_original
from ldm_export.originals.published import PUBLISHED
from tests.support.paper_models import assert_equal
from tests.support.paper_rows import ROWS, make_row, vocabulary
from tests.support.torch_pipeline import torch_pipeline

LEGACY = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize("name", ROWS)
def test_images_are_those_of_the_equations(name: str, tmp_path: Path) -> None:
    row = make_row(name)
    file = row.checkpoint.save(tmp_path)
    checkpoint = open_original(file, tmp_path / "model.yaml", vocabulary(name, tmp_path))
    assert checkpoint.family == next(one.kind for one in PUBLISHED if one.name == name)
    with torch_pipeline(checkpoint, tmp_path / "files") as pipeline:
        assert_equal(pipeline, row)


@pytest.mark.parametrize("form", ["legacy", "half", "gpu"])
def test_other_forms_of_files(form: str, tmp_path: Path) -> None:
    row = make_row("bsr_sr")
    if form == "half":
        for module in row.checkpoint.modules.values():
            for tensor in module.state_dict().values():  # the state dict shares these tensors
                tensor.copy_(tensor.half())
        row.checkpoint.state = {name: tensor.half() for name, tensor in row.checkpoint.state.items()}
    file = row.checkpoint.save(tmp_path, **({} if form == "half" else LEGACY))
    if form == "gpu":
        content = file.read_bytes()
        file.write_bytes(content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:1"))
        assert file.read_bytes().count(b"cuda:1") == 1  # the pickle refers to it for every tensor
    with torch_pipeline(open_original(file, tmp_path / "model.yaml"), tmp_path / "files") as pipeline:
        assert_equal(pipeline, row)
