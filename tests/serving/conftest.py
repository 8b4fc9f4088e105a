"""Fixtures of the serving tests: a Triton server, the shipped model in this process, and a gRPC connection."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from ldm_export.cli import main
from ldm_runtime import Bundle, LatentDiffusionPipeline, Request
from tests.support.lora_files import factors_of_graphs, peft
from tests.support.measured import record_of
from tests.support.triton_client import Grpc
from tests.support.triton_server import TritonServer, served


@pytest.fixture(scope="session")
def served_bundle(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """``shapes_bundle`` with measured settings and the LoRA adapter "style"; the other files are links."""
    folder = tmp_path_factory.mktemp("served")
    bundle = Bundle.open(shutil.copytree(shapes_bundle, folder / "bundle", copy_function=os.link))
    bundle.with_quality(record_of(50))
    save_file(peft(factors_of_graphs(bundle, ("unet", "text_encoder"))), folder / "style.safetensors")
    assert main(["add-lora", str(bundle.folder), f"style={folder / 'style.safetensors'}", "--quiet"]) == 0
    return Bundle.open(bundle.folder)


@pytest.fixture(scope="session")
def triton_server(served_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A real Triton server of ``served_bundle``, on ONNX Runtime in fp32; its repository is read-only."""
    with served(served_bundle.folder, tmp_path_factory.mktemp("triton")) as server:
        yield server


@pytest.fixture(scope="session")
def local(shapes_bundle: Path) -> Iterator[LatentDiffusionPipeline]:
    with LatentDiffusionPipeline.from_bundle(shapes_bundle, backend="onnxruntime", precision="fp32") as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def local_images(local: LatentDiffusionPipeline) -> Callable[[Request], np.ndarray]:
    """A function that generates a request's images in this process: uint8 [images, H, W, 3]."""

    def draw(request: Request) -> np.ndarray:
        for step in local.steps(request):
            latents = step.latents
        return np.stack([np.asarray(image) for image in local.decode(latents)])

    return draw


@pytest.fixture
def grpc(triton_server: TritonServer) -> Iterator[Grpc]:
    connection = Grpc(triton_server.grpc)
    yield connection
    connection.client.close()
