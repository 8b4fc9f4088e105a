"""Small random UNets as whole graphs, and how tests run a graph or its parts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from numpy.typing import NDArray
from torch import nn
from torch.export import Dim

from ldm_export.families.text_to_image import ModelShape
from ldm_export.graph.onnx_graph import OPSET, export_graph, load_graph, save_graph
from ldm_export.graph.wrappers import UNet, free_upsampling
from ldm_runtime.model import Latents

Arrays = Mapping[str, NDArray[Any]]
TOKENS, WIDTH = 5, 24
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
        return self.kind.startswith("conditional")

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
    """A random UNet of two levels, the same in every process."""
    shared: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "resnet_time_scale_shift": "scale_shift" if kind.endswith("scale_shift") else "default",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(KINDS.index(kind))
        if kind.startswith("conditional"):
            blocks = ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2
            net: nn.Module = UNet2DConditionModel(
                **shared,
                down_block_types=blocks[0],
                up_block_types=blocks[1],
                cross_attention_dim=WIDTH,
                attention_head_dim=2,
            )
        else:
            net = UNet2DModel(
                **shared,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=8,
                num_class_embeds=7 if kind == "class_conditional" else None,
            )
    net = net.eval().requires_grad_(False)
    return (UNet(net) if kind.startswith("conditional") else _Unconditional(net)).eval()


def export(kind: str, module: nn.Module, folder: Path) -> None:
    """Export such a UNet as KIND.onnx in a new folder."""
    folder.mkdir()
    path = folder / f"{kind}.onnx"
    if kind.startswith("conditional"):
        spec = ModelShape(TOKENS, WIDTH, Latents(4, 8), latent_size=8, image_channels=3).specs()["unet"]
        export_graph(module, spec, path)
    else:
        _export_even_sizes(module, path, labels=kind == "class_conditional")


def _export_even_sizes(module: nn.Module, path: Path, labels: bool) -> None:
    batch, height, width = (
        Dim(name, min=1 if name == "batch" else 8, max=999) for name in ("batch", "height", "width")
    )
    names = ["sample", "timestep", *(["class_labels"] if labels else [])]
    timestep, class_labels = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (torch.zeros(3, 4, 20, 24), timestep, class_labels)[: len(names)],
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=["noise_pred"],
            dynamic_shapes=({0: batch, 2: 2 * height, 3: 2 * width}, {0: batch}, {0: batch})[: len(names)],
            verbose=False,
        )
    assert program is not None
    save_graph(program.model, path)


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
