"""Exchanging an engine's weights: which graphs are of one architecture, which engines are taken, what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tensorrt_rtx

from ldm_export.bundle.build import build
from ldm_export.demo import demo_checkpoint
from ldm_export.engine.refit import refit_engine, refit_source, structure
from ldm_export.engine.request import EngineRequest
from ldm_export.families import open_checkpoint
from ldm_export.graph.onnx_graph import load_graph, save_graph
from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.backends.engine_advice import RTX_CAPABILITIES
from ldm_runtime.bundle import Bundle
from ldm_runtime.engine_facts import EngineFacts
from ldm_runtime.errors import BuildError


def changed(graph: Path, target: Path, which: Callable[[Any], bool]) -> Path:
    """The graph with the first fitting constant doubled."""
    model = load_graph(graph)
    value = next(v for v in model.graph.initializers.values() if v.const_value is not None and which(v.const_value))
    assert value.const_value is not None
    array = value.const_value.numpy()
    value.const_value = ir.tensor((array * 2).astype(array.dtype), name=value.name)
    return save_graph(model, target)[0]


def test_graphs_that_differ_in_weights_alone_share_a_structure(shapes_engines: Bundle, tmp_path: Path) -> None:
    graph = shapes_engines.graph("text_encoder", "fp16")
    weights = changed(graph, tmp_path / "weights.onnx", lambda tensor: tensor.size > 1000 and tensor.shape.rank() == 2)
    beside = [file.with_name(f"{file.name}.data").read_bytes() for file in (weights, graph)]
    assert beside[0] != beside[1] and structure(weights) == structure(graph)
    epsilon = changed(
        graph, tmp_path / "epsilon.onnx", lambda tensor: tensor.size == 1 and tensor.dtype.is_floating_point()
    )
    others = (epsilon, *(shapes_engines.graph(*one) for one in (("text_encoder", "fp32"), ("decoder", "fp16"))))
    assert len({structure(one) for one in (graph, *others)}) == 4


@pytest.fixture
def refittable(shapes_engines: Bundle) -> tuple[Bundle, EngineFacts]:
    """The bundle as if its UNet's engine had been built refittable, and that engine's facts."""
    part = shapes_engines.manifest.components["unet"]
    engine = replace(part.engines[0], structure="1" * 64)
    components = {**shapes_engines.manifest.components, "unet": replace(part, engines=(engine,))}
    return replace(shapes_engines, manifest=replace(shapes_engines.manifest, components=components)), engine


def test_an_engine_that_fits_is_taken(refittable: tuple[Bundle, EngineFacts]) -> None:
    bundle, engine = refittable
    assert refit_source(bundle, "unet", replace(engine, graph="0" * 64, proof={})) == bundle.folder / engine.file


@pytest.mark.parametrize(
    "changes",
    [
        {"structure": "2" * 64},
        {"structure": ""},
        {"version": "0.1"},
        {"package": "tensorrt"},
        {"compute_capabilities": ("8.9",)},
        {"precision": "fp32"},
        {"profiles": ({"sample": ((1,), (1,), (1,))},)},
    ],
)
def test_one_that_does_not_is_built_anew(refittable: tuple[Bundle, EngineFacts], changes: dict[str, Any]) -> None:
    bundle, engine = refittable
    assert refit_source(bundle, "unet", replace(engine, **changes)) is None
    assert refit_source(bundle, "decoder", engine) is None and refit_source(None, "unet", engine) is None


def test_a_damaged_one_is_built_anew(refittable: tuple[Bundle, EngineFacts], tmp_path: Path) -> None:
    bundle, engine = refittable
    damaged = replace(bundle, folder=tmp_path)
    (tmp_path / engine.file).parent.mkdir()
    (tmp_path / engine.file).write_bytes(b"\0" * 100)
    assert refit_source(damaged, "unet", engine) is None


def test_without_a_gpu_the_engine_does_not_open(refittable: tuple[Bundle, EngineFacts], tmp_path: Path) -> None:
    (tmp_path / "x.engine").write_bytes(b"\0" * 100)
    graph = refittable[0].graph("unet", "fp16")
    with pytest.raises(BuildError, match=r"x\.engine: tensorrt_rtx cannot open it: .*; leave --refittable out"):
        refit_engine(tensorrt_rtx, tmp_path / "x.engine", graph, tmp_path / "new.engine")
    assert not (tmp_path / "new.engine").exists()


@pytest.mark.gpu
def test_on_a_gpu_new_weights_need_no_rebuild(shapes_bundle: Path, tmp_path: Path) -> None:
    """A second checkpoint of the architecture: its engines are refitted, and draw what its graphs draw."""
    from ldm_runtime import LatentDiffusionPipeline

    capability = Cuda().capability()
    if capability not in RTX_CAPABILITIES:
        pytest.skip(f"TensorRT for RTX does not run on compute capability {capability}")
    request = EngineRequest("tensorrt-rtx", (capability,), refittable=True)
    bundle = Path(shutil.copytree(shapes_bundle, tmp_path / "bundle"))
    build(open_checkpoint(demo_checkpoint()), bundle, "fp16", request)
    other = Path(shutil.copytree(demo_checkpoint(), tmp_path / "checkpoint"))
    from safetensors.torch import load_file, save_file

    file = next((other / "unet").glob("*.safetensors"))
    save_file({name: tensor * 0.9 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    built = build(open_checkpoint(other), bundle, "fp16", request).bundle
    all_images = []
    for backend in ("tensorrt", "onnxruntime"):
        with LatentDiffusionPipeline.from_bundle(built, backend=backend) as pipeline:
            all_images.append(np.asarray(pipeline("a red circle", seed=1).images[0], np.float64))
    assert np.square(all_images[0] - all_images[1]).mean() < 5
