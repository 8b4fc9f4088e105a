"""Whole graphs that the tests of graph passes share; they must not be changed."""

from __future__ import annotations

import pytest

from tests.export.graph.whole import KINDS, Whole, export, network
from tests.support.shared import SharedFolders


@pytest.fixture(scope="session")
def wholes(shared: SharedFolders) -> dict[str, Whole]:
    """Kind of UNet -> its whole graph."""
    result = {}
    for kind in KINDS:
        module = network(kind)
        path = shared.once(f"whole_{kind}", lambda folder: export(kind, module, folder)) / f"{kind}.onnx"  # noqa: B023
        result[kind] = Whole(kind, module, path)
    return result
