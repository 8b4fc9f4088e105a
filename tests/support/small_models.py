"""Small models made of a few ONNX operators, for tests of calibration and runtime that need no checkpoint and no torch.

Two models: one conditioned on text, with classifier-free guidance, cross-attention keys and values and time embedding
as separate components; and one without conditioning. Weights are random; latents are [B, 4, h, w], images 2 pixels per
latent.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from ldm_calibration.model import CalibrationModel
from ldm_runtime.bundle import Bundle, file_facts
from ldm_runtime.bundle_layout import MANIFEST, graph_file
from ldm_runtime.manifest import Component, Manifest, Stage
from ldm_runtime.model import ConditioningSpec, Defaults, Latents, ModelDescription
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec

__all__ = ["bundle_of", "text_model", "unconditional_model"]

CHANNELS, WIDTH, TOKENS, HIDDEN = 4, 16, 6, 16
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "green", "circle", "square"]
SCHEDULER = {
    "class": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
BATCH, ROWS = Axis("batch", 1, 1, 4), Axis("batch", 1, 2, 8)
HEIGHT, WIDTH_AXIS = Axis("height", 8, 8, 16), Axis("width", 8, 8, 16)

TEXT_ENCODER = """
<ir_version: 10, opset_import: ["": 20]>
text_encoder (int64[batch, 6] input_ids) => (float[batch, 6, 16] context) {
  embedded = Gather <axis = 0> (embedding, input_ids)
  first = MatMul (embedded, w1)
  active = Sigmoid (first)
  second = MatMul (active, w2)
  third = MatMul (second, w3)
  context = Add (third, embedded)
}
"""
CROSS_ATTENTION_KV = """
<ir_version: 10, opset_import: ["": 20]>
cross_attention_kv (float[batch, 6, 16] context) => (float[batch, 6, 16] kv_0, float[batch, 6, 16] kv_1) {
  kv_0 = MatMul (context, w_key)
  kv_1 = MatMul (context, w_value)
}
"""
TIME_EMBEDDING = """
<ir_version: 10, opset_import: ["": 20]>
time_embedding (int64[batch] timestep) => (float[batch, 16] time_embedding) {
  float_time = Cast <to = 1> (timestep)
  column = Unsqueeze (float_time, last)
  angle = Mul (column, frequencies)
  wave = Sin (angle)
  time_embedding = Gemm (wave, w_time, b_time)
}
"""
BODY = """
  first = Conv <pads = [1, 1, 1, 1]> (sample, conv_in, bias_in)
  spatial_time = Unsqueeze (time_embedding, spatial)
  timed = Add (first, spatial_time)
  gate = Sigmoid (timed)
  silu = Mul (timed, gate)
  middle = Conv <pads = [1, 1, 1, 1]> (silu, conv_mid, bias_mid)
  residual = Add (middle, first)
"""
ATTENTION = """
  flat = Reshape (residual, flat_shape)
  rows = Transpose <perm = [0, 2, 1]> (flat)
  query = MatMul (rows, w_query)
  keys = Transpose <perm = [0, 2, 1]> (kv_0)
  scores = MatMul (query, keys)
  weights = Softmax <axis = -1> (scores)
  mixed = MatMul (weights, kv_1)
  projected = MatMul (mixed, w_out)
  attended = Add (projected, rows)
  columns = Transpose <perm = [0, 2, 1]> (attended)
  shape = Shape (residual)
  features = Reshape (columns, shape)
