"""Exported graphs: valid, complete, readable, free of traces of the machine, each weight once, the same every time."""

from __future__ import annotations

import getpass
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from ldm_export.checkpoint.modules import load_module
from ldm_export.families import open_checkpoint
from ldm_export.families.text_to_image import TEXT_TO_IMAGE
from ldm_export.graph.onnx_graph import OPSET, export_graph
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BuildError
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec, dummy_inputs
from tests.support.whole_unet import SPLIT

TRACED = tuple(TEXT_TO_IMAGE.components)
NAMES = (*TRACED, *SPLIT)
MODULE_OF = {name: name for name in TRACED} | dict.fromkeys(SPLIT, "unet")
BATCH = Axis("batch", 1, 2, 32)
every_component = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def paths(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Graphs of a copy: onnx refuses weights with several hard links, and Triton repositories link weights."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("graphs") / "bundle")
    return {name: folder / name / "fp32.onnx" for name in NAMES}


@pytest.fixture(scope="module")
def graphs(paths: dict[str, Path]) -> dict[str, onnx.ModelProto]:
    return {name: onnx.load(str(path)) for name, path in paths.items()}


@pytest.fixture(scope="module")
def specs(tiny_bundle: Path) -> dict[str, ComponentSpec]:
    return {name: part.spec for name, part in Bundle.open(tiny_bundle).manifest.components.items()}


@pytest.fixture(scope="module")
def modules(tiny_checkpoint: Path) -> dict[str, nn.Module]:
    checkpoint = open_checkpoint(tiny_checkpoint)
    return {name: TEXT_TO_IMAGE.components[name].wrap(load_module(checkpoint, name)).eval() for name in TRACED}


def dims(value: onnx.ValueInfoProto) -> tuple[str | int, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


@every_component
def test_passes_the_checker(paths: dict[str, Path], name: str) -> None:
    onnx.checker.check_model(str(paths[name]), full_check=True)


@every_component
def test_is_plain_onnx(graphs: dict[str, onnx.ModelProto], name: str) -> None:
    model = graphs[name]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert not model.functions and {node.domain for node in model.graph.node} == {""}


@every_component
def test_inputs_and_outputs_are_the_specs(
    graphs: dict[str, onnx.ModelProto], specs: dict[str, ComponentSpec], name: str
) -> None:
    for values, tensors in (
        (graphs[name].graph.input, specs[name].inputs),
        (graphs[name].graph.output, specs[name].outputs),
    ):
        got = [(value.name, value.type.tensor_type.elem_type, dims(value)) for value in values]
        assert got == [
            (
                tensor.name,
                TensorProto.DataType.Value("FLOAT" if tensor.dtype == "float32" else "INT64"),
                tuple(dim.symbol if isinstance(dim, Axis) else dim for dim in tensor.shape),
            )
            for tensor in tensors
        ]


@every_component
def test_every_value_has_a_type_and_a_shape(graphs: dict[str, onnx.ModelProto], name: str) -> None:
    model = graphs[name]
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    for node in model.graph.node:
        for output in filter(None, node.output):
            tensor = known[output].type.tensor_type
            assert tensor.elem_type != TensorProto.UNDEFINED and tensor.HasField("shape"), output


@every_component
def test_shapes_hold_in_strict_inference(graphs: dict[str, onnx.ModelProto], name: str) -> None:
    bare = onnx.ModelProto()
    bare.CopyFrom(graphs[name])
    del bare.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    computed = {output for node in graphs[name].graph.node for output in node.output}
    declared = {value.name: dims(value) for value in graphs[name].graph.value_info if value.name in computed}
    ranked = [value for value in inferred.graph.value_info if value.type.tensor_type.HasField("shape")]
    assert len(ranked) >= len(declared) / 2
    for value in ranked:
        assert len(dims(value)) == len(declared[value.name]), value.name
        for mine, theirs in zip(declared[value.name], dims(value), strict=True):
            if mine and theirs and isinstance(theirs, int):  # a size that both know
                assert mine == theirs, value.name


@every_component
def test_no_weight_is_written_twice(graphs: dict[str, onnx.ModelProto], name: str) -> None:
    weights = [(tensor.name, numpy_helper.to_array(tensor)) for tensor in graphs[name].graph.initializer]
    large = [(array.dtype.str, array.shape, array.tobytes()) for _, array in weights if array.nbytes > 64]
    assert len(large) >= (8 if name in SPLIT else 10)
    assert len(set(large)) == len(large)


@every_component
def test_every_weight_is_used(graphs: dict[str, onnx.ModelProto], name: str) -> None:
    used = {value for node in graphs[name].graph.node for value in node.input}
    assert {tensor.name for tensor in graphs[name].graph.initializer} <= used


@every_component
def test_nodes_are_named_after_their_modules(
    graphs: dict[str, onnx.ModelProto], modules: dict[str, nn.Module], name: str
) -> None:
    graph, known = graphs[name].graph, dict(modules[MODULE_OF[name]].named_modules())
    names = [node.name for node in graph.node]
    assert graph.name == name and all(names) and len(set(names)) == len(names)
    within = [node.name.rpartition("/")[0] for node in graph.node]
    assert set(within) <= {*known, "time_embedding"}  # the tensor that joins a UNet and its time embedding
    assert sum(map(bool, within)) > (0.5 if name == "time_embedding" else 0.8) * len(names)
    for node, module in zip(graph.node, within, strict=True):
        kind = node.name.rpartition("/")[2]
        assert re.fullmatch(rf"{node.op_type}(_\d+)?", kind)
        if node.op_type == "Conv":
            assert type(known[module]) is nn.Conv2d, node.name


def test_every_layer_is_in_a_graph(graphs: dict[str, onnx.ModelProto], modules: dict[str, nn.Module]) -> None:
    for traced, module in modules.items():
        parts = [name for name in NAMES if MODULE_OF[name] == traced]
        within = {node.name.rpartition("/")[0] for name in parts for node in graphs[name].graph.node}
        known = dict(module.named_modules())
        layers = {path for path, layer in known.items() if isinstance(layer, nn.Conv2d | nn.Linear)}
        assert layers <= within


@every_component
def test_nothing_tells_of_the_machine_or_the_trace(paths: dict[str, Path], name: str) -> None:
    content = paths[name].read_bytes()
    places = (Path(__file__).parents[2], sys.prefix, sys.base_prefix, torch.__path__[0], paths[name].parents[2])
    for text in (*map(str, places), "site-packages", "Traceback", "stack_trace", "pkg.torch", 'File "'):
        assert text.encode() not in content, text
    model = onnx.load_from_string(content)
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")  # random bytes, in which short texts may occur
    rest = model.SerializeToString()
    for text in (tempfile.gettempdir(), f"/{getpass.getuser()}", "/home/", ".py", "://"):
        assert text.encode() not in rest, text
    entries = [model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info]
    assert not any(entry.metadata_props or entry.doc_string for entry in entries)
    assert not any(tensor.doc_string or tensor.metadata_props for tensor in model.graph.initializer)
    assert (model.producer_name, model.producer_version) == ("ldm-export", "")


def test_a_second_export_gives_the_same_bytes(
    modules: dict[str, nn.Module], specs: dict[str, ComponentSpec], paths: dict[str, Path], tmp_path: Path
) -> None:
    """Those of the whole bundle are compared in test_build.py, with another process's."""
    (file,) = export_graph(modules["text_encoder"], specs["text_encoder"], tmp_path / "fp32.onnx")
    assert file.read_bytes() == paths["text_encoder"].read_bytes()


class Tied(nn.Module):
    """Two layers that share their weight, and a third with a copy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))
        self.layers[1].weight = self.layers[0].weight
        self.layers[2].weight = nn.Parameter(self.layers[0].weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


class Branching(nn.Module):
    """Computes what no graph can hold: a branch on a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


SQUARE = ComponentSpec("square", (TensorSpec("x", "float32", (BATCH, 64)),), (TensorSpec("y", "float32", (BATCH, 64)),))


def test_equal_weights_are_written_once(tmp_path: Path) -> None:
    module = Tied().eval().requires_grad_(False)
    export_graph(module, SQUARE, tmp_path / "tied.onnx")
    weights = onnx.load(str(tmp_path / "tied.onnx")).graph.initializer
    assert [list(tensor.dims) for tensor in weights] == [[64, 64]]
    backend = OnnxRuntimeBackend(tmp_path / "tied.onnx", SQUARE, "cpu", threads=1)
    feed = dummy_inputs(SQUARE)
    assert np.allclose(backend.run(feed)["y"], module(torch.from_numpy(feed["x"])), rtol=1e-4, atol=1e-6)
    backend.close()


def test_what_cannot_be_traced_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"square: cannot be traced: .*data-dependent") as raised:
        export_graph(Branching().eval(), SQUARE, tmp_path / "branching.onnx")
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)
    assert not list(tmp_path.iterdir())
