"""A small latent diffusion model in NumPy, whose rows do not depend on the other rows of a call, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.backends import Feed, SpecBackend
from ldm_runtime.model import ConditioningSpec, Defaults, Latents, ModelDescription
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec, check_feed

__all__ = [
    "FACTOR",
    "IN_SIGMAS",
    "SCHEDULERS",
    "FunctionBackend",
    "description",
    "numpy_pipeline",
    "write_tokenizer",
    "write_unet",
]

TOKENS, WIDTH, CHANNELS, FACTOR = 6, 4, 4, 2
BATCH = Axis("batch", 1, 2, 64)
IMAGES = Axis("images", 1, 1, 32)
HEIGHT, SIDE = Axis("height", 2, 6, 32), Axis("width", 2, 6, 32)
SCHEDULERS: Mapping[str, dict[str, Any]] = {
    "ddim": {"class": "DDIMScheduler", "clip_sample": False},
    "ddim_clipped": {"class": "DDIMScheduler", "clip_sample": True},
    "pndm": {"class": "PNDMScheduler", "skip_prk_steps": True},
    "pndm_runge_kutta": {"class": "PNDMScheduler"},
    "dpm": {"class": "DPMSolverMultistepScheduler"},
    "dpm_sde": {"class": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
    "dpm_3": {"class": "DPMSolverMultistepScheduler", "solver_order": 3},
    "ddpm": {"class": "DDPMScheduler", "clip_sample": False},
    "euler": {"class": "EulerDiscreteScheduler"},
    "euler_ancestral": {"class": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "lms": {"class": "LMSDiscreteScheduler", "use_karras_sigmas": True},
    "heun": {"class": "HeunDiscreteScheduler"},
    "unipc": {"class": "UniPCMultistepScheduler"},
    "lcm": {"class": "LCMScheduler"},
    "tcd": {"class": "TCDScheduler"},
}
IN_SIGMAS = ("euler", "euler_ancestral", "lms", "heun")
"""Schedulers that scale the noise and the UNet's input; "text_to_image" takes none of them, other families do."""


class FunctionBackend(SpecBackend):
    """Runs a NumPy function as a component, and checks its inputs as an engine does."""

    def __init__(self, spec: ComponentSpec, function: Callable[..., Any]):
        self._spec, self._function = spec, function
        self.calls: list[dict[str, NDArray[Any]]] = []
        """Inputs of every call."""

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Call the function with the inputs in the order of the spec."""
        check_feed(self._spec, feed)
        self.calls.append(dict(feed))
        results = self._function(*(feed[tensor.name] for tensor in self._spec.inputs))
        every = results if isinstance(results, tuple) else (results,)
        return {tensor.name: one for tensor, one in zip(self._spec.outputs, every, strict=True)}

    def close(self) -> None:
        """Nothing to free."""


def description(
    *, text: bool = True, scheduler: Mapping[str, Any] = SCHEDULERS["ddim"], image_channels: int = 3
) -> ModelDescription:
    """The model's description: conditioned on text with guidance, or unconditional."""

    def f32(name: str, *shape: Any) -> TensorSpec:
        return TensorSpec(name, "float32", shape)

    kv = [f32("kv.0", BATCH, TOKENS, WIDTH)] if text else []
    sample, embedding = f32("sample", BATCH, CHANNELS, HEIGHT, SIDE), f32("time_embedding", BATCH, 3)
    noise, features = f32("noise_pred", *sample.shape), f32("deep_features", *sample.shape)
    components = [
        ComponentSpec("time_embedding", (TensorSpec("timestep", "float32", (BATCH,)),), (embedding,), "schedule"),
        ComponentSpec("unet", (sample, *kv, embedding), (noise, features), "step"),
        ComponentSpec("shallow_unet", (sample, embedding, features), (noise,), "step"),
        ComponentSpec(
            "decoder",
            (f32("latents", IMAGES, CHANNELS, HEIGHT, SIDE),),
            (f32("image", IMAGES, image_channels, HEIGHT * FACTOR, SIDE * FACTOR),),
            "image",
        ),
    ]
    if text:
        ids, context = TensorSpec("input_ids", "int64", (BATCH, TOKENS)), f32("context", BATCH, TOKENS, WIDTH)
        components.insert(0, ComponentSpec("text_encoder", (ids,), (context,), "request"))
        components.insert(1, ComponentSpec("cross_attention_kv", (context,), tuple(kv), "request"))
    scaled = scheduler["class"] in [SCHEDULERS[name]["class"] for name in IN_SIGMAS]
    entry = ConditioningSpec("text", "text_encoder", {"tokenizer": "tokenizer.json"}, ("context",))
    return ModelDescription(
        family=("stable_diffusion" if scaled else "text_to_image") if text else "unconditional",
        components={spec.name: spec for spec in components},
        conditioning=(entry,) if text else (),
        guidance=("unconditional", "conditional") if text else (),
        latents=Latents(CHANNELS, FACTOR),
        scheduler=scheduler,
        defaults=Defaults(6, 0.0, 1.0),
    )


