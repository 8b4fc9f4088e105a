"""A checkpoint folder of a latent diffusion model: its components, their classes and configs, checked before any use.

Two layouts are published: ``CompVis/ldm-text2im-large-256`` (today's names) and the older
``fusing/latent-diffusion-text2im-large``, whose configs use the names of the first diffusers releases (the renames
follow diffusers' ``scripts/change_naming_configs_and_checkpoints.py``; the autoencoder's are those of CompVis).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig

from ldm_export.checkpoint.weights import read_json, shortened, weight_file
from ldm_runtime.errors import CheckpointError

log = logging.getLogger(__name__)

PIPELINES = ("LDMTextToImagePipeline", "LatentDiffusionPipeline", "LatentDiffusion")
"""The pipeline's name today, and the two it had in the first diffusers releases."""

_FOLDERS = {
    "text_encoder": ("bert", "text_encoder"),
    "unet": ("unet",),
    "autoencoder": ("vqvae", "vae"),
    "scheduler": ("scheduler", "noise_scheduler"),
    "tokenizer": ("tokenizer",),
}
_OLDER_CLASSES = {"UNetConditionalModel": "UNet2DConditionModel"}
_CLASSES: dict[str, dict[str, Any]] = {  # class name → what its config's keys are the arguments of
    "text_encoder": {"LDMBertModel": LDMBertConfig},
    "unet": {"UNet2DConditionModel": UNet2DConditionModel, "UNetConditionalModel": UNet2DConditionModel},
    "autoencoder": {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel},
    "scheduler": {"DDIMScheduler": DDIMScheduler},
}
_RENAMED = {
    "text_encoder": {
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
        "intermediate_size": "encoder_ffn_dim",
    },
    "unet": {
        "image_size": "sample_size",
        "num_res_blocks": "layers_per_block",
        "block_channels": "block_out_channels",
        "down_blocks": "down_block_types",
        "up_blocks": "up_block_types",
        "downscale_freq_shift": "freq_shift",
        "resnet_num_groups": "norm_num_groups",
        "resnet_act_fn": "act_fn",
        "resnet_eps": "norm_eps",
        "num_head_channels": "attention_head_dim",
    },
    "autoencoder": {
        "out_ch": "out_channels",
        "num_res_blocks": "layers_per_block",
        "z_channels": "latent_channels",
        "resolution": "sample_size",
        "n_embed": "num_vq_embeddings",
        "embed_dim": "vq_embed_dim",
    },
    "scheduler": {"timesteps": "num_train_timesteps", "clip_predicted_image": "clip_sample"},
}
_COUNTS = {"encoder_layers": 512, "layers_per_block": 32, "transformer_layers_per_block": 32}  # and the most of each
_SIZES = (
    *("sample_size", "in_channels", "out_channels", "block_out_channels", "norm_num_groups", "latent_channels"),
    *("cross_attention_dim", "attention_head_dim", "num_attention_heads", "num_vq_embeddings", "vq_embed_dim"),
    *("vocab_size", "max_position_embeddings", "d_model", "encoder_ffn_dim", "encoder_attention_heads", "head_dim"),
    "num_train_timesteps",
)
_LARGEST, _LONGEST, _MOST_STEPS = 2**24, 32, 2**16  # of a number, of a list, of the list of trained betas
_LISTS = {*_COUNTS, *_SIZES, "only_cross_attention"}  # one value, or one for each level
_OTHER_INPUTS = ("encoder_hid_dim_type", "class_embed_type", "addition_embed_type", "num_class_embeds")


