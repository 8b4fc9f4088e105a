"""Parts that checkpoints of several families share: diffusers' UNets, autoencoders and schedulers.

Older names come from the first diffusers releases (the renames follow diffusers'
``scripts/change_naming_configs_and_checkpoints.py``). Older names of the autoencoder come from CompVis'
latent-diffusion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import diffusers
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler

from ldm_export.checkpoint.json_files import shortened
from ldm_export.checkpoint.layout import CheckpointLayout, Config, FileFolder, ModuleSource, Part, WeightNames
from ldm_runtime.errors import CheckpointError
from ldm_runtime.model import Latents
from ldm_runtime.schedulers import SCHEDULERS

__all__ = [
    "AUTOENCODER",
    "DECODER_MODULE",
    "ENCODER_MODULE",
    "KL_AUTOENCODER",
    "SCHEDULER",
    "UNET",
    "UNET_CONDITION",
    "context_widths",
    "latent_channels",
    "latent_problems",
    "latent_size",
    "latents_of",
    "layout",
    "pixels_per_latent",
    "takes_mask",
    "text_problems",
    "width_problems",
]

MAX_LEVELS = 32
_TEXT_INPUTS = {  # of the UNet, and their kinds that the text encoder's states suffice for
    "encoder_hid_dim_type": (None, "text_proj"),
    "addition_embed_type": (None, "text"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "time_cond_proj_dim": (None,),
}
_UNET_KEYS = {
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
}
_UNET_WEIGHTS = (
    (r"^mid\.", "mid_block."),
    (r"^downsample_blocks\.", "down_blocks."),
    (r"^upsample_blocks\.", "up_blocks."),
    (r"\.op\.", ".conv."),
    (r"\.temb_proj\.", ".time_emb_proj."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
_ATTENTION_WEIGHTS = (  # of diffusers before 0.15
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.(?:q|query)\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.(?:k|key)\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.(?:v|value)\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
)
_AUTOENCODER_WEIGHTS = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.attn\.", r".up_blocks.\1.attentions."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    *_ATTENTION_WEIGHTS,
)


def latent_channels(autoencoder: Config) -> int:
    """Channels of the latents that an autoencoder decodes, from its full config."""
    return int(autoencoder.get("vq_embed_dim") or autoencoder["latent_channels"])


def pixels_per_latent(autoencoder: Config) -> int:
    """Pixels per latent along each side, from an autoencoder's full config."""
    return int(2 ** (len(autoencoder["block_out_channels"]) - 1))


def latents_of(autoencoder: Config) -> Latents:
    """Channels of the latents and pixels per latent, from an autoencoder's full config."""
    return Latents(latent_channels(autoencoder), pixels_per_latent(autoencoder))


