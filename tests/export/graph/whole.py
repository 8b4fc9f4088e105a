"""Small random UNets as whole graphs, and how tests run a graph or its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from diffusers import UNet2DModel
from numpy.typing import NDArray
from torch import nn

from ldm_export.families.text_to_image import ModelShape
from ldm_export.graph.onnx_graph import export_graph, load_graph
from ldm_export.graph.wrappers import UNet, free_upsampling
from ldm_runtime.model import Latents
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec
from tests.support.checkpoints import tiny_modules

Arrays = Mapping[str, NDArray[Any]]
TOKENS, WIDTH = 77, 24
KINDS = ("conditional", "scale_shift", "class_conditional")
SIZES = ((1, 4, 4), (2, 8, 8), (3, 6, 10), (4, 12, 2))
"""Rows, height and width that every graph accepts."""
ODD_SIZES = ((2, 9, 11), (3, 7, 5), (1, 3, 8))
"""The same for graphs that accept odd sizes."""


@dataclass(frozen=True)
class Whole:
    """A UNet: its torch module and its exported graph.

    Attributes:
        kind: One of KINDS.
        module: Takes the graph's inputs in their order.
        path: Graph file in fp32.
    """

    kind: str
    module: nn.Module
    path: Path

    @property
    def model(self) -> ir.Model:
        """A new copy of the graph."""
        return load_graph(self.path)

    @property
    def has_context(self) -> bool:
        return self.kind == "conditional"

    @property
    def sizes(self) -> tuple[tuple[int, int, int], ...]:
        return SIZES + (ODD_SIZES if self.has_context else ())

    def feed(self, rows: int, height: int, width: int) -> dict[str, NDArray[Any]]:
        """Random inputs; every row has another timestep."""
        rng = np.random.default_rng(100 * rows + height)
        feed: dict[str, NDArray[Any]] = {
            "sample": rng.standard_normal((rows, 4, height, width)).astype(np.float32),
            "timestep": rng.permutation(1000)[:rows],
        }
        if self.has_context:
            feed["context"] = rng.standard_normal((rows, TOKENS, WIDTH)).astype(np.float32)
        if self.kind == "class_conditional":
            feed["class_labels"] = rng.integers(0, 7, rows)
        return feed

    def torch(self, feed: Arrays) -> NDArray[np.float32]:
        with torch.no_grad():
            result: NDArray[np.float32] = self.module(*map(torch.from_numpy, feed.values())).numpy()
        return result


class _Unconditional(nn.Module):
    """sample [R, 4, h, w], timestep int64 [R] and optional class labels int64 [R] -> predicted noise."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = free_upsampling(unet)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        result: torch.Tensor = self.unet(sample, timestep, class_labels=class_labels, return_dict=False)[0]
        return result


def network(kind: str) -> nn.Module:
    """A random UNet, the same in every process: that of ``tiny_modules``, or one of one level without context."""
    if kind == "conditional":
        return UNet(tiny_modules()["unet"].requires_grad_(False)).eval()
    constructor: Any = UNet2DModel
    labels = kind == "class_conditional"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(KINDS.index(kind))
        net: nn.Module = constructor(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16,),
            layers_per_block=1,
            norm_num_groups=8,
            resnet_time_scale_shift="default" if labels else "scale_shift",
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            attention_head_dim=8,
            num_class_embeds=7 if labels else None,
        )
    return _Unconditional(net.requires_grad_(False)).eval()


def export(kind: str, module: nn.Module, folder: Path) -> None:
    """Export such a UNet as KIND.onnx in a new folder."""
    folder.mkdir()
    export_graph(module, _spec(kind), folder / f"{kind}.onnx")


def _spec(kind: str) -> ComponentSpec:
    """Inputs and output of such a UNet; those without context accept even sizes only."""
    if kind == "conditional":
        return ModelShape(TOKENS, WIDTH, Latents(4, 8), latent_size=8, image_channels=3).specs()["unet"]
    rows, height, width = (Axis(name, 1, 4, 999) for name in ("batch", "height", "width"))
    images = (rows, 4, replace(height, scale=2), replace(width, scale=2))
    labels = (TensorSpec("class_labels", "int64", (rows,)),) if kind == "class_conditional" else ()
    inputs = TensorSpec("sample", "float32", images), TensorSpec("timestep", "int64", (rows,)), *labels
    return ComponentSpec("unet", inputs, (TensorSpec("noise_pred", "float32", images),))


def run(graph: Path, feed: Arrays) -> dict[str, NDArray[Any]]:
    """Run a graph file on ONNX Runtime; of ``feed`` it takes what it has inputs for."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    inputs = {value.name: feed[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, inputs), strict=True))


def largest_difference(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The largest difference of two arrays of one shape, divided by the largest magnitude of ``other``."""
    assert one.shape == other.shape and other.std() > 0.01
    return float(np.abs(one - other).max() / np.abs(other).max())
