"""The torch modules of a checkpoint, one component at a time: checked on the meta device, then filled tensor by tensor.

Nothing is allocated before the config's sizes and the files' tensors are known to agree, and no second copy of the
weights is held: peak memory is the component in float32 and its largest tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import nn
from torch.overrides import TorchFunctionMode

from ldm_export.checkpoint.folder import Checkpoint, Component
from ldm_export.checkpoint.weights import DTYPES, StoredTensor, read_weights, shortened
from ldm_runtime.errors import CheckpointError, SpecError

MAX_BYTES = 64 * 2**30
"""Largest component in float32, in bytes; the published UNet has 3.5 GB."""

_PARTS = {  # module → (component, parts of it that are left out, with a stand-in where its class expects a module)
    "text_encoder": ("text_encoder", {"to_logits": nn.Identity}),
    "unet": ("unet", {}),
    "autoencoder": ("autoencoder", {}),
    "decoder": ("autoencoder", {"encoder": None, "quant_conv": None}),
}
_UNET_NAMES = (  # of the first diffusers releases → of today
    (r"^mid\.", "mid_block."),
    (r"^downsample_blocks\.", "down_blocks."),
    (r"^upsample_blocks\.", "up_blocks."),
    (r"\.op\.", ".conv."),
    (r"\.temb_proj\.", ".time_emb_proj."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
_AUTOENCODER_NAMES = (  # of CompVis, and of diffusers' attention before 0.15 → of today
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
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.(?:q|query)\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.(?:k|key)\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.(?:v|value)\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
)


def load_module(checkpoint: Checkpoint, name: str) -> nn.Module:
    """The module ``name``, float32 on the CPU, in eval mode and without gradients.

    text_encoder: an LDMBertModel without its unused ``to_logits`` head. unet: a UNet2DConditionModel. autoencoder: an
    AutoencoderKL or VQModel. decoder: the same with what ``decode`` uses only; the rest may be absent from the files.

    Raises:
        CheckpointError: the config describes no module, or one above MAX_BYTES; tensors are missing, left over,
            misshapen, of another dtype than DTYPES, or not finite; the files cannot be read (``read_weights``).
        SpecError: there is no module of that name.
    """
    if name not in _PARTS:
        raise SpecError(f"module {name!r} is none of {', '.join(_PARTS)}")
    component = checkpoint.components[_PARTS[name][0]]
    with torch.device("meta"):
        module = _built(component)
    size = sum(4 * tensor.numel() for tensor in module.state_dict().values())
    if size > MAX_BYTES:
        raise CheckpointError(
            f"{name}: {component.folder / 'config.json'} describes {size / 2**30:.0f} GiB of float32 weights, expected "
            f"at most {MAX_BYTES / 2**30:.0f}; correct the config"
        )
    if checkpoint.random_seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(checkpoint.random_seed)
            module = _without_parts(_built(component), name)
    else:
        _fill(_without_parts(module, name), name, component)
    return module.eval().requires_grad_(False)


def _built(component: Component) -> nn.Module:
    classes = {kind.__name__: kind for kind in (UNet2DConditionModel, AutoencoderKL, VQModel)}
    try:
        if component.class_name == "LDMBertModel":
            return LDMBertModel(LDMBertConfig(**component.config))
        return classes[component.class_name](**component.config)
    except Exception as error:  # diffusers and torch raise whatever an odd config leads to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = (
            f"{component.folder / 'config.json'} describes no {component.class_name}: {reason}; correct the config"
        )
        raise CheckpointError(f"{component.name}: {message}") from error


def _without_parts(module: nn.Module, name: str) -> nn.Module:
    for part, stand_in in _PARTS[name][1].items():
        if getattr(module, part, None) is not None:
            setattr(module, part, stand_in() if stand_in else None)
    return module


def _fill(module: nn.Module, name: str, component: Component) -> None:
    """Read the weights of a module on the meta device into it."""
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    weights = _named_as_today(read_weights(component.folder, component.name), expected, component)
    unused = tuple(f"{part}." for part in _PARTS[name][1])
    weights = {
        key: stored
        for key, stored in weights.items()
        if key in expected or not (key.startswith(unused) or key.endswith("position_ids"))
    }
    _check(weights, expected, name, component)
    state = {key: stored.read().reshape(expected[key]) for key, stored in weights.items()}
    module.load_state_dict(state, assign=True)
    if left := [key for key, buffer in module.named_buffers() if buffer.is_meta]:
        with _EmptyOnMeta():
            twin = _built(component)
        for key in left:
            owner, _, attribute = key.rpartition(".")
            setattr(module.get_submodule(owner), attribute, twin.get_buffer(key))


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters, which start as torch.empty, go to the meta device; buffers, which have values, become real."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}) | ({"device": "meta"} if function is torch.empty else {}))


def _named_as_today(
    weights: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], component: Component
) -> dict[str, StoredTensor]:
    """The weights under the names the module expects, where they are stored under older ones."""
    named = {key: stored for key, stored in weights.items() if key in expected}
    for key, stored in weights.items():
        new = key if key in expected else _name_of_today(key, component)
        if new not in expected:
            named[key] = stored
        elif new not in weights:  # else a copy under the older name: some files hold both
            named[new] = stored
    return named


def _name_of_today(name: str, component: Component) -> str:
    if (
        component.name == "autoencoder"
    ):  # CompVis counts the decoder's levels from the image, diffusers from the latents
        last = len(component.config["block_out_channels"]) - 1
        name = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up.{last - int(match[1])}.", name)
    for pattern, replacement in {"unet": _UNET_NAMES, "autoencoder": _AUTOENCODER_NAMES}.get(component.name, ()):
        name = re.sub(pattern, replacement, name)
    return name


def _check(
    weights: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], name: str, component: Component
) -> None:
    """Raise one CheckpointError naming what is missing, left over, misshapen or of another dtype."""
    missing, extra = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    misfits = []
    for key in sorted(expected.keys() & weights.keys()):
        stored, shape = weights[key], expected[key]
        flat = component.name == "autoencoder" and stored.shape == (*shape, 1, 1)  # a 1×1 convolution as a matrix
        if stored.dtype not in DTYPES or not (flat or stored.shape == shape):
            misfits.append(f"{stored.name} (got {stored.dtype} {list(stored.shape)}, expected float {list(shape)})")
    problems = [
        f"{len(keys)} tensors {what}: {shortened(keys)}"
        for what, keys in (("missing", missing), ("left over", extra), ("of another shape or dtype", misfits))
        if keys
    ]
    if problems:
        files = shortened({stored.file.name for stored in weights.values()}) or "its weights"
        raise CheckpointError(
            f"{name}: {component.folder}: {files} and config.json describe different models: {'; '.join(problems)}; "
            "use the config and the weights of one checkpoint"
        )
