"""Fixtures of the LoRA tests: a bundle with two adapters, and its pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.bundle import Bundle
from tests.support.lora_bundle import make_lora_bundle
from tests.support.shared import SharedFolders


@pytest.fixture(scope="session")
def bundle(sd2_checkpoint: Path, sd2_bundle: Bundle, shared: SharedFolders) -> Bundle:
    """``sd2_bundle`` with two adapters, and their files beside it; read-only."""
    made = shared.once("sd2_loras", lambda folder: make_lora_bundle(sd2_checkpoint, sd2_bundle, folder))
    return Bundle.open(made / "bundle")


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> Iterator[LatentDiffusionPipeline]:
    """The bundle on ONNX Runtime in fp32."""
    with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime") as pipeline:
        yield pipeline
