"""LoRA files with random factors in the forms of several programs, and diffusers' modules with them as branches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ldm_runtime.bundle import Bundle
from ldm_runtime.loras.changes import changed_part
from ldm_runtime.loras.graph_layers import graph_layers

__all__ = [
    "ALPHA",
    "RANK",
    "UNET",
    "XL_PREFIXES",
    "Factors",
    "branches",
    "factors_of",
    "factors_of_graphs",
    "kohya",
    "older_diffusers",
    "peft",
]

RANK, ALPHA = 3, 6.0
UNET = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_3_1_transformer_blocks_0_attn1_to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": "middle_block_1_transformer_blocks_0_attn2_to_out_0",
    "up_blocks.0.attentions.1.proj_in": "output_blocks_1_1_proj_in",
    "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2": "output_blocks_0_1_transformer_blocks_0_ff_net_2",
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
    "time_embedding.linear_1": "time_embed_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
"""Modules of the UNet of Stable Diffusion XL that are changed, and their authors' names with underscores."""
XL_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_"}

Factors = dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]
"""Part and module -> down and up."""


def factors_of(pipeline: Any, modules: dict[str, list[str]]) -> Factors:
    """Random factors for modules of a pipeline, in fp16 as files have them."""
    generator, made = torch.Generator().manual_seed(0), {}
    for part, names in modules.items():
        for name in names:
            weight = getattr(pipeline, part).get_submodule(name).weight
            down = 0.2 * torch.randn((RANK, *weight.shape[1:]), generator=generator)
            up = 0.2 * torch.randn((weight.shape[0], RANK, *(1 for _ in weight.shape[2:])), generator=generator)
            made[part, name] = (down.half(), up.half())
    return made


@contextmanager
def branches(pipeline: Any, factors: Factors, scale: float) -> Iterator[None]:
    """Add ``scale * up(down(x))`` to the output of each layer, computed beside it."""
    hooks = []
    for (part, name), (down, up) in {key: (a.float(), b.float()) for key, (a, b) in factors.items()}.items():
        layer: Any = getattr(pipeline, part).get_submodule(name)

        def hook(
            layer: Any,
            inputs: tuple[torch.Tensor],
            output: torch.Tensor,
            down: torch.Tensor = down,
            up: torch.Tensor = up,
        ) -> torch.Tensor:
            if isinstance(layer, nn.Conv2d):
                inner = nn.functional.conv2d(inputs[0], down, stride=layer.stride, padding=layer.padding)
                return output + scale * nn.functional.conv2d(inner, up)
            return output + scale * nn.functional.linear(nn.functional.linear(inputs[0], down), up)

        hooks.append(layer.register_forward_hook(hook))
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def factors_of_graphs(bundle: Bundle, components: Sequence[str]) -> Factors:
    """Random factors for all layers of components of a bundle."""
    generator, made = torch.Generator().manual_seed(0), {}
    for component in components:
        part = changed_part(bundle.manifest.model, component)
        assert part is not None
        for layer in graph_layers(bundle.graph(component, "fp32")):
            rows, *columns = layer.shape
            down = torch.randn((RANK, *columns), generator=generator) / math.prod(columns) ** 0.5
            up = 0.05 * torch.randn((rows, RANK, *(1 for _ in columns[1:])), generator=generator)
            made[part, layer.module] = (down.half(), up.half())
    return made


def peft(factors: Factors) -> dict[str, torch.Tensor]:
    pairs = {f"{part}.{name}": pair for (part, name), pair in factors.items()}
    return {
        f"{name}.{key}": tensor
        for name, pair in pairs.items()
        for key, tensor in zip(("lora_A.weight", "lora_B.weight"), pair, strict=True)
    }


def older_diffusers(factors: Factors) -> dict[str, torch.Tensor]:
    state = {}
    for (part, name), pair in factors.items():
        for side, tensor in zip(("down", "up"), pair, strict=True):
            if part == "unet" and ".attn" in name:
                block, _, leaf = name.removesuffix(".0").rpartition(".")
                state[f"unet.{block}.processor.{leaf}_lora.{side}.weight"] = tensor
            else:
                state[f"{part}.{name}.{'lora' if part == 'unet' else 'lora_linear_layer'}.{side}.weight"] = tensor
    return state


def kohya(factors: Factors, authors: bool, prefixes: dict[str, str]) -> dict[str, torch.Tensor]:
    state = {}
    for (part, name), pair in factors.items():
        inside = UNET[name] if authors and part == "unet" else name.replace(".", "_")
        for side, tensor in zip(("down", "up"), pair, strict=True):
            state[f"{prefixes[part]}{inside}.lora_{side}.weight"] = tensor
        state[f"{prefixes[part]}{inside}.alpha"] = torch.tensor(ALPHA)
    return state
