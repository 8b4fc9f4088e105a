"""A trained UNet under the original names: recognised, and right in fp32, fp16, bf16, int8 and as an engine.

Its activations come from the package's own graph, run by ONNX Runtime.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ldm_calibration.observation import observe
from ldm_calibration.probes import HIGHEST, LOWEST, add_extremes
from ldm_calibration.qdq import insert_qdq
from ldm_calibration.scaling_search import search_scalings
from ldm_export.engine.builder import build_engine
from ldm_export.engine.request import EngineJob, EngineRequest
from ldm_export.graph import wrappers
from ldm_export.graph.onnx_graph import load_graph, save_graph, trace_graph
from ldm_export.graph.passes.half_precision import half_precision
from ldm_runtime.backends.openvino import OpenVinoBackend
from ldm_runtime.images import psnr
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec
from tests.export.graph.whole import run
from tests.support.trained_unet import TrainedUNet, trained_unet

SIGMAS = (0.1, 1.0, 20.0)
BATCH = Axis("batch", 1, 1, 32)
IMAGES = (BATCH, 1, 128, 128)
SPEC = ComponentSpec(
    "unet",
    (TensorSpec("sample", "float32", IMAGES), TensorSpec("timestep", "float32", (BATCH,))),
    (TensorSpec("noise_pred", "float32", IMAGES),),
)
LEAST = {"fp32": 100.0, "fp16": 55.0, "bf16": 40.0, "int8": 30.0}
"""Least PSNR in dB against the package's own predictions."""
INT8_SHARE = 0.9
"""Share of the layers that are int8: those whose own results lose least."""


@pytest.fixture(scope="module")
def trained() -> TrainedUNet:
    return trained_unet(SIGMAS)


def decibel(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    peak = float(np.abs(expected).max())
    return psnr(found.astype(np.float64), expected.astype(np.float64), peak) or float("inf")


def test_names_and_shapes_tell_the_sizes(trained: TrainedUNet) -> None:
    shape = trained.shape
    assert (shape.widths, shape.res_blocks, shape.attention) == (
        (32, 32, 64, 96, 128),
        4,
        (False, False, True, True, True),
    )
    assert shape.resblock_updown and shape.scale_shift and shape.context_width is None


def test_the_module_computes_what_the_packages_graph_computes(trained: TrainedUNet) -> None:
    with torch.no_grad():
        found: Any = trained.module(torch.from_numpy(trained.samples), torch.from_numpy(trained.timesteps))[0]
    assert np.abs(found.numpy() - trained.predictions).max() < 2e-5


@pytest.mark.slow
def test_every_precision_on_trained_activations(trained: TrainedUNet, tmp_path: Path) -> None:
    feed = {"sample": trained.samples, "timestep": trained.timesteps}
    files = {precision: tmp_path / f"{precision}.onnx" for precision in LEAST}
    save_graph(trace_graph(wrappers.UNet(trained.module), SPEC), files["fp32"])
    probe = load_graph(files["fp32"])
    names = add_extremes(probe)
    save_graph(probe, tmp_path / "probe.onnx")
    extremes = run(tmp_path / "probe.onnx", feed)
    ranges = dict(zip(names, np.maximum(extremes[HIGHEST], -extremes[LOWEST]).tolist(), strict=True))
    islands: dict[str, tuple[str, ...]] = {}
    for precision in ("fp16", "bf16"):
        half = half_precision(precision, ranges)(load_graph(files["fp32"]))
        save_graph(half.model, files[precision])
        islands[precision] = tuple(half.matrix_islands)
    observed = observe(files["fp32"], [feed])
    scalings = search_scalings(files["fp32"], observed, [feed])
    quantized = load_graph(files["fp32"])
    ranked = sorted(scalings.output_db, key=lambda layer: -scalings.output_db[layer])
    assert len(insert_qdq(quantized, scalings.tensors, ranked[: int(INT8_SHARE * len(ranked))])) > 200
    save_graph(quantized, files["int8"])
    found = {precision: run(files[precision], feed)["noise_pred"] for precision in ("fp32", "fp16", "int8")}
    found["bf16"] = OpenVinoBackend(files["bf16"], SPEC, "fp32").run(feed)["noise_pred"]  # ONNX Runtime has no kernels
    for precision, predicted in found.items():
        assert decibel(predicted, trained.predictions) > LEAST[precision], precision
    request, target = EngineRequest("tensorrt-rtx", ("8.9",)), tmp_path / "x.engine"
    engine = build_engine(EngineJob(files["fp16"], SPEC, "fp16", request, target, islands["fp16"]))
    assert engine.proof["matrix_work"]["half"] > 100