def latent_size(unet: Config, autoencoder: Config) -> tuple[int, int]:
    """Height and width of a model's default images in latents, from the full configs.

    They are the UNet's ``sample_size``, one number or a pair. A UNet without one takes the autoencoder's.
    """
    size, factor = unet["sample_size"], 1
    if size is None:
        size, factor = autoencoder["sample_size"], pixels_per_latent(autoencoder)
    height, width = (size, size) if isinstance(size, int) else size
    return (height, width) if factor == 1 else (max(2, height // factor), max(2, width // factor))


def context_widths(unet: Config) -> set[int]:
    """Return the widths of the text encoder's states that a UNet's cross-attention accepts, from its full config.

    With ``encoder_hid_dim`` it is the width before a projection; otherwise each level with cross-attention has its own.
    """
    if unet["encoder_hid_dim"] is not None:
        return {unet["encoder_hid_dim"]}
    down, widths = unet["down_block_types"], unet["cross_attention_dim"]
    if isinstance(widths, int):
        return {widths}
    up, last = tuple(reversed(unet["up_block_types"])), widths[-1:]
    used = [width for kinds in (down, up) for kind, width in zip(kinds, widths, strict=False) if "CrossAttn" in kind]
    return {*used, *(last if "CrossAttn" in (unet["mid_block_type"] or "") else ())}


def latent_problems(unet: Config, autoencoder: Config) -> list[str]:
    """Check that a UNet denoises the latents of an autoencoder, and that their size and scale are usable."""
    latents, scale = latent_channels(autoencoder), autoencoder["scaling_factor"]
    channels = (unet["in_channels"], unet["out_channels"])
    sizes = [config["sample_size"] for config in (unet, autoencoder)]
    size = sizes[0] if sizes[0] is not None else sizes[1]
    checks = (
        (channels == (latents, latents), f"the unet's in and out channels are {channels}, the latents' {latents}"),
        (type(size) is int or len(size) == 2, f"sample_size is {size!r:.80}, expected one number, or height and width"),
        (scale > 0, f"the autoencoder's scaling_factor is {scale}, expected a positive number"),
    )
    return [problem for fine, problem in checks if not fine]


def takes_mask(unet: Config) -> bool:
    """True for the UNet of an inpainting model, which also takes a mask and the latents of the masked image."""
    return bool(unet["in_channels"] == 2 * unet["out_channels"] + 1)


def _without_unet_res(renamed: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Rename block types, which had the prefix "UNetRes"."""
    for key in ("down_block_types", "up_block_types"):
        if isinstance(renamed.get(key), list):
            renamed[key] = [kind.removeprefix("UNetRes") if type(kind) is str else kind for kind in renamed[key]]
    return renamed


def _current_levels(renamed: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Convert CompVis' configs, which state channels as multiples of a base and attention by resolution."""
    if "ch_mult" not in stored or "block_out_channels" in stored:
        return renamed
    base, multiples, attended = stored.get("ch"), stored["ch_mult"], stored.get("attn_resolutions", [])
    lists = isinstance(multiples, list) and isinstance(attended, list) and len(multiples) <= MAX_LEVELS
    if not lists or not all(type(number) is int for number in (base, *multiples, *attended)):
        got = f"ch {base!r}, ch_mult {multiples!r} and attn_resolutions {attended!r}"
        raise CheckpointError(f"autoencoder: config.json: got {got}, expected a whole number and lists of them")
    resolution = stored.get("resolution")
    levels = ["Attn" if resolution in [at * 2**level for at in attended] else "" for level in range(len(multiples))]
    return renamed | {
        "block_out_channels": [int(base or 0) * multiple for multiple in multiples],
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in levels],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(levels)],
    }


def _count_levels_from_latents(name: str, config: Config) -> str:
    """Renumber the decoder's levels: CompVis counts them from the image, diffusers from the latents."""
    last = len(config["block_out_channels"]) - 1
    return re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up.{last - int(match[1])}.", name)


UNET_CONDITION = Part(
    folders=("unet",),
    classes={"UNet2DConditionModel": UNet2DConditionModel},
    older_classes={"UNetConditionalModel": "UNet2DConditionModel"},
    older_keys=_UNET_KEYS,
    current_config=_without_unet_res,
    weights=WeightNames(_UNET_WEIGHTS),
)
"""A UNet with cross-attention."""

UNET = Part(
    folders=("unet",),
    classes={"UNet2DModel": UNet2DModel},
    older_classes={"UNetUnconditionalModel": "UNet2DModel"},
    older_keys=_UNET_KEYS,
    current_config=_without_unet_res,
    weights=WeightNames((*_UNET_WEIGHTS, *_ATTENTION_WEIGHTS)),
)
"""A UNet without cross-attention."""

AUTOENCODER = Part(
    folders=("vqvae", "vae"),
    classes={"AutoencoderKL": AutoencoderKL, "VQModel": VQModel},
    older_keys={
        "out_ch": "out_channels",
        "num_res_blocks": "layers_per_block",
        "z_channels": "latent_channels",
        "resolution": "sample_size",
        "n_embed": "num_vq_embeddings",
        "embed_dim": "vq_embed_dim",
    },
    current_config=_current_levels,
    weights=WeightNames(_AUTOENCODER_WEIGHTS, _count_levels_from_latents, matrices_as_convolutions=True),
)
"""The first stage: an autoencoder with continuous or quantized latents."""

KL_AUTOENCODER = replace(AUTOENCODER, folders=("vae",), classes={"AutoencoderKL": AutoencoderKL})
"""The autoencoder of Stable Diffusion's pipelines."""

DECODER_MODULE = ModuleSource("autoencoder", {"encoder": None, "quant_conv": None})
"""An autoencoder with only the modules that ``decode`` uses."""

ENCODER_MODULE = ModuleSource("autoencoder", {"decoder": None, "post_quant_conv": None, "quantize": None})
"""An autoencoder with only the modules that ``encode`` uses."""

SCHEDULER = Part(
    folders=("scheduler", "noise_scheduler"),
    classes={name: getattr(diffusers, name) for name in SCHEDULERS}
    | {"LMSDiscreteScheduler": LMSDiscreteScheduler},  # which diffusers itself exports only if SciPy is installed
    older_keys={"timesteps": "num_train_timesteps", "clip_predicted_image": "clip_sample"},
    config_file="scheduler_config.json",
)
"""Schedulers that the runtime supports."""


def text_problems(unet: Config, width: int, further: Mapping[str, tuple[str | None, ...]] | None = None) -> list[str]:
    """Check that a UNet takes only latents, timestep and hidden states of a text encoder with a certain width.

    Args:
        unet: Full config of the UNet.
        width: Width of the hidden states.
        further: Option of the UNet -> accepted values, if the pipeline provides further inputs.
    """
    problems = []
    if wrong := sorted(context_widths(unet) - {width}):
        key = "cross_attention_dim" if unet["encoder_hid_dim"] is None else "encoder_hid_dim"
        problems.append(f"the unet's {key} is {wrong[0]}, not the text encoder's {width}")
    if other := [key for key, kinds in {**_TEXT_INPUTS, **(further or {})}.items() if unet[key] not in kinds]:
        problems.append(f"the unet's {shortened(other)} asks for inputs that a text-to-image pipeline does not give")
    return problems


def width_problems(unet: Config, width: int, encoder: str) -> list[str]:
    """Return a problem if a UNet's cross-attention takes another width than an encoder's; empty if they agree."""
    taken = unet["cross_attention_dim"]
    return [] if taken == width else [f"the unet's cross_attention_dim is {taken}, not the {encoder}'s {width}"]


def layout(
    kind: str,
    problems: Callable[[Mapping[str, Config]], list[str]],
    *,
    unet: Part = UNET,
    parts: Mapping[str, Part] | None = None,
    modules: Mapping[str, ModuleSource] | None = None,
    files: Mapping[str, FileFolder] | None = None,
) -> CheckpointLayout:
    """Create the layout of a family's checkpoints: a UNet, an autoencoder, a scheduler, and the family's own parts.

    Args:
        kind, problems, files: As in ``CheckpointLayout``.
        unet: The part "unet".
        parts: Further parts with weights; they come first.
        modules: Further modules; they come first.
    """
    return CheckpointLayout(
        kind=kind,
        parts={**(parts or {}), "unet": unet, "autoencoder": AUTOENCODER},
        scheduler=SCHEDULER,
        files=files or {},
        modules={
            **(modules or {}),
            "unet": ModuleSource("unet"),
            "autoencoder": ModuleSource("autoencoder"),
            "decoder": DECODER_MODULE,
        },
        problems=problems,
    )
