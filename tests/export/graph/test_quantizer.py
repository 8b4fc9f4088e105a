"""Quantization a part of the codes at a time: diffusers' result, in torch and in the graph, for ties as well."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers.models.autoencoders.vae import VectorQuantizer
from torch import nn

from ldm_export.graph.nodes import range_names
from ldm_export.graph.onnx_graph import save_graph, trace_graph
from ldm_export.graph.passes.half_precision import half_precision
from ldm_export.graph.quantizer import CODES_AT_ONCE, Quantizer
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec
from tests.export.graph.whole import run

SIZES = (Axis("batch", 1, 1, 4), 3, Axis("height", 2, 8, 64), Axis("width", 2, 8, 64))
SPEC = ComponentSpec("decoder", (TensorSpec("latents", "float32", SIZES),), (TensorSpec("codes", "float32", SIZES),))
PARTS = 3


class Codes(nn.Module):
    """The codes of latents alone."""

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        self.quantizer = quantizer

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.quantizer(latents)[0]


def quantizer(codes: int) -> VectorQuantizer:
    torch.manual_seed(0)
    made = VectorQuantizer(codes, 3, 0.25).eval()
    made.embedding.weight.data.normal_()
    return made


@pytest.mark.parametrize("codes", [64, CODES_AT_ONCE, CODES_AT_ONCE * PARTS - 100])
def test_the_nearest_code_is_diffusers(codes: int) -> None:
    theirs, latents = quantizer(codes), torch.randn(2, 3, 9, 7)
    with torch.inference_mode():
        assert torch.equal(Quantizer(theirs)(latents)[0], theirs(latents)[0])


def test_of_equally_near_codes_the_first_is_taken() -> None:
    theirs = quantizer(CODES_AT_ONCE * PARTS)
    theirs.embedding.weight.data[CODES_AT_ONCE:] = theirs.embedding.weight.data[:CODES_AT_ONCE].repeat(PARTS - 1, 1)
    latents = theirs.embedding.weight.data[:64].T.reshape(1, 3, 8, 8)
    theirs.embedding.weight.data[0] = theirs.embedding.weight.data[CODES_AT_ONCE - 1] = 100  # neither is near a latent
    with torch.inference_mode():
        assert torch.equal(Quantizer(theirs)(latents)[0], theirs(latents)[0])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_graph_finds_the_same_codes_part_by_part(precision: str, tmp_path: Path) -> None:
    theirs, latents = quantizer(CODES_AT_ONCE * PARTS), torch.randn(2, 3, 24, 16)
    model = trace_graph(Codes(Quantizer(theirs)), SPEC)
    if precision == "fp16":
        ranges = {name: 100.0 for node in model.graph for value in node.outputs for name in range_names(value)}
        model = half_precision("fp16", ranges)(model).model
    save_graph(model, tmp_path / "codes.onnx")
    with torch.inference_mode():
        expected = theirs(latents)[0].numpy()
    found = run(tmp_path / "codes.onnx", {"latents": latents.numpy()})["codes"]
    np.testing.assert_allclose(found, expected, atol=0 if precision == "fp32" else 4e-3)
    widths = [node.outputs[0].shape[-1] for node in ir.load(tmp_path / "codes.onnx").graph if node.op_type == "Sqrt"]
    assert widths == [CODES_AT_ONCE] * PARTS
