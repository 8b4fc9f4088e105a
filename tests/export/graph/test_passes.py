"""Running passes: changes are counted, unused nodes removed, and errors name the pass."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from ldm_export.graph.onnx_graph import save_graph
from ldm_export.graph.passes import ENGINE_PASSES, PassResult, apply
from ldm_export.graph.passes.fuse_attention import fuse_attention
from ldm_runtime.errors import BuildError
from tests.export.graph.whole import KINDS, Whole, largest_difference, run


def small() -> ir.Model:
    nodes = "x = Exp(a) y = Neg(a) out = Abs(x)"
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[N] a) => (float[N] out) {{ {nodes} }}'
    return ir.from_proto(onnx.parser.parse_model(text))


def counting(model: ir.Model) -> PassResult:
    return PassResult(model, 2)


def test_changes_are_summed_and_what_is_unused_is_removed() -> None:
    result = apply(small(), (counting, counting))
    assert result.changes == 4
    assert [node.op_type for node in result.model.graph] == ["Exp", "Abs"]


def test_an_unexpected_error_names_the_pass() -> None:
    def breaking(model: ir.Model) -> PassResult:
        raise KeyError("x")

    with pytest.raises(BuildError, match=r"^g: pass breaking failed: KeyError"):
        apply(small(), (counting, breaking))


def test_a_pass_that_changes_the_outputs_is_refused() -> None:
    def renaming(model: ir.Model) -> PassResult:
        model.graph.outputs[0].name = "other"
        return PassResult(model, 1)

    with pytest.raises(BuildError, match=r"^g: pass renaming changed inputs or outputs"):
        apply(small(), (renaming,))


def test_a_pass_that_breaks_the_order_is_refused() -> None:
    def reordering(model: ir.Model) -> PassResult:
        model.graph.insert_before(model.graph[0], model.graph[-1])
        return PassResult(model, 1)

    with pytest.raises(BuildError, match=r"^g: pass reordering: node .* reads 'x'"):
        apply(small(), (reordering,))


@pytest.mark.parametrize("kind", KINDS)
def test_every_attention_is_fused_and_the_result_stays(wholes: dict[str, Whole], kind: str, tmp_path: Path) -> None:
    model = wholes[kind].model
    attentions = sum(node.op_type == "Softmax" for node in model.graph)
    result = apply(model, ENGINE_PASSES["onnxruntime-cpu"])
    kinds = [node.op_type for node in result.model.graph]
    assert result.changes == attentions == kinds.count("MultiHeadAttention") > 0 and "Softmax" not in kinds
    save_graph(result.model, tmp_path / "fused.onnx")
    feed = wholes[kind].feed(3, 6, 10)
    found, expected = run(tmp_path / "fused.onnx", feed)["noise_pred"], run(wholes[kind].path, feed)["noise_pred"]
    assert largest_difference(found, expected) <= 1e-5


def test_fusing_again_changes_nothing(wholes: dict[str, Whole]) -> None:
    once = fuse_attention(wholes["conditional"].model)
    before = ir.to_proto(once.model).SerializeToString(deterministic=True)
    again = fuse_attention(once.model)
    assert again.changes == 0 and ir.to_proto(again.model).SerializeToString(deterministic=True) == before


def test_attention_with_a_mask_stays(wholes: dict[str, Whole]) -> None:
    model = wholes["conditional"].model
    for node in [node for node in model.graph if node.op_type == "Softmax"]:
        scores = node.inputs[0]
        masked = ir.node("Add", [scores, scores], name=f"{node.name}/mask")
        model.graph.insert_before(node, masked)
        node.replace_input_with(0, masked.outputs[0])
    assert fuse_attention(model).changes == 0
