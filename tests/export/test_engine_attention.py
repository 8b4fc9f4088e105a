"""Attention in graphs, and in the kernels that an engine lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ldm_export.engine.attention import attentions_of, fused_attention
from ldm_export.engine.inspector import layer_nodes

Nodes = list[onnx.NodeProto]


def node(kind: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], name=f"{output}/{kind}", **attributes)


def save(path: Path, nodes: Nodes) -> Path:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 4, 4]) for name in ("q", "k", "v")]
    output = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    half = numpy_helper.from_array(np.array(0.5, np.float32), "half")
    graph = helper.make_graph(nodes, "attention", inputs, [output], [half])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


ATTENTION = {
    "plain": [node("MatMul", "q k", "s"), node("Softmax", "s", "p"), node("MatMul", "p v", "y")],
    "scaled, masked and cast": [
        node("MatMul", "q k", "s"),
        node("Mul", "s half", "scaled"),
        node("Add", "scaled v", "masked"),
        node("Cast", "masked", "wide", to=TensorProto.FLOAT),
        node("Softmax", "wide", "p"),
        node("Cast", "p", "narrow", to=TensorProto.FLOAT),
        node("MatMul", "narrow v", "y"),
    ],
}
OTHER = {
    "probabilities": [node("MatMul", "q k", "s"), node("Softmax", "s", "p")],
    "of no scores": [node("Softmax", "q", "p"), node("MatMul", "p v", "y")],
    "used twice": [
        node("MatMul", "q k", "s"),
        node("Softmax", "s", "p"),
        node("MatMul", "p v", "y"),
        node("Add", "y p", "z"),
    ],
}


@pytest.mark.parametrize("nodes", ATTENTION.values(), ids=ATTENTION)
def test_a_softmax_between_two_products_is_attention(tmp_path: Path, nodes: Nodes) -> None:
    assert attentions_of(save(tmp_path / "x.onnx", nodes)) == ("p/Softmax",)


@pytest.mark.parametrize("nodes", OTHER.values(), ids=OTHER)
def test_another_softmax_is_not(tmp_path: Path, nodes: Nodes) -> None:
    assert attentions_of(save(tmp_path / "x.onnx", nodes)) == ()


def test_the_operator_is_attention(tmp_path: Path) -> None:
    assert attentions_of(save(tmp_path / "x.onnx", [node("Attention", "q k v", "y")])) == ("y/Attention",)


def test_an_attention_is_fused_if_every_program_fuses_it() -> None:
    kernels = [
        ("_gemm_mha_v2", ["a/MatMul", "a/Softmax", "a/MatMul_2"]),
        ("_gemm_mha_v2", ["b/MatMul", "b/Softmax", "b/MatMul_2"]),
        ("__myl_MaxSubExpSumDiv", ["b/Softmax"]),
        ("__myl_MaxSubExpSumDiv", ["c/Softmax"]),
    ]
    result = fused_attention(("a/Softmax", "b/Softmax", "c/Softmax", "d/Softmax"), kernels)
    assert result.facts() == {"graph": 4, "fused": 1, "unfused": ["b/Softmax", "c/Softmax", "d/Softmax"]}
    assert fused_attention(("a/Softmax",), kernels).facts() == {"graph": 1, "fused": 1}


def test_the_inspector_lists_the_same_kernels() -> None:
    layers = [
        {"Name": "_gemm_mha_v2_myl0_7", "Metadata": "[ONNX Layer: a/MatMul]\x1f[ONNX Layer: a/Softmax]"},
        {"Name": "__myl_Add_myl0_8"},
        "unet.conv_in/Conv",
    ]
    kernels = layer_nodes({"Layers": layers})
    assert kernels == [("_gemm_mha_v2_myl0_7", ["a/MatMul", "a/Softmax"]), ("__myl_Add_myl0_8", [])]
    assert not fused_attention(("a/Softmax",), kernels).unfused