@dataclass(frozen=True)
class Component:
    """A part with weights: its name, its folder, its class and every argument of that class, defaults filled in."""

    name: str
    folder: Path
    class_name: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder says, all of it checked except the weights.

    ``components`` has text_encoder (LDMBertModel), unet (UNet2DConditionModel) and autoencoder (AutoencoderKL or
    VQModel), with configs in today's names. ``tokenizer`` is the folder with ``vocab.txt``. ``scheduler_config`` has
    every argument of diffusers' DDIMScheduler. With a ``random_seed`` weights are drawn instead of read.
    """

    folder: Path
    components: Mapping[str, Component]
    tokenizer: Path
    scheduler_config: Mapping[str, Any]
    random_seed: int | None = None


def open_checkpoint(folder: Path, *, random_weights: bool = False, seed: int = 0) -> Checkpoint:
    """Read and check a checkpoint's configs; with ``random_weights`` they are enough, no weights are looked for.

    Raises:
        CheckpointError: no checkpoint, another pipeline or class than the supported ones, a folder or file missing,
            a config that is damaged, holds values of a wrong type or size, or does not fit the other components.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is {'a file' if folder.exists() else 'missing'}, expected a checkpoint folder")
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder} is empty, expected a checkpoint with model_index.json and its components")
    index = read_json(folder / "model_index.json", "checkpoint")
    if index.get("_class_name") not in PIPELINES:
        raise CheckpointError(
            f"{folder}: model_index.json is of a {index.get('_class_name')!r}, expected {PIPELINES[0]} (or its older "
            f"names {', '.join(PIPELINES[1:])}); use a checkpoint of a text-to-image latent diffusion model"
        )
    components = {name: _component(folder, index, name) for name in ("text_encoder", "unet", "autoencoder")}
    _check_together(folder, {name: component.config for name, component in components.items()})
    scheduler, tokenizer = _component(folder, index, "scheduler"), _entry(folder, index, "tokenizer")[0]
    if not random_weights:
        for component in components.values():
            weight_file(component.folder, component.name)
        if not any((tokenizer / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
            raise CheckpointError(f"tokenizer: no vocab.txt or tokenizer.json in {tokenizer}; download it whole")
    return Checkpoint(folder, components, tokenizer, scheduler.config, seed if random_weights else None)


def _entry(folder: Path, index: dict[str, Any], name: str) -> tuple[Path, str]:
    """A component's folder and the class model_index.json gives it."""
    where = folder / "model_index.json"
    key = next((key for key in _FOLDERS[name] if key in index), None)
    if key is None:
        raise CheckpointError(f"{name}: {where} has no {' or '.join(_FOLDERS[name])}; download the checkpoint whole")
    entry = index[key]
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        raise CheckpointError(f'{name}: {where}: got "{key}": {entry!r}, expected [library, class]')
    if not (folder / key).is_dir():
        raise CheckpointError(f"{name}: folder {folder / key} is missing; download the checkpoint whole")
    return folder / key, entry[1]


def _component(folder: Path, index: dict[str, Any], name: str) -> Component:
    place, class_name = _entry(folder, index, name)
    file = place / ("scheduler_config.json" if name == "scheduler" else "config.json")
    given = read_json(file, name)
    classes = _CLASSES[name]
    for found in (class_name, given.get("_class_name", class_name)):
        if found not in tuple(classes) or classes[found] is not classes.get(class_name):
            expected = f"{class_name} as in model_index.json" if class_name in classes else " or ".join(classes)
            raise CheckpointError(f"{name}: {file}: got class {found!r}, expected {expected}; no other is supported")
    config = _named_as_today(name, {key: value for key, value in given.items() if not key.startswith("_")})
    parameters = inspect.signature(classes[class_name].__init__).parameters.values()
    full = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    for key, value in config.items():
        if key in full:
            _check_value(f"{name}: {file}: {key}", key, value, full[key])
            full[key] = tuple(value) if isinstance(value, list) else value
    if unknown := set(config) - set(full):
        log.info("%s: %s: ignored %s", name, file, shortened(unknown))
    return Component(name, place, _OLDER_CLASSES.get(class_name, class_name), full)


def _named_as_today(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config under today's names; a key already under its name of today stays as it is."""
    renamed = {_RENAMED[name].get(key, key): value for key, value in config.items()} | {
        key: value for key, value in config.items() if key not in _RENAMED[name]
    }
    for key in ("down_block_types", "up_block_types"):
        if isinstance(renamed.get(key), list):
            renamed[key] = [kind.removeprefix("UNetRes") if type(kind) is str else kind for kind in renamed[key]]
    if name != "autoencoder" or "ch_mult" not in config or "block_out_channels" in config:
        return renamed
    base, multiples, attended = config.get("ch"), config["ch_mult"], config.get("attn_resolutions", [])
    lists = isinstance(multiples, list) and isinstance(attended, list) and len(multiples) <= _LONGEST
    if not lists or not all(type(number) is int for number in (base, *multiples, *attended)):
        got = f"ch {base!r}, ch_mult {multiples!r} and attn_resolutions {attended!r}"
        raise CheckpointError(f"autoencoder: config.json: got {got}, expected a whole number and lists of them")
    resolution = config.get("resolution")
    levels = ["Attn" if resolution in [at * 2**level for at in attended] else "" for level in range(len(multiples))]
    return renamed | {
        "block_out_channels": [base * multiple for multiple in multiples],
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in levels],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(levels)],
    }


def _check_value(where: str, key: str, value: Any, default: Any) -> None:
    """Check a config's value against the type of its default, and sizes and counts against sane bounds."""
    if key == "trained_betas" and value is not None:
        default = (0.0,)
    like = default[0] if isinstance(default, tuple) else default
    if key in _COUNTS or key in _SIZES:
        most = _COUNTS.get(key, _LARGEST)
        fits, expected = (lambda given: type(given) is int and 1 <= given <= most), f"a whole number from 1 to {most}"
    elif isinstance(like, bool):
        fits, expected = (lambda given: isinstance(given, bool)), "true or false"
    elif isinstance(like, str):
        fits, expected = (lambda given: isinstance(given, str)), "a string"
    elif like is None:
        fits, expected = (lambda given: isinstance(given, bool | str) or _is_number(given)), "a string or a number"
    else:
        fits, expected = _is_number, f"a number from -{_LARGEST} to {_LARGEST}"
    if isinstance(value, list):
        longest = _MOST_STEPS if key == "trained_betas" else _LONGEST
        fine = default is None or isinstance(default, tuple) or key in _LISTS
        fine = fine and 1 <= len(value) <= longest and all(map(fits, value))
    else:
        fine = (value is None and default is None) or (not isinstance(default, tuple) and fits(value))
    if not fine:
        expected = f"a list, each of it {expected}" if isinstance(default, tuple) else expected
        got = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}…"
        raise CheckpointError(f"{where}: got {got}, expected {expected}; correct the config or download it again")


