"""A split graph computes what the whole graph and the torch module compute, in every engine, rows and sizes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import openvino
import pytest
import tensorrt_rtx

from ldm_export.graph.onnx_graph import save_graph
from ldm_export.graph.passes import ENGINE_PASSES, apply
from ldm_export.graph.passes.split_off import (
    Split,
    split_cross_attention_kv,
    split_off,
    split_time_embedding,
)
from ldm_runtime.errors import BuildError
from tests.export.graph.whole import KINDS, TOKENS, Whole, largest_difference, run

TOLERANCE = 1e-6
CONDITIONAL = [kind for kind in KINDS if kind.startswith("conditional")]


@dataclass(frozen=True)
class Parts:
    """A UNet after both splits: ``files`` are the saved prefixes, ``rest`` is the saved rest."""

    time: Split
    kv: Split | None
    files: tuple[Path, ...]
    rest: Path

    @property
    def rest_model(self) -> ir.Model:
        return (self.kv or self.time).rest


@pytest.fixture(scope="session")
def parts(wholes: dict[str, Whole], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parts]:
    return {kind: both_splits(graph, tmp_path_factory.mktemp(kind)) for kind, graph in wholes.items()}


def both_splits(graph: Whole, folder: Path) -> Parts:
    time = split_time_embedding(graph.model)
    assert time is not None
    kv = split_cross_attention_kv(time.rest)
    files = []
    for split in (time, kv):
        if split is not None:
            files.append(folder / f"{split.prefix.graph.name}.onnx")
            save_graph(split.prefix, files[-1])
    rest = folder / "rest.onnx"
    save_graph((kv or time).rest, rest)
    return Parts(time, kv, tuple(files), rest)


def between(parts: Parts, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The feed and what the prefixes compute from it."""
    return feed | {name: array for file in parts.files for name, array in run(file, feed).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_compute_what_the_whole_computes(
    wholes: dict[str, Whole], parts: dict[str, Parts], kind: str
) -> None:
    for sizes in wholes[kind].sizes:
        feed = wholes[kind].feed(*sizes)
        expected = run(wholes[kind].path, feed)["noise_pred"]
        results = run(parts[kind].rest, between(parts[kind], feed))["noise_pred"]
        assert largest_difference(results, expected) <= TOLERANCE, sizes
        assert largest_difference(results, wholes[kind].torch(feed)) <= 1e-4, sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_rows_do_not_depend_on_each_other(
    parts: dict[str, Parts], wholes: dict[str, Whole], kind: str, rows: int
) -> None:
    """Each row of the time embedding is that of its own timestep, and the rest uses it for its own row."""
    feed = between(parts[kind], wholes[kind].feed(4, 8, 8))
    order = np.random.default_rng(rows).permutation(4)[:rows]
    (one,) = run(parts[kind].files[0], {"timestep": feed["timestep"][order]}).values()
    assert largest_difference(one, feed["time_embedding"][order]) <= TOLERANCE
    whole_result = run(parts[kind].rest, feed)["noise_pred"]
    results = run(parts[kind].rest, {name: array[order] for name, array in feed.items()})["noise_pred"]
    assert largest_difference(results, whole_result[order]) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_outputs_keep_their_symbols(parts: dict[str, Parts], wholes: dict[str, Whole], kind: str) -> None:
    division, before = parts[kind], wholes[kind].model.graph
    prefix = division.time.prefix.graph
    (packed,) = division.time.values
    assert prefix.name == "time_embedding"
    assert [(v.name, v.dtype, str(v.shape)) for v in prefix.inputs] == [("timestep", ir.DataType.INT64, "[batch]")]
    assert [(v.name, v.dtype, str(v.shape)) for v in prefix.outputs] == [
        ("time_embedding", ir.DataType.FLOAT, f"[batch,{packed.shape[1]}]")
    ]
    names = [value.name for value in before.inputs]
    names[names.index("timestep")] = "time_embedding"
    if division.kv is not None:
        index = names.index("context")
        names[index : index + 1] = [f"kv.{number}" for number in range(len(division.kv.values))]
    rest = division.rest_model.graph
    assert [value.name for value in rest.inputs] == names
    for side, other in ((rest.inputs, before.inputs), (rest.outputs, before.outputs)):
        assert str(side[0].shape) == str(other[0].shape) and "height" in str(side[0].shape)
    assert {str(value.shape[0]) for value in rest.inputs if value.shape} == {"batch"}


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_keys_and_values_are_those_of_the_attentions(parts: dict[str, Parts], kind: str) -> None:
    split = parts[kind].kv
    assert split is not None and [fact.name for fact in split.values] == [f"kv.{i}" for i in range(len(split.values))]
    assert {fact.shape for fact in split.values} == {("batch", TOKENS, 16), ("batch", TOKENS, 32)}
    nodes = list(split.prefix.graph)
    assert [node.op_type for node in nodes] == ["MatMul"] * len(split.values)
    assert all(f".attn2.to_{'kv'[index % 2]}/" in (node.name or "") for index, node in enumerate(nodes))
    assert [value.name for value in split.prefix.graph.outputs] == [fact.name for fact in split.values]


@pytest.mark.parametrize("kind", KINDS)
def test_no_work_for_the_timestep_or_the_context_is_left(
    parts: dict[str, Parts], wholes: dict[str, Whole], kind: str
) -> None:
    """Every matrix product of the whole graph is in one part only, and none reads a new input but in attention."""
    division = parts[kind]
    models = [division.time.prefix, division.rest_model, *([division.kv.prefix] if division.kv else [])]
    work = [n.name or "" for m in models for n in m.graph if n.op_type in ("Gemm", "MatMul", "Conv")]
    assert sorted(work) == sorted(
        n.name or "" for n in wholes[kind].model.graph if n.op_type in ("Gemm", "MatMul", "Conv")
    )
    new = {value for value in division.rest_model.graph.inputs if (value.name or "").startswith(("time_", "kv."))}
    layout = ("Split", "Reshape", "Transpose", "Unsqueeze", "Mul", "Shape", "Slice", "Concat")
    reached = set(new)
    for node in division.rest_model.graph:
        inputs = {value for value in node.inputs if value is not None and not value.is_initializer()}
        if inputs and inputs <= reached:
            assert node.op_type in (*layout, *(("Sigmoid", "Gemm") if kind == "class_conditional" else ())), node.name
            reached.update(node.outputs)
    assert not any(node.op_type in ("Sin", "Cos") for node in division.rest_model.graph)


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_keep_their_names_and_tensors_are_those_they_were(
    parts: dict[str, Parts], wholes: dict[str, Whole], kind: str
) -> None:
    before = {node.name for node in wholes[kind].model.graph}
    for model in (parts[kind].time.prefix, parts[kind].rest_model):
        added = {node.name or "" for node in model.graph} - before
        assert all(name.endswith(("/Reshape", "/Split", "/Concat")) for name in added)
    (packed,) = parts[kind].time.values
    feed = between(parts[kind], wholes[kind].feed(2, 8, 8))
    model = wholes[kind].model
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs[:] = [values[part] for part in packed.parts]
    probe = parts[kind].rest.with_name("probe.onnx")
    save_graph(model, probe)
    expected = [array.reshape(2, -1) for array in run(probe, feed).values()]
    assert largest_difference(feed["time_embedding"], np.concatenate(expected, 1)) <= TOLERANCE
    assert set(packed.parts) <= {value.name for node in parts[kind].rest_model.graph for value in node.outputs} | {
        "time_embedding"
    }


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_weights_are_divided(wholes: dict[str, Whole], parts: dict[str, Parts], kind: str) -> None:
    def weights(model: ir.Model) -> dict[bytes, int]:
        tensors = [value.const_value for value in model.graph.initializers.values()]
        return {hashlib.sha256(t.tobytes()).digest(): t.nbytes for t in tensors if t is not None and t.nbytes > 256}

    division = parts[kind]
    assert division.kv is not None
    divided = [weights(model) for model in (division.time.prefix, division.kv.prefix, division.rest_model)]
    assert sum(map(len, divided)) == len(set().union(*divided))
    assert set().union(*divided) == set(weights(wholes[kind].model))


@pytest.mark.parametrize("kind", KINDS)
def test_the_checker_accepts_every_part(parts: dict[str, Parts], kind: str) -> None:
    for file in (*parts[kind].files, parts[kind].rest):
        onnx.checker.check_model(str(file), full_check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_openvino_computes_the_same(parts: dict[str, Parts], wholes: dict[str, Whole], kind: str) -> None:
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = [core.compile_model(str(file), "CPU", options) for file in (*parts[kind].files, parts[kind].rest)]
    for sizes in wholes[kind].sizes[1:3]:
        feed = wholes[kind].feed(*sizes)
        values = dict(feed)
        for model in compiled:
            # A port may have the names of several tensors, because OpenVINO removes a multiplication by one.
            results = model({port: values[(port.names & values.keys()).pop()] for port in model.inputs})
            values |= {name: np.array(results[port]) for port in model.outputs for name in port.names}
        assert largest_difference(values["noise_pred"], run(wholes[kind].path, feed)["noise_pred"]) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_tensorrt_parses_every_part(parts: dict[str, Parts], kind: str) -> None:
    for file in (*parts[kind].files, parts[kind].rest):
        log = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
        network = tensorrt_rtx.Builder(log).create_network(0)
        parser = tensorrt_rtx.OnnxParser(network, log)
        assert parser.parse_from_file(str(file)), parser.get_error(0).desc()
        names = [value.name for value in ir.load(file).graph.inputs]
        assert [network.get_input(index).name for index in range(network.num_inputs)] == names


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_attention_of_the_rest_can_be_fused(
    parts: dict[str, Parts], wholes: dict[str, Whole], kind: str, tmp_path: Path
) -> None:
    model = ir.load(parts[kind].rest)
    attentions = sum(node.op_type == "Softmax" for node in model.graph)
    result = apply(model, ENGINE_PASSES["onnxruntime-cpu"])
    assert result.changes == attentions > 0
    save_graph(result.model, tmp_path / "fused.onnx")
    for sizes in wholes[kind].sizes:
        feed = wholes[kind].feed(*sizes)
        results = run(tmp_path / "fused.onnx", between(parts[kind], feed))["noise_pred"]
        assert largest_difference(results, run(wholes[kind].path, feed)["noise_pred"]) <= 1e-5


def test_the_order_of_the_splits_makes_no_difference(wholes: dict[str, Whole], tmp_path: Path) -> None:
    graph = wholes["conditional"]
    kv = split_cross_attention_kv(graph.model)
    assert kv is not None
    time = split_time_embedding(kv.rest)
    assert time is not None
    for split in (kv, time):
        save_graph(split.prefix, tmp_path / f"{split.prefix.graph.name}.onnx")
    save_graph(time.rest, tmp_path / "rest.onnx")
    feed = graph.feed(3, 9, 11)
    values = feed | run(tmp_path / "cross_attention_kv.onnx", feed) | run(tmp_path / "time_embedding.onnx", feed)
    results = run(tmp_path / "rest.onnx", values)["noise_pred"]
    assert largest_difference(results, run(graph.path, feed)["noise_pred"]) <= TOLERANCE


def test_an_input_that_is_missing_or_needs_no_work_gives_none(wholes: dict[str, Whole]) -> None:
    assert split_cross_attention_kv(wholes["scale_shift"].model) is None
    assert split_off(wholes["conditional"].model, ("mask",), "mask") is None


def test_the_model_stays_unchanged(wholes: dict[str, Whole]) -> None:
    model = wholes["conditional"].model
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert split_time_embedding(model) and split_cross_attention_kv(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def model_of(nodes: str, shape: str = "batch, 3") -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[{shape}] a, float[batch, 3] b) => (float[batch, 3] out)'
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(f"{text} {{ {nodes} }}")))
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
    return model


def test_a_source_that_the_rest_needs_itself_is_refused() -> None:
    model = model_of("x = Exp(a) y = Add(x, b) out = Add(y, a)")
    with pytest.raises(BuildError, match=r"^g: pass split_off: .*'n2', which needs 'a' itself"):
        split_off(model, ("a",), "part")


def test_a_name_in_use_is_refused() -> None:
    with pytest.raises(BuildError, match=r"pass split_off: .*tensor 'b'"):
        split_off(model_of("x = Exp(a) out = Add(x, b)"), ("a",), "part", pack="b")


def test_open_sizes_at_the_cut() -> None:
    model = model_of("x = Exp(a) out = Add(x, b)", "batch, w")
    split = split_off(model, ("a",), "part")
    assert split is not None and [fact.shape for fact in split.values] == [("batch", "w")]  # of the source
    with pytest.raises(BuildError, match=r"pass split_off: .*'x' with shape \[batch,w\]"):
        split_off(model, ("a",), "part", pack="packed")
    with pytest.raises(BuildError, match=r"pass split_off: .*'x' with shape \[batch,"):
        split_off(model_of("x = Concat <axis = 1> (a, a) out = Add(x, b)", "batch, w"), ("a",), "part")
