"""Engines built in a subprocess: the same result, and one line of error if the process does not finish."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from ldm_export.engine.builder import build_engine
from ldm_export.engine.process import build_in_subprocess
from ldm_export.engine.request import EngineJob, EngineRequest
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BuildError
from tests.support.small_bundle import write_small_bundle

REQUEST = EngineRequest("tensorrt-rtx", ("8.9",), (("batch", (1, 1, 2)),))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_small_bundle(tmp_path / "bundle")


def job(bundle: Bundle, component: str, target: Path) -> EngineJob:
    spec = bundle.manifest.components[component].spec
    return EngineJob(bundle.graph(component, "fp32"), spec, "fp32", REQUEST, target)


def test_a_job_survives_json(bundle: Bundle, tmp_path: Path) -> None:
    one = replace(job(bundle, "unet", tmp_path / "x.engine"), islands=("unet/Conv",), previous=bundle)
    assert EngineJob.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_facts_and_file_are_those_of_a_build_in_this_process(bundle: Bundle, tmp_path: Path) -> None:
    one, progress = job(bundle, "unet", tmp_path / "x.engine"), list[tuple[int, int]]()
    other = build_in_subprocess(one, lambda *done: progress.append(done))
    size = one.target.stat().st_size
    assert other == build_engine(one) and other.compute_capabilities == ("8.9",)
    assert size == one.target.stat().st_size
    assert progress[-1] == (1000, 1000) and progress == sorted(progress)


def test_its_errors_are_raised_here(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    broken = replace(job(bundle, "decoder", tmp_path / "x.engine"), graph=tmp_path / "broken.onnx")
    with pytest.raises(BuildError, match=r"^decoder: tensorrt_rtx cannot parse .*broken\.onnx: "):
        build_in_subprocess(broken)
    assert not (tmp_path / "x.engine").exists()


def test_a_builder_that_is_killed_is_reported_in_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        for child in children:  # none is left if progress of a killed one is still read
            if b"ldm_export.engine.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), signal.SIGKILL)

    bundle = Bundle.open(tiny_bundle)
    unet = EngineJob(
        bundle.graph("unet", "fp32"), bundle.manifest.components["unet"].spec, "fp32", REQUEST, tmp_path / "x.engine"
    )
    with pytest.raises(BuildError, match=r"^unet: the builder was killed, out of memory most likely; free memory"):
        build_in_subprocess(unet, kill)
