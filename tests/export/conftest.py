"""What tests of the export share: a checkpoint to be changed, and a calibrated bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ldm_export.bundle.add_int8 import calibrate
from ldm_export.bundle.int8_report import write_report
from ldm_runtime.bundle import Bundle
from tests.support.tiny_int8 import SETTINGS


@pytest.fixture
def tiny(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of ``tiny_checkpoint`` in the test's own folder, to be changed at will."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def calibrated(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """``tiny_bundle``, calibrated; not to be changed."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("calibrated") / "bundle")
    bundle, _ = write_report(calibrate(folder, SETTINGS).bundle)
    return bundle
