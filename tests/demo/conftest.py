"""Bundles of the demo models that start from images, built once per test run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.support.shared import SharedFolders


@pytest.fixture(scope="session")
def enlarging_bundle(shared: SharedFolders) -> Path:
    """The fp32 bundle of the super-resolution model; read-only."""
    from tests.support.bundles import build_demo

    return shared.once("demo-super-resolution", partial(build_demo, "super-resolution"))


@pytest.fixture(scope="session")
def redrawing_bundle(shared: SharedFolders) -> Path:
    """The fp32 bundle of the inpainting model; read-only."""
    from tests.support.bundles import build_demo

    return shared.once("demo-inpainting", partial(build_demo, "inpainting"))
