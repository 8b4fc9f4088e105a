"""Engines built in a process of their own: what comes back, and what is said where it does not come to an end."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ldm_export.engine.builder import build_engine
from ldm_export.engine.process import build_apart
from ldm_export.engine.request import EngineRequest
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BuildError

REQUEST = EngineRequest("tensorrt-rtx", ("8.9",), (("batch", (1, 1, 2)),))
OPTIONS: dict[str, Any] = {"factor": 8, "islands": (), "progress": lambda done, total: None, "previous": None}


def test_facts_and_file_are_those_of_a_build_in_this_process(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, told = Bundle.open(tiny_bundle), []
    graph, spec = bundle.graph("text_encoder", "fp32"), bundle.manifest.components["text_encoder"].spec
    options = {**OPTIONS, "progress": lambda *done: told.append(done)}
    apart = build_apart(graph, spec, "fp32", REQUEST, tmp_path / "x.engine", **options)
    size = (tmp_path / "x.engine").stat().st_size
    assert apart == build_engine(graph, spec, "fp32", REQUEST, tmp_path / "x.engine")
    assert size == (tmp_path / "x.engine").stat().st_size
    assert told[-1] == (1000, 1000) and told == sorted(told)


def test_its_errors_are_raised_here(tiny_bundle: Path, tmp_path: Path) -> None:
    spec = Bundle.open(tiny_bundle).manifest.components["decoder"].spec
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(BuildError, match=r"^decoder: tensorrt_rtx cannot parse .*broken\.onnx: "):
        build_apart(tmp_path / "broken.onnx", spec, "fp32", REQUEST, tmp_path / "x.engine", **OPTIONS)
    assert not (tmp_path / "x.engine").exists()


def test_a_builder_that_is_killed_is_reported_in_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)

    def kill(done: int, total: int) -> None:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        (child,) = (
            one for one in children if b"ldm_export.engine.process" in Path(f"/proc/{one}/cmdline").read_bytes()
        )
        os.kill(int(child), signal.SIGKILL)

    graph, spec = bundle.graph("unet", "fp32"), bundle.manifest.components["unet"].spec
    with pytest.raises(BuildError, match=r"^unet: the builder was killed, out of memory most likely; free memory"):
        build_apart(graph, spec, "fp32", REQUEST, tmp_path / "x.engine", **{**OPTIONS, "progress": kill})
