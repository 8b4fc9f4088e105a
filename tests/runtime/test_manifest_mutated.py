"""A real manifest, changed at random: it is refused in one line, or it is valid and can be written again."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_runtime.bundle_layout import MANIFEST as NAME
from ldm_runtime.errors import ManifestError
from ldm_runtime.manifest_reader import read_manifest

Place = tuple[Any, ...]

ODD = (None, True, 0, -1, 1.5, 2**31, 10**400, "", "..", "\0", "\ud800", "batch", "8*height", [], {}, [[]], math.nan)
values = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated")


@pytest.fixture(scope="module")
def document(tiny_bundle: Path) -> dict[str, Any]:
    return json.loads((tiny_bundle / NAME).read_text(encoding="utf-8"))


def children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def places(value: Any, case: Place = ()) -> list[Place]:
    """The way to every value inside."""
    return [place for key, child in children(value) for place in ((*case, key), *places(child, (*case, key)))]


@settings(max_examples=300)
@given(st.data())
def test_it_is_refused_or_valid(folder: Path, document: dict[str, Any], data: st.DataObject) -> None:
    changed: Any = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        *case, last = data.draw(st.sampled_from(places(changed)))
        at = changed
        for key in case:
            at = at[key]
        if data.draw(st.booleans()):
            at[last] = data.draw(values)
        else:
            del at[last]
        if not changed:
            break
    (folder / NAME).write_text(json.dumps(changed))
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        assert str(error).startswith(f"{folder / NAME}: ")
        assert len(str(error)) < 1000
        return
    (folder / NAME).write_text(manifest.to_json(), encoding="utf-8")
    assert read_manifest(folder) == manifest


@settings(max_examples=200)
@given(st.data())
def test_bytes_changed_anywhere_are_refused_or_valid(folder: Path, tiny_bundle: Path, data: st.DataObject) -> None:
    content = bytearray((tiny_bundle / NAME).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=5))
    (folder / NAME).write_bytes(content)
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        assert str(error).startswith(f"{folder / NAME}: ")
        return
    (folder / NAME).write_text(manifest.to_json(), encoding="utf-8")
    assert read_manifest(folder) == manifest


def test_the_manifest_unchanged_is_valid(tiny_bundle: Path) -> None:
    assert read_manifest(tiny_bundle).to_json().encode() == (tiny_bundle / NAME).read_bytes()