def numpy_pipeline(
    folder: Path, *, text: bool = True, scheduler: Mapping[str, Any] = SCHEDULERS["ddim"], image_channels: int = 3
) -> LatentDiffusionPipeline:
    """A pipeline of the model; its tokenizer is written into ``folder``."""
    model = description(text=text, scheduler=scheduler, image_channels=image_channels)

    def decode(latents: NDArray[Any]) -> NDArray[Any]:
        repeated = latents.repeat(FACTOR, 2).repeat(FACTOR, 3)[:, np.arange(image_channels) % CHANNELS]
        return np.asarray(repeated * np.float32(0.2) + np.float32(0.5), np.float32)

    functions: dict[str, Callable[..., Any]] = {
        "text_encoder": lambda ids: np.asarray(ids[:, :, None] * np.linspace(-0.02, 0.03, WIDTH), np.float32),
        "cross_attention_kv": lambda context: context * np.float32(0.5),
        "time_embedding": lambda t: np.asarray(t[:, None] * np.array([1e-3, 2e-3, -1e-3]), np.float32),
        "unet": _predict,
        "shallow_unet": _finish,
        "decoder": decode,
    }
    backends = {name: FunctionBackend(spec, functions[name]) for name, spec in model.components.items()}
    if text:
        write_tokenizer(folder / "tokenizer.json")
    return LatentDiffusionPipeline(model, backends, lambda name: folder / name)


def _predict(sample: NDArray[Any], *rest: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """A rational function of sample, context and time; additions and multiplications are the same at every position.

    The second result are its deep features, which do not depend on all of the sample's changes.
    """
    shift = (rest[-1][:, 0] + rest[-1][:, 1]).reshape(-1, 1, 1, 1)
    if len(rest) == 2:
        shift = shift + rest[0][:, 1, :, None, None] * np.float32(4)
    x = sample + shift
    features = np.asarray(x / (1 + x * x), np.float32)
    return _finish(sample, rest[-1], features), features


def _finish(sample: NDArray[Any], embedding: NDArray[Any], features: NDArray[Any]) -> NDArray[Any]:
    """The shallow layers: prediction from the sample, time and deep features."""
    return np.asarray(features + embedding[:, 2].reshape(-1, 1, 1, 1) + np.float32(0.3) * sample, np.float32)


def write_tokenizer(path: Path) -> None:
    """Write a BERT tokenizer of single letters."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*special, *letters, *(f"##{letter}" for letter in letters)]
    ids = {token: index for index, token in enumerate(vocabulary)}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": ids[token], "content": token, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for token in special
        ],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in ("[CLS]", "[SEP]")},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }
    path.write_text(json.dumps(document), encoding="utf-8")


def write_unet(path: Path, component: str = "unet") -> ComponentSpec:
    """Write the text-conditioned UNet or its shallow layers as an ONNX graph, equal to NumPy except for rounding."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    spec = description().components[component]
    constants = {
        "four": np.array(4, np.float32),
        "one": np.array(1, np.float32),
        "share": np.array(0.3, np.float32),
        "token": np.array(1, np.int64),
        "plane": np.array([2, 3], np.int64),
        "weights": np.array([[1], [1], [0]], np.float32),
        "last": np.array([[0], [0], [1]], np.float32),
    }
    deep = [
        ("MatMul", ["time_embedding", "weights"], "time"),
        ("Gather", ["kv.0", "token"], "chosen"),
        ("Mul", ["chosen", "four"], "context"),
        ("Add", ["time", "context"], "shift_flat"),
        ("Unsqueeze", ["shift_flat", "plane"], "shift"),
        ("Add", ["sample", "shift"], "x"),
        ("Mul", ["x", "x"], "square"),
        ("Add", ["one", "square"], "below"),
        ("Div", ["x", "below"], "deep_features"),
    ]
    finish = [
        ("MatMul", ["time_embedding", "last"], "late_flat"),
        ("Unsqueeze", ["late_flat", "plane"], "late"),
        ("Add", ["deep_features", "late"], "shifted"),
        ("Mul", ["sample", "share"], "kept"),
        ("Add", ["shifted", "kept"], "noise_pred"),
    ]
    nodes = [*deep, *finish] if component == "unet" else finish
    model_nodes = [
        helper.make_node(kind, inputs, [output], name=output, **({"axis": 1} if kind == "Gather" else {}))
        for kind, inputs, output in nodes
    ]

    def value(tensor: TensorSpec) -> onnx.ValueInfoProto:
        shape = [dim.symbol if isinstance(dim, Axis) else dim for dim in tensor.shape]
        return helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, shape)

    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(
        model_nodes,
        component,
        [value(tensor) for tensor in spec.inputs],
        [value(tensor) for tensor in spec.outputs],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return spec