"""
TAIL = """
  gate_out = Sigmoid (FEATURES)
  silu_out = Mul (FEATURES, gate_out)
  late = Conv <pads = [1, 1, 1, 1]> (silu_out, conv_late, bias_late)
  noise_pred = Conv <pads = [1, 1, 1, 1]> (late, conv_out, bias_out)
}
"""
UNET_HEAD = '<ir_version: 10, opset_import: ["": 20]>\nunet ('
TEXT_UNET = (
    UNET_HEAD
    + "float[batch, 4, height, width] sample, float[batch, 6, 16] kv_0, float[batch, 6, 16] kv_1, "
    + "float[batch, 16] time_embedding) => (float[batch, 4, height, width] noise_pred) {"
    + BODY
    + ATTENTION
    + TAIL.replace("FEATURES", "features")
)
PLAIN_UNET = (
    UNET_HEAD
    + "float[batch, 4, height, width] sample, float[batch, 16] time_embedding) "
    + "=> (float[batch, 4, height, width] noise_pred) {"
    + BODY
    + TAIL.replace("FEATURES", "residual")
)
DECODER = """
<ir_version: 10, opset_import: ["": 20]>
decoder (float[batch, 4, height, width] latents) => (float[batch, 3, image_height, image_width] image) {
  first = Conv <pads = [1, 1, 1, 1]> (latents, conv_in, bias_in)
  active = Tanh (first)
  wide = Resize <mode = "nearest"> (active, , scales)
  middle = Conv <pads = [1, 1, 1, 1]> (wide, conv_mid, bias_mid)
  gate = Sigmoid (middle)
  last = Conv <pads = [1, 1, 1, 1]> (gate, conv_out, bias_out)
  image = Sigmoid (last)
}
"""


def text_model(folder: Path) -> CalibrationModel:
    """Write a model conditioned on text, with fp32 graphs under ``folder``/NAME/fp32.onnx."""
    rng = np.random.default_rng(0)
    context = TensorSpec("context", "float32", (ROWS, TOKENS, HIDDEN))
    kv = tuple(TensorSpec(f"kv_{i}", "float32", (ROWS, TOKENS, HIDDEN)) for i in range(2))
    ids = TensorSpec("input_ids", "int64", (BATCH, TOKENS))
    encoded = TensorSpec("context", "float32", (BATCH, TOKENS, HIDDEN))
    specs = {
        "text_encoder": ComponentSpec("text_encoder", (ids,), (encoded,), "request"),
        "cross_attention_kv": ComponentSpec("cross_attention_kv", (context,), kv, "request"),
        **_denoiser_specs(ROWS, kv),
    }
    matrices = {name: _normal(rng, HIDDEN, HIDDEN) for name in ("w1", "w2", "w3")}
    graphs = {
        "text_encoder": (TEXT_ENCODER, matrices | {"embedding": _normal(rng, len(VOCABULARY), HIDDEN) * 4}),
        "cross_attention_kv": (
            CROSS_ATTENTION_KV,
            {"w_key": _normal(rng, HIDDEN, HIDDEN), "w_value": _normal(rng, HIDDEN, HIDDEN)},
        ),
        **_shared_graphs(rng, TEXT_UNET),
    }
    graphs["unet"][1].update(
        w_query=_normal(rng, WIDTH, HIDDEN),
        w_out=_normal(rng, HIDDEN, WIDTH),
        flat_shape=np.array([0, WIDTH, -1], np.int64),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    conditioning = ConditioningSpec("text", "text_encoder", {"tokenizer": "tokenizer.json"}, ("context",))
    model = ModelDescription(
        "text_to_image",
        specs,
        (conditioning,),
        ("unconditional", "conditional"),
        Latents(CHANNELS, 2),
        SCHEDULER,
        Defaults(10, 0.3, 3.0),
    )
    return CalibrationModel(model, _write(folder, graphs), lambda name: folder / name)


def unconditional_model(folder: Path) -> CalibrationModel:
    """Write a model without conditioning, with fp32 graphs under ``folder``/NAME/fp32.onnx."""
    rng = np.random.default_rng(1)
    graphs = _shared_graphs(rng, PLAIN_UNET)
    model = ModelDescription(
        "unconditional", _denoiser_specs(BATCH, ()), (), (), Latents(CHANNELS, 2), SCHEDULER, Defaults(10)
    )
    return CalibrationModel(model, _write(folder, graphs), lambda name: folder / name)


def _denoiser_specs(rows: Axis, conditioning: tuple[TensorSpec, ...]) -> dict[str, ComponentSpec]:
    noise = (rows, CHANNELS, HEIGHT, WIDTH_AXIS)
    time = TensorSpec("time_embedding", "float32", (rows, WIDTH))
    return {
        "time_embedding": ComponentSpec(
            "time_embedding", (TensorSpec("timestep", "int64", (rows,)),), (time,), "schedule"
        ),
        "unet": ComponentSpec(
            "unet",
            (TensorSpec("sample", "float32", noise), *conditioning, time),
            (TensorSpec("noise_pred", "float32", noise),),
        ),
        "decoder": ComponentSpec(
            "decoder",
            (TensorSpec("latents", "float32", (BATCH, CHANNELS, HEIGHT, WIDTH_AXIS)),),
            (TensorSpec("image", "float32", (BATCH, 3, 2 * HEIGHT, 2 * WIDTH_AXIS)),),
            "image",
        ),
    }


def _shared_graphs(rng: np.random.Generator, unet: str) -> dict[str, tuple[str, dict[str, np.ndarray]]]:
    return {
        "time_embedding": (
            TIME_EMBEDDING,
            {
                "last": np.array([1], np.int64),
                "frequencies": np.geomspace(1e-3, 1, WIDTH, dtype=np.float32)[None],
                "w_time": _normal(rng, WIDTH, WIDTH),
                "b_time": _normal(rng, WIDTH),
            },
        ),
        "unet": (
            unet,
            {
                "conv_in": _kernel(rng, WIDTH, CHANNELS),
                "conv_mid": _kernel(rng, WIDTH, WIDTH),
                "conv_late": _kernel(rng, WIDTH, WIDTH),
                "conv_out": _kernel(rng, CHANNELS, WIDTH),
                "spatial": np.array([2, 3], np.int64),
                **{f"bias_{name}": _normal(rng, WIDTH) for name in ("in", "mid", "late")},
                "bias_out": np.zeros(CHANNELS, np.float32),
            },
        ),
        "decoder": (
            DECODER,
            {
                "conv_in": _kernel(rng, WIDTH, CHANNELS),
                "conv_mid": _kernel(rng, WIDTH, WIDTH),
                "conv_out": _kernel(rng, 3, WIDTH) * 4,
                "scales": np.array([1, 1, 2, 2], np.float32),
                **{f"bias_{name}": _normal(rng, WIDTH) for name in ("in", "mid")},
                "bias_out": np.zeros(3, np.float32),
            },
        ),
    }


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def _kernel(rng: np.random.Generator, out: int, channels: int) -> np.ndarray:
    return (rng.standard_normal((out, channels, 3, 3)) / np.sqrt(9 * channels)).astype(np.float32)


def _write(folder: Path, graphs: dict[str, tuple[str, dict[str, np.ndarray]]]) -> dict[str, Path]:
    files = {}
    for name, (text, weights) in graphs.items():
        proto = onnx.parser.parse_model(text)
        for index, node in enumerate(proto.graph.node):
            node.name = f"{name}.{index}/{node.op_type}"
        proto.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in weights.items())
        files[name] = folder / name / "fp32.onnx"
        files[name].parent.mkdir(parents=True)
        onnx.save(onnx.shape_inference.infer_shapes(proto), files[name])
    return files


def _tokenizer() -> dict[str, object]:
    special = {name: {"id": name, "ids": [VOCABULARY.index(name)], "tokens": [name]} for name in ("[CLS]", "[SEP]")}
    pieces = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special},
        "decoder": None,
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {token: index for index, token in enumerate(VOCABULARY)},
        },
    }


def bundle_of(model: CalibrationModel, folder: Path, quantize: tuple[str, ...]) -> Bundle:
    """Write a bundle of a small model's fp32 graphs into ``folder``; each graph has a stage of its own."""
    for name, graph in model.graphs.items():
        (folder / name).mkdir(parents=True)
        shutil.copyfile(graph, folder / graph_file(name, "fp32"))
    stages = {f"{name}.fp32": Stage(f"key of {name}", (graph_file(name, "fp32"),)) for name in model.graphs}
    for entry in model.model.conditioning:
        for role, file in entry.files.items():
            shutil.copyfile(model.files(file), folder / file)
            stages[role] = Stage(f"key of {role}", (file,))
    description = model.model
    manifest = Manifest(
        family=description.family,
        components={
            name: Component(spec, {"fp32": graph_file(name, "fp32")}) for name, spec in description.components.items()
        },
        conditioning=description.conditioning,
        guidance=description.guidance,
        latents=description.latents,
        scheduler=description.scheduler,
        defaults=description.defaults,
        files=file_facts(folder, [file for stage in stages.values() for file in stage.files]),
        stages=stages,
        request={"precision": "fp32", "quantize": list(quantize)},
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return Bundle.open(folder)