def _is_number(given: Any) -> bool:
    return type(given) in (int, float) and abs(given) <= _LARGEST  # not so for NaN


def _check_together(folder: Path, configs: dict[str, Mapping[str, Any]]) -> None:
    """Check that the components fit each other, and that the UNet needs no input the pipeline does not give."""
    text, unet, autoencoder = (configs[name] for name in ("text_encoder", "unet", "autoencoder"))
    latents = autoencoder.get("vq_embed_dim") or autoencoder["latent_channels"]
    channels = (unet["in_channels"], unet["out_channels"])
    width, size, scale = unet["cross_attention_dim"], unet["sample_size"], autoencoder["scaling_factor"]
    other = [key for key in _OTHER_INPUTS if unet[key] is not None]
    for fine, problem in (
        (
            width == text["d_model"],
            f"the unet's cross_attention_dim is {width}, not the text encoder's {text['d_model']}",
        ),
        (channels == (latents, latents), f"the unet's in and out channels are {channels}, the latents' {latents}"),
        (type(size) is int, f"the unet's sample_size is {size!r}, expected one number, the latents' height and width"),
        (scale > 0, f"the autoencoder's scaling_factor is {scale}, expected a positive number"),
        (not other, f"the unet's {shortened(other)} asks for inputs that a text-to-image pipeline does not give"),
    ):
        if not fine:
            raise CheckpointError(f"{folder}: {problem}; use the components of one text-to-image checkpoint")
