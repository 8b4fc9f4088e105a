"""A small bundle of hand-written graphs: an unconditional model that runs without torch, tokenizers or a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ldm_runtime.bundle import Bundle, file_facts
from ldm_runtime.bundle_layout import MANIFEST, graph_file
from ldm_runtime.manifest import Component, Manifest
from ldm_runtime.model import Defaults, Latents
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec

__all__ = ["SPECS", "VARIANT", "write_small_bundle"]

CHANNELS, WIDTH, FACTOR = 4, 8, 2
VARIANT = "onnxruntime-cpu"
BATCH, ROWS = Axis("batch", 1, 1, 8), Axis("batch", 1, 1, 16)
HEIGHT, SIDE = Axis("height", 2, 4, 16), Axis("width", 2, 4, 16)
LATENTS = ("float32", (BATCH, CHANNELS, HEIGHT, SIDE))
SCHEDULER = {
    "class": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
SPECS = {
    "time_embedding": ComponentSpec(
        "time_embedding",
        (TensorSpec("timestep", "int64", (ROWS,)),),
        (TensorSpec("time_embedding", "float32", (ROWS, WIDTH)),),
        "schedule",
    ),
    "unet": ComponentSpec(
        "unet",
        (TensorSpec("sample", *LATENTS), TensorSpec("time_embedding", "float32", (BATCH, WIDTH))),
        (TensorSpec("noise_pred", *LATENTS),),
        "step",
    ),
    "decoder": ComponentSpec(
        "decoder",
        (TensorSpec("latents", *LATENTS),),
        (TensorSpec("image", "float32", (BATCH, 3, HEIGHT * FACTOR, SIDE * FACTOR)),),
        "image",
    ),
    "step": ComponentSpec(
        "step",
        (TensorSpec("sample", *LATENTS), TensorSpec("noise_pred", *LATENTS)),
        (TensorSpec("next_sample", *LATENTS),),
        "step",
    ),
}
"""Component -> spec, in the manifest's order. "step" is a step graph, which the pipeline does not run itself."""


def write_small_bundle(folder: Path, *precisions: str, seed: int = 0) -> Bundle:
    """Write a bundle with fp32 graphs; each of ``precisions`` names the fp32 graph too. The UNet has a variant.

    ``seed`` decides the weights.
    """
    rng = np.random.default_rng(seed)
    models = {
        "time_embedding": _time_embedding(rng),
        "unet": _unet(rng),
        "decoder": _decoder(rng),
        "step": [helper.make_node("Sub", ["sample", "noise_pred"], ["next_sample"], name="step/Sub")],
    }
    components = {}
    for name, spec in SPECS.items():
        graphs = dict.fromkeys(("fp32", *precisions), graph_file(name, "fp32"))
        variants = {VARIANT: {"fp32": graph_file(name, "fp32", VARIANT)}} if name == "unet" else {}
        for file in {*graphs.values(), *(one["fp32"] for one in variants.values())}:
            _save(spec, models[name], folder / file)
        components[name] = Component(spec, graphs, variants=variants)
    files = [str(path.relative_to(folder)) for path in folder.rglob("*.onnx")]
    manifest = Manifest(
        family="unconditional",
        components=components,
        conditioning=(),
        guidance=(),
        latents=Latents(CHANNELS, FACTOR),
        scheduler=SCHEDULER,
        files=file_facts(folder, files),
        defaults=Defaults(num_inference_steps=4),
        request={"precision": (*precisions, "fp32")[0]},
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return Bundle.open(folder)


Nodes = list[onnx.NodeProto]


def _time_embedding(rng: np.random.Generator) -> Nodes:
    return [
        helper.make_node("Cast", ["timestep"], ["float"], name="time/Cast", to=TensorProto.FLOAT),
        _constant("thousandth", np.float32(0.001)),
        helper.make_node("Mul", ["float", "thousandth"], ["scaled"], name="time/Mul"),
        _constant("axis", np.array([1], np.int64)),
        helper.make_node("Unsqueeze", ["scaled", "axis"], ["column"], name="time/Unsqueeze"),
        _constant("time_weights", rng.standard_normal((1, WIDTH)).astype(np.float32)),
        helper.make_node("MatMul", ["column", "time_weights"], ["time_embedding"], name="time/MatMul"),
    ]


def _unet(rng: np.random.Generator) -> Nodes:
    return [
        _constant("projection", rng.standard_normal((WIDTH, CHANNELS)).astype(np.float32)),
        helper.make_node("MatMul", ["time_embedding", "projection"], ["shift"], name="unet/MatMul"),
        _constant("axes", np.array([2, 3], np.int64)),
        helper.make_node("Unsqueeze", ["shift", "axes"], ["shifts"], name="unet/Unsqueeze"),
        _constant("kernel", (0.1 * rng.standard_normal((CHANNELS, CHANNELS, 3, 3))).astype(np.float32)),
        helper.make_node("Conv", ["sample", "kernel"], ["convolved"], name="unet/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["convolved", "shifts"], ["noise_pred"], name="unet/Add"),
    ]


def _decoder(rng: np.random.Generator) -> Nodes:
    return [
        _constant("colours", (0.5 * rng.standard_normal((3, CHANNELS, 1, 1))).astype(np.float32)),
        helper.make_node("Conv", ["latents", "colours"], ["small"], name="decoder/Conv"),
        _constant("scales", np.array([1, 1, FACTOR, FACTOR], np.float32)),
        helper.make_node("Resize", ["small", "", "scales"], ["large"], name="decoder/Resize", mode="nearest"),
        helper.make_node("Sigmoid", ["large"], ["image"], name="decoder/Sigmoid"),
    ]


def _constant(name: str, value: np.ndarray | np.generic) -> onnx.NodeProto:
    tensor = numpy_helper.from_array(np.asarray(value), name)
    return helper.make_node("Constant", [], [name], name=f"{name}/Constant", value=tensor)


def _save(spec: ComponentSpec, nodes: Nodes, target: Path) -> None:
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}

    def value(tensor: TensorSpec) -> onnx.ValueInfoProto:
        shape = [dim.symbol if isinstance(dim, Axis) else dim for dim in tensor.shape]
        return helper.make_tensor_value_info(tensor.name, kinds[tensor.dtype], shape)

    graph = helper.make_graph(nodes, spec.name, [*map(value, spec.inputs)], [*map(value, spec.outputs)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, target)
