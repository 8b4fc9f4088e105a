"""Whole graphs that the tests of graph passes share; they must not be changed."""

from __future__ import annotations

import pytest

from tests.export.graph.whole import KINDS, Whole, whole


@pytest.fixture(scope="session")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    """Kind of UNet -> its whole graph."""
    return {kind: whole(kind, tmp_path_factory.mktemp("whole")) for kind in KINDS}
