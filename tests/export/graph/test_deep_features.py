"""The shallow graph of a UNet computes what diffusers' UNet computes with the same deep features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ldm_export.graph.onnx_graph import save_graph
from ldm_export.graph.passes import ENGINE_PASSES, apply
from ldm_export.graph.passes.deep_features import expose_deep_features, possible_layers, shallow_unet
from ldm_export.graph.passes.half_precision import half_precision
from ldm_runtime.bundle_layout import CPU_VARIANT, CUDA_VARIANT
from ldm_runtime.errors import BuildError
from tests.export.graph.whole import Whole, largest_difference, run
from tests.support.contrib_operators import evaluate

Arrays = dict[str, NDArray[Any]]
TOLERANCE = 1e-5
SKIP_CHANNELS = 16


def torch_with_features(whole: Whole, feed: Arrays, layers: int, features: NDArray[Any] | None) -> Arrays:
    """Run diffusers' UNet; a layer of its last up block reads ``features`` instead of its input, which is returned."""
    layer, inputs = whole.module.unet.up_blocks[-1].resnets[-layers], list[torch.Tensor]()  # type: ignore[union-attr]

    def read(module: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        deep, skip = given[0][:, :-SKIP_CHANNELS], given[0][:, -SKIP_CHANNELS:]
        inputs.append(deep)
        return (torch.cat([deep if features is None else torch.from_numpy(features), skip], 1), *given[1:])

    handle = layer.register_forward_pre_hook(read)  # type: ignore[union-attr]
    try:
        return {"noise_pred": whole.torch(feed), "deep_features": inputs[0].numpy()}
    finally:
        handle.remove()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["conditional", "scale_shift"])
def test_shallow_layers_read_the_features_of_another_step(
    kind: str, layers: int, wholes: dict[str, Whole], tmp_path: Path
) -> None:
    whole = wholes[kind]
    model = whole.model
    expose_deep_features(model, layers)
    save_graph(model, tmp_path / "whole.onnx")
    shallow = shallow_unet(model)
    save_graph(shallow, tmp_path / "shallow.onnx")
    assert any("mid_block" in (node.name or "") for node in whole.model.graph)
    assert not any("mid_block" in (node.name or "") for node in shallow.graph)
    for size in whole.sizes[1:3]:
        feed = whole.feed(*size)
        found, expected = run(tmp_path / "whole.onnx", feed), torch_with_features(whole, feed, layers, None)
        for name in ("noise_pred", "deep_features"):
            assert largest_difference(found[name], expected[name]) <= TOLERANCE
        features = found["deep_features"]
        later = feed | {"sample": feed["sample"][::-1] * np.float32(0.9), "timestep": feed["timestep"] // 2}
        results = run(tmp_path / "shallow.onnx", later | {"deep_features": features})["noise_pred"]
        expected = torch_with_features(whole, later, layers, features)
        assert largest_difference(results, expected["noise_pred"]) <= TOLERANCE
        assert largest_difference(results, whole.torch(later)) > 100 * TOLERANCE


def half(model: Any) -> Any:
    ranges = {value.name or "": 1.0 for node in model.graph for value in node.outputs}
    return half_precision("fp16", ranges)(model).model


@pytest.mark.parametrize(
    ("rewrite", "runner"),
    [
        (lambda model: apply(model, ENGINE_PASSES[CPU_VARIANT]).model, run),
        (lambda model: apply(model, ENGINE_PASSES[CUDA_VARIANT]).model, evaluate),
        (half, run),
    ],
    ids=["onnxruntime-cpu", "onnxruntime-cuda", "fp16"],
)
def test_rewritten_graphs_lead_to_shallow_ones(
    rewrite: Callable[[Any], Any], runner: Callable[..., Arrays], wholes: dict[str, Whole], tmp_path: Path
) -> None:
    whole = wholes["conditional"]
    model = whole.model
    expose_deep_features(model, 1)
    model = rewrite(model)
    save_graph(model, tmp_path / "whole.onnx")
    nodes = len(list(model.graph))
    save_graph(shallow_unet(model), tmp_path / "shallow.onnx")
    assert len(list(model.graph)) < nodes / 3
    feed = whole.feed(2, 8, 8)
    results = runner(tmp_path / "whole.onnx", feed)
    later = {name: array for name, array in feed.items() if name in {value.name for value in model.graph.inputs}}
    again = runner(tmp_path / "shallow.onnx", later | {"deep_features": results["deep_features"]})
    assert largest_difference(again["noise_pred"], results["noise_pred"]) <= TOLERANCE


def test_a_graph_is_split_again_elsewhere(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["conditional"]
    model = whole.model
    assert possible_layers(model) == 2
    for layers in (1, 2):
        expose_deep_features(model, layers)
    assert [value.name for value in model.graph.outputs] == ["noise_pred", "deep_features"]
    save_graph(model, tmp_path / "whole.onnx")
    feed = whole.feed(2, 8, 8)
    found, expected = run(tmp_path / "whole.onnx", feed), torch_with_features(whole, feed, 2, None)
    for name in ("noise_pred", "deep_features"):
        assert largest_difference(found[name], expected[name]) <= TOLERANCE


def test_the_last_up_block_has_so_many_layers(wholes: dict[str, Whole]) -> None:
    model = wholes["conditional"].model
    expose_deep_features(model, 0)
    assert len(model.graph.outputs) == 1
    for layers in (-1, 3):
        with pytest.raises(BuildError, match=rf"feature cache: got {layers} layers, expected 0\.\.2"):
            expose_deep_features(model, layers)
