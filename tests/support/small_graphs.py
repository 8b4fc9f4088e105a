"""ONNX graphs of the small models: their text form and random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

__all__ = ["CHANNELS", "HIDDEN", "TOKENS", "WIDTH", "Graph", "shared_graphs", "text_graphs", "write_graphs"]

Graph = tuple[str, dict[str, np.ndarray]]
"""ONNX in its text form, and the initializers by name."""
CHANNELS, WIDTH, TOKENS, HIDDEN = 4, 16, 6, 16

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


def text_graphs(vocabulary: int) -> dict[str, Graph]:
    """Graphs of the model conditioned on text, by component."""
    rng = np.random.default_rng(0)
    matrices = {name: _normal(rng, HIDDEN, HIDDEN) for name in ("w1", "w2", "w3")}
    graphs = {
        "text_encoder": (TEXT_ENCODER, matrices | {"embedding": _normal(rng, vocabulary, HIDDEN) * 4}),
        "cross_attention_kv": (
            CROSS_ATTENTION_KV,
            {"w_key": _normal(rng, HIDDEN, HIDDEN), "w_value": _normal(rng, HIDDEN, HIDDEN)},
        ),
        **shared_graphs(rng, TEXT_UNET),
    }
    graphs["unet"][1].update(
        w_query=_normal(rng, WIDTH, HIDDEN),
        w_out=_normal(rng, HIDDEN, WIDTH),
        flat_shape=np.array([0, WIDTH, -1], np.int64),
    )
    return graphs


def shared_graphs(rng: np.random.Generator, unet: str = PLAIN_UNET) -> dict[str, Graph]:
    """Graphs of time embedding, UNet and decoder, by component."""
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


def write_graphs(folder: Path, graphs: dict[str, Graph]) -> dict[str, Path]:
    """Write each graph to ``folder``/NAME/fp32.onnx."""
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
