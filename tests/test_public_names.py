"""The public names of the three packages: a name that appears or disappears here is a change of the API."""

from __future__ import annotations

import importlib
from importlib.metadata import version

import pytest

NAMES = {
    "ldm_runtime": ["Bundle", "Generation", "LatentDiffusionPipeline", "LdmError", "Request", "Step"],
    "ldm_export": [],
    "ldm_calibration": [],
}


@pytest.mark.parametrize("package", NAMES)
def test_a_package_exports_these_names(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == NAMES[package]
    for name in NAMES[package]:
        assert getattr(module, name).__doc__, f"{package}.{name} has no docstring"


@pytest.mark.parametrize("package", NAMES)
def test_a_package_has_the_version_of_the_distribution(package: str) -> None:
    assert importlib.import_module(package).__version__ == version("ldm-export")
    with pytest.raises(AttributeError, match="no attribute 'versions'"):
        _ = importlib.import_module(package).versions
