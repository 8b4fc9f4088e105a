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

from ldm_calibration.model import CalibrationModel
from ldm_runtime.bundle import Bundle, file_facts
from ldm_runtime.bundle_layout import MANIFEST, graph_file
from ldm_runtime.manifest import Component, Manifest, StageFact
from ldm_runtime.model import ConditioningSpec, Defaults, Latents, ModelDescription
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec
from tests.support.small_graphs import CHANNELS, HIDDEN, TOKENS, WIDTH, shared_graphs, text_graphs, write_graphs

__all__ = ["bundle_of", "text_model", "unconditional_model"]

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


def text_model(folder: Path) -> CalibrationModel:
    """Write a model conditioned on text, with fp32 graphs under ``folder``/NAME/fp32.onnx."""
    context = TensorSpec("context", "float32", (ROWS, TOKENS, HIDDEN))
    kv = tuple(TensorSpec(f"kv_{i}", "float32", (ROWS, TOKENS, HIDDEN)) for i in range(2))
    ids = TensorSpec("input_ids", "int64", (BATCH, TOKENS))
    encoded = TensorSpec("context", "float32", (BATCH, TOKENS, HIDDEN))
    specs = {
        "text_encoder": ComponentSpec("text_encoder", (ids,), (encoded,), "request"),
        "cross_attention_kv": ComponentSpec("cross_attention_kv", (context,), kv, "request"),
        **_denoiser_specs(ROWS, kv),
    }
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
    return CalibrationModel(model, write_graphs(folder, text_graphs(len(VOCABULARY))), lambda name: folder / name)


def unconditional_model(folder: Path) -> CalibrationModel:
    """Write a model without conditioning, with fp32 graphs under ``folder``/NAME/fp32.onnx."""
    graphs = shared_graphs(np.random.default_rng(1))
    model = ModelDescription(
        "unconditional", _denoiser_specs(BATCH, ()), (), (), Latents(CHANNELS, 2), SCHEDULER, Defaults(10)
    )
    return CalibrationModel(model, write_graphs(folder, graphs), lambda name: folder / name)


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
    stages = {f"{name}.fp32": StageFact(f"key of {name}", (graph_file(name, "fp32"),)) for name in model.graphs}
    for entry in model.model.conditioning:
        for role, file in entry.files.items():
            shutil.copyfile(model.files(file), folder / file)
            stages[role] = StageFact(f"key of {role}", (file,))
    description = model.model
    manifest = Manifest(
        family=description.family,
        components={
            name: Component(spec, {"fp32": graph_file(name, "fp32")}) for name, spec in description.components.items()
        },
        conditioning=description.conditioning,
        guidance=description.guidance,
        guidance_above_one=description.guidance_above_one,
        latents=description.latents,
        scheduler=description.scheduler,
        defaults=description.defaults,
        files=file_facts(folder, [file for stage in stages.values() for file in stage.files]),
        stages=stages,
        request={"precision": "fp32", "quantize": list(quantize)},
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return Bundle.open(folder)
