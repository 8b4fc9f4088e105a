"""Checks which attentions of a graph became fused kernels in its engine.

A fused kernel (FlashAttention: Dao et al. 2022, arXiv:2205.14135) never stores the matrix of scores. TensorRT fuses
softmax(Q K^T) V if it recognises the pattern; otherwise it builds several slower kernels without a message.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ldm_runtime.engine_facts import EngineFacts

__all__ = ["FusedAttention", "attentions_of", "fused_attention", "unfused_warning"]

KERNEL = "_mha"
"""Part of the name of every fused attention kernel, e.g. "_gemm_mha_v2"."""
_BEFORE = ("Cast", "Mul", "Div", "Add")
"""Operations between the scores and the softmax: casts, the scale and a mask."""
_AFTER = ("Cast",)


@dataclass(frozen=True)
class FusedAttention:
    """Which attentions of a graph are fused in its engine.

    Attributes:
        attentions: Number of attentions in the graph.
        unfused: Names of those that are not one fused kernel in every program of the engine.
    """

    attentions: int
    unfused: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Return the manifest's entry as JSON values."""
        fused = self.attentions - len(self.unfused)
        return {"graph": self.attentions, "fused": fused, **({"unfused": [*self.unfused]} if self.unfused else {})}


def attentions_of(graph: Path) -> tuple[str, ...]:
    """Return the name of each attention of a graph: its Softmax between two matrix products, or its Attention node."""
    return tuple(node.name or "" for node in ir.load(graph).graph if _is_attention(node))


def fused_attention(attentions: Sequence[str], kernels: Iterable[tuple[str, Sequence[str]]]) -> FusedAttention:
    """Find the attentions that are computed only by fused kernels.

    Args:
        attentions: Result of ``attentions_of``.
        kernels: (name, ONNX nodes from which it was built) of each kernel of an engine, over all profiles.
    """
    fused, split = set[str](), set[str]()
    for name, nodes in kernels:
        (fused if KERNEL in name else split).update(nodes)
    return FusedAttention(len(attentions), tuple(one for one in attentions if one not in fused or one in split))


def unfused_warning(component: str, engine: EngineFacts) -> str | None:
    """Return a warning about attentions that a half-precision engine does not fuse; None if there are none.

    Fused kernels exist for half precision only.
    """
    attention = engine.proof.get("attention", {})
    if engine.precision not in ("fp16", "bf16") or not (unfused := attention.get("unfused")):
        return None
    return (
        f"{component}: {engine.package} {engine.version} does not fuse {len(unfused)} of {attention['graph']} "
        f"attentions, first {unfused[0]}; they take more time and memory"
    )


def _is_attention(node: ir.Node) -> bool:
    if node.op_type == "Attention":
        return True
    return node.op_type == "Softmax" and _before(node) == "MatMul" and _after(node) == ["MatMul"]


def _before(node: ir.Node) -> str:
    """Kind of the node that computes the scores, before casts, the scale and a mask."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    while source is not None and source.op_type in _BEFORE:
        source = next(_producers(source), None)
    return "" if source is None else source.op_type


def _producers(node: ir.Node) -> Iterator[ir.Node]:
    return (producer for value in node.inputs if value is not None and (producer := value.producer()) is not None)


def _after(node: ir.Node) -> list[str]:
    """Kinds of the nodes that use the result, after casts."""
    users = [user for user, _ in node.outputs[0].uses()]
    return [kind for user in users for kind in (_after(user) if user.op_type in _AFTER else [user.op_type])]
