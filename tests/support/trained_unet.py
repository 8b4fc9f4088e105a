"""A trained UNet with the original names of its tensors, from the package adaptive-terrain-diffusion (MIT).

The package holds an ONNX graph whose group norms are folded: InstanceNormalization, then a Mul and an Add with the
weights. They are put back, and the difficulty that conditions the model is added to the bias of the time embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from diffusers import UNet2DModel
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.originals.key_mapping import unet_tensors
from ldm_export.originals.published import Heads
from ldm_export.originals.unet_config import unet_config
from ldm_export.originals.unet_shape import UNET_PREFIX, UNetShape, unet_shape

__all__ = ["DIFFICULTY", "TrainedUNet", "trained_unet"]

PACKAGE, GRAPH = "adaptive-terrain-diffusion", "terrain_consistency_unet_difficulty100.onnx"
DIFFICULTY = 0.5
HEADS = Heads(channels=32, new_order=True)
_NORMS = {"in_layers.2": "in_layers.0", "out_layers.3": "out_layers.0", "qkv": "norm", "out.2": "out.0"}
"""Convolution -> the group norm before it."""


@dataclass(frozen=True)
class TrainedUNet:
    """The module, the sizes that were recognised, and activations of the package's own graph.

    Attributes:
        module: UNet2DModel with the trained weights.
        shape: Sizes as recognised from names and shapes.
        samples, timesteps, predictions: Inputs and outputs of the network inside of the graph: float32
            [N, 1, 128, 128], [N], and as ``samples``.
    """

    module: nn.Module
    shape: UNetShape
    samples: NDArray[np.float32]
    timesteps: NDArray[np.float32]
    predictions: NDArray[np.float32]


def graph_file() -> Path:
    """The package's graph; fails where the package is not installed."""
    (found,) = [file for file in files(PACKAGE) or () if file.name == GRAPH]
    return Path(str(found.locate()))


def trained_unet(sigmas: tuple[float, ...]) -> TrainedUNet:
    """Load the UNet, and run the package's graph on noise of these magnitudes."""
    graph = onnx.load(graph_file())
    names, inner = _tensors(graph), onnx.ModelProto()
    tensors = {UNET_PREFIX + name: _stored(name, array) for name, array in names.items()}
    shape = unet_shape(tensors)
    constructor: Any = UNet2DModel
    module: nn.Module = constructor(**unet_config(shape, HEADS, 128))
    stored = unet_tensors(tensors, shape, HEADS, ema=False)
    module.load_state_dict({name: tensor.read() for name, tensor in stored.items()})
    inner.CopyFrom(graph)
    outputs = [_named(inner, node) for node in ("noisy", "log", "out.2")]
    for name in outputs:
        inner.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(inner.SerializeToString(), providers=["CPUExecutionProvider"])
    rng, found = np.random.default_rng(0), []
    for sigma in sigmas:
        noisy = (sigma * rng.standard_normal((1, 1, 128, 128))).astype(np.float32)
        feed = {"noisy": noisy, "sigma": np.float32([sigma]), "difficulty": np.float32([DIFFICULTY])}
        found.append(session.run(outputs, feed))
    samples, timesteps, predictions = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return TrainedUNet(module.eval(), shape, samples, timesteps, predictions)


def _named(model: onnx.ModelProto, what: str) -> str:
    """Name of the network's scaled sample, its timestep, or its prediction."""
    nodes = model.graph.node
    if what == "out.2":
        return str(next(node.output[0] for node in nodes if "network.out.2.weight" in node.input))
    if what == "noisy":
        return str(next(node.input[0] for node in nodes if "network.input_blocks.0.0.weight" in node.input))
    log = next(node.output[0] for node in nodes if node.op_type == "Log")
    return str(next(node.output[0] for node in nodes if log in node.input))


def _tensors(model: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    arrays = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    found = {
        name.removeprefix("network."): array
        for name, array in arrays.items()
        if name.startswith("network.") and not name.startswith("network.label_emb.")
    }
    hidden = np.float32([DIFFICULTY]) @ arrays["network.label_emb.0.weight"].T + arrays["network.label_emb.0.bias"]
    label = arrays["network.label_emb.2.weight"] @ (hidden / (1 + np.exp(-hidden))) + arrays["network.label_emb.2.bias"]
    found["time_embed.2.bias"] = found["time_embed.2.bias"] + label
    norms = _folded_norms(model, arrays)
    for name in list(found):
        stem, _, leaf = name.rpartition(".")
        norm = next((f"{stem.removesuffix(conv)}{new}" for conv, new in _NORMS.items() if stem.endswith(conv)), None)
        if norm is not None and leaf == "weight":
            found[f"{norm}.weight"], found[f"{norm}.bias"] = next(norms)
    return found


def _folded_norms(model: onnx.ModelProto, arrays: dict[str, NDArray[np.float32]]) -> Any:
    """Weight and bias of each group norm, in the order of the graph."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in model.graph.node:
        if node.op_type != "InstanceNormalization":
            continue
        (reshape,) = users[node.output[0]]
        (multiply,) = [user for user in users[reshape.output[0]] if user.op_type == "Mul"]
        (add,) = [user for user in users[multiply.output[0]] if user.op_type == "Add"]
        yield arrays[multiply.input[1]].reshape(-1), arrays[add.input[1]].reshape(-1)


def _stored(name: str, array: NDArray[np.float32]) -> StoredTensor:
    return StoredTensor("unet", name, Path(GRAPH), array.shape, "float32", lambda: torch.from_numpy(np.array(array)))
