"""Fixtures of the export's tests: a checkpoint to be changed, and bundles in fp16 and int8."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ldm_runtime.bundle import Bundle
from tests.support.bundles import add_cuda, add_fp16, add_int8
from tests.support.shared import SharedFolders
from tests.support.small_models import bundle_of, text_model
from tests.support.tiny_int8 import LATENTS_SETTINGS, QUANTIZED, SETTINGS


@pytest.fixture
def tiny(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of ``tiny_checkpoint`` in the test's own folder, to be changed at will."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def half_bundle(tiny_checkpoint: Path, tiny_bundle: Path, shared: SharedFolders) -> Bundle:
    """``tiny_bundle`` with fp16 graphs; read-only."""
    return Bundle.open(shared.once("half_bundle", lambda folder: add_fp16(tiny_checkpoint, tiny_bundle, folder)))


@pytest.fixture(scope="session")
def cuda_bundle(tiny_checkpoint: Path, half_bundle: Bundle, shared: SharedFolders) -> Bundle:
    """``half_bundle`` with graphs for ONNX Runtime on CUDA; read-only."""
    folder = shared.once("cuda_bundle", lambda folder: add_cuda(tiny_checkpoint, half_bundle.folder, folder))
    return Bundle.open(folder)


@pytest.fixture(scope="session")
def calibrated(tiny_bundle: Path, shared: SharedFolders) -> Bundle:
    """``tiny_bundle`` with int8 graphs and the report on them; read-only."""
    return Bundle.open(shared.once("calibrated", lambda folder: add_int8(tiny_bundle, SETTINGS, folder)))


@pytest.fixture(scope="session")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory, shared: SharedFolders) -> Bundle:
    """A bundle of a few operators with int8 graphs and the loss of each layer measured in the latents; read-only."""

    def make(folder: Path) -> None:
        place = tmp_path_factory.mktemp("small")
        bundle = bundle_of(text_model(place / "model"), place / "bundle", QUANTIZED)
        add_int8(bundle.folder, LATENTS_SETTINGS, folder)

    return Bundle.open(shared.once("int8_bundle", make))
