"""Python of the documentation: it compiles, uses options and attributes that exist, and the first pages' runs."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm_runtime import Generation, LatentDiffusionPipeline, Request, Step
from ldm_runtime.batching.job import Job, JobResult
from ldm_runtime.batching.scheduler import BatchScheduler
from tests.support.documentation import PAGES, Block, blocks

BLOCKS = [block for page in PAGES for block in blocks(page) if block.language == "python"]
RUN = ("README.md", "docs/get-started.md", "docs/guides/python.md", "docs/concepts/batch-scheduler.md")
"""Pages whose blocks are run, with the demo model as the bundle."""
CLASSES: dict[str, tuple[type, ...]] = {
    "pipe": (LatentDiffusionPipeline,),
    "step": (Step,),
    "scheduler": (BatchScheduler,),
    "job": (Job,),
    "result": (Generation, JobResult),
}
"""Names that the pages use -> what they hold."""
REQUEST = {field.name for field in fields(Request)}
CALLS = {"pipe": {*REQUEST, *signature(LatentDiffusionPipeline.__call__).parameters}, "Request": REQUEST}
"""Called name -> its keyword arguments."""


def identifier(block: Block) -> str:
    return f"{block.page}:{BLOCKS.index(block)}"


def ours(block: Block) -> bool:
    """False for the pages of Triton's client, whose ``result`` is its own; they are run against a server."""
    return "tritonclient" not in block.text


@pytest.mark.parametrize("block", [block for block in BLOCKS if ours(block)], ids=identifier)
def test_names_and_options_exist(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldm_"):
            module = importlib.import_module(node.module or "")
            missing = [alias.name for alias in node.names if alias.name not in module.__all__]
            assert not missing, f"{node.module} has no public {missing}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in CLASSES:
            assert any(node.attr in members(kind) for kind in CLASSES[node.value.id]), ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            assert {word.arg for word in node.keywords if word.arg} <= CALLS[node.func.id], ast.unparse(node)


def members(kind: type) -> Iterator[str]:
    """Attributes of a class: methods, properties, fields, and those that its constructor sets."""
    yield from dir(kind)
    yield from getattr(kind, "__annotations__", {})
    yield from signature(kind).parameters


@pytest.fixture(scope="module")
def pipe(shapes_bundle: Path) -> Iterator[LatentDiffusionPipeline]:
    with LatentDiffusionPipeline.from_bundle(shapes_bundle, backend="onnxruntime", threads=1) as opened:
        yield opened


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.page in RUN], ids=identifier)
def test_blocks_run(
    block: Block, pipe: LatentDiffusionPipeline, shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundle").symlink_to(shapes_bundle)
    monkeypatch.chdir(tmp_path)
    opened = partial(LatentDiffusionPipeline.from_bundle, backend="onnxruntime")  # which compiles nothing
    monkeypatch.setattr(LatentDiffusionPipeline, "from_bundle", opened)
    names: dict[str, Any] = {"pipe": pipe, "Request": Request}
    exec(compile(block.text, block.page, "exec"), names)
    if names["pipe"] is not pipe:
        names["pipe"].close()
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert image.size == (64, 64)
