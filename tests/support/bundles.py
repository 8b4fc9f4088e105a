"""Makers of the checkpoints and bundles that tests share. Importing this module imports torch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ldm_calibration.settings import CalibrationSettings
from ldm_export.bundle import engine_stages
from ldm_export.bundle.add_int8 import calibrate
from ldm_export.bundle.build import BuildOptions, build
from ldm_export.bundle.int8_report import write_report
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.demo import demo_checkpoint, demo_config
from ldm_export.engine.builder import build_engine
from ldm_export.engine.request import EngineRequest
from ldm_export.families import open_checkpoint
from ldm_export.originals import open_model
from ldm_runtime.bundle import Bundle
from tests.support.shared import SharedFolders

__all__ = [
    "CAPABILITIES",
    "ENGINES",
    "add_cuda",
    "add_engines",
    "add_fp16",
    "add_int8",
    "build_bundle",
    "build_demo",
    "build_shapes",
    "cuda_bundle",
]

CAPABILITIES = ("8.0", "12.0")
"""Compute capabilities of the shared engines: Ampere and Blackwell, far apart."""
ENGINES = EngineRequest("tensorrt-rtx", CAPABILITIES)


def build_bundle(checkpoint: Path, folder: Path) -> None:
    """Build a checkpoint's bundle in fp32."""
    build(open_checkpoint(checkpoint), folder)


def build_shapes(folder: Path) -> None:
    """Build the bundle of the checkpoint that ships, in fp32."""
    build(open_checkpoint(demo_checkpoint()), folder)


def build_demo(task: str, folder: Path) -> None:
    """Build the bundle of the demo model of a task, in fp32."""
    build(open_model(demo_checkpoint(task), config=demo_config(task)), folder)


def add_fp16(checkpoint: Path, bundle: Path, folder: Path) -> None:
    """Copy an fp32 bundle of ``checkpoint`` and add its fp16 graphs."""
    shutil.copytree(bundle, folder)
    build(open_checkpoint(checkpoint), folder, "fp16")


def add_cuda(checkpoint: Path, bundle: Path, folder: Path) -> None:
    """Copy a bundle of ``checkpoint`` and add its fp16 graphs, also those for ONNX Runtime on CUDA."""
    shutil.copytree(bundle, folder)
    build(open_checkpoint(checkpoint), folder, options=BuildOptions("fp16", cuda=True))


def cuda_bundle(shared: SharedFolders, name: str, checkpoint: Checkpoint) -> Bundle:
    """The bundle of a checkpoint with fp16 graphs, also those for ONNX Runtime on CUDA; read-only."""
    options = BuildOptions("fp16", cuda=True)
    return Bundle.open(shared.once(f"cuda-{name}", lambda folder: build(checkpoint, folder, options=options)))


def add_int8(bundle: Path, settings: CalibrationSettings, folder: Path) -> None:
    """Copy a bundle and add int8 graphs, calibrated with ``settings``, and their report."""
    shutil.copytree(bundle, folder)
    write_report(calibrate(folder, settings).bundle)


def add_engines(bundle: Path, folder: Path) -> None:
    """Copy the shipped checkpoint's bundle and add fp16 graphs and their engines for all of ``CAPABILITIES``.

    They are built in this process, which saves imports; tests/export/test_engine_process.py compares both ways.
    """
    shutil.copytree(bundle, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_stages, "build_in_subprocess", build_engine)
        build(open_checkpoint(demo_checkpoint()), folder, "fp16", ENGINES)
