"""Traces that are kept: keys follow the structure of a module, and graphs are the same as without the folder."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from ldm_export.graph import trace_cache
from ldm_export.graph.onnx_graph import export_graph
from ldm_export.graph.trace_cache import VARIABLE, UnknownStructure, key_of_trace
from ldm_export.graph.wrappers import ConcatenatedUNet
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec, dummy_inputs
from tests.support.checkpoints import tiny_modules
from tests.support.configs_only import random_unet


def spec_of(batch: Axis, name: str = "x", output: str = "y") -> ComponentSpec:
    return ComponentSpec(
        "rows", (TensorSpec(name, "float32", (batch, 8)),), (TensorSpec(output, "float32", (batch, 8)),)
    )


SPEC = spec_of(Axis("batch", 1, 2, 32))


class Rows(nn.Module):
    """Two linear layers, tied or not, with a normalization between them."""

    def __init__(self, seed: int = 0, *, eps: float = 1e-5, tied: bool = False, act: object = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8, eps), nn.Linear(8, 8)
        self.act = act
        if tied:
            self.last.weight = self.first.weight
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(torch.relu(self.norm(self.first(x))))
        return y


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of traces, in use."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "traces"))
    return tmp_path / "traces"


def test_the_key_does_not_depend_on_the_values_of_weights() -> None:
    assert key_of_trace(Rows(0), SPEC) == key_of_trace(Rows(1), SPEC)


def test_the_key_does_not_depend_on_usual_and_largest_sizes() -> None:
    assert key_of_trace(Rows(), spec_of(Axis("batch", 1, 7, 99))) == key_of_trace(Rows(), SPEC)


def test_modules_that_differ_in_weights_and_names_share_a_trace(folder: Path) -> None:
    """Each graph has the names of its own spec."""
    spec = spec_of(Axis("batch", 1, 2, 32), "given", "made")
    for number, one in enumerate((SPEC, spec)):
        export_graph(Rows(number), one, folder.parent / f"{number}.onnx")
    assert len(list(folder.iterdir())) == 1
    graph = onnx.load(folder.parent / "1.onnx").graph
    assert ([value.name for value in graph.input], [value.name for value in graph.output]) == (["given"], ["made"])


def test_the_key_tells_hooks_apart_by_what_they_do() -> None:
    """torch numbers hooks with a counter of the process."""
    keys = [key_of_trace(ConcatenatedUNet(random_unet(levels, 0)), SPEC) for levels in (2, 2, 3)]
    assert keys[0] == keys[1] != keys[2]
    other = ConcatenatedUNet(random_unet(2, 0))
    other.unet.down_blocks[0].register_forward_pre_hook(max)
    assert key_of_trace(other, SPEC) != keys[0]


@pytest.mark.parametrize(
    ("module", "spec"),
    [
        (Rows(eps=1e-6), SPEC),
        (Rows(tied=True), SPEC),
        (Rows(act=torch.sigmoid), SPEC),
        (Rows().double(), SPEC),
        (Rows(), spec_of(Axis("batch", 2, 2, 32))),
        (Rows(), spec_of(Axis("batch", 1, 2, 32, scale=2))),
        (nn.Sequential(Rows()), SPEC),
    ],
    ids=["option", "tied", "function", "dtype", "smallest size", "scale", "class"],
)
def test_the_key_depends_on_all_else(module: nn.Module, spec: ComponentSpec) -> None:
    assert key_of_trace(module, spec) != key_of_trace(Rows(), SPEC)


def test_modules_of_diffusers_and_transformers_have_keys() -> None:
    first, second = tiny_modules(seed=0), tiny_modules(seed=1)
    keys = {name: key_of_trace(module, SPEC) for name, module in first.items()}
    assert len(set(keys.values())) == len(first)
    second["unet"].register_to_config(_name_or_path="elsewhere")
    assert {name: key_of_trace(module, SPEC) for name, module in second.items()} == keys


def test_what_cannot_be_described_is_traced_each_time(folder: Path) -> None:
    module = Rows(act=lambda x: x)
    with pytest.raises(UnknownStructure, match="lambda"):
        key_of_trace(module, SPEC)
    export_graph(module, SPEC, folder.parent / "graph.onnx")
    assert not folder.exists()


def test_a_kept_trace_gets_the_weights_of_the_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = [folder.parent / name for name in ("first.onnx", "second.onnx", "alone.onnx")]
    export_graph(Rows(0), SPEC, graphs[0])
    module = Rows(1)
    (kept,) = folder.iterdir()
    before = kept.stat().st_mtime_ns
    export_graph(module, SPEC, graphs[1])
    assert [(path, path.stat().st_mtime_ns) for path in folder.iterdir()] == [(kept, before)]
    monkeypatch.delenv(VARIABLE)
    export_graph(module, SPEC, graphs[2])
    assert graphs[1].read_bytes() == graphs[2].read_bytes() != graphs[0].read_bytes()
    backend = OnnxRuntimeBackend(graphs[1], SPEC, "cpu", threads=1)
    feed = dummy_inputs(SPEC)
    assert np.allclose(backend.run(feed)["y"], module(torch.from_numpy(feed["x"])), rtol=1e-4, atol=1e-6)
    backend.close()


def test_a_kept_trace_has_no_weights(folder: Path) -> None:
    module = Rows()
    export_graph(module, SPEC, folder.parent / "graph.onnx")
    (kept,) = folder.iterdir()
    assert module.first.weight.numpy().tobytes() not in kept.read_bytes()


def test_a_damaged_trace_is_made_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    graph = folder.parent / "graph.onnx"
    export_graph(Rows(), SPEC, graph)
    expected = graph.read_bytes()
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        export_graph(Rows(), SPEC, graph)
    assert "is traced again" in caplog.text
    assert graph.read_bytes() == expected and kept.read_bytes() == whole


def test_a_folder_that_cannot_be_written_does_not_stop_an_export(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file")
    with caplog.at_level(logging.WARNING):
        export_graph(Rows(), SPEC, folder.parent / "graph.onnx")
    assert "cannot be kept" in caplog.text and (folder.parent / "graph.onnx").exists()


def test_without_a_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    export_graph(Rows(), SPEC, tmp_path / "graph.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]


def test_another_version_of_the_code_has_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of_trace(Rows(), SPEC)
    monkeypatch.setattr(trace_cache, "_code", lambda: ("torch 99.0",))
    assert key_of_trace(Rows(), SPEC) != key
