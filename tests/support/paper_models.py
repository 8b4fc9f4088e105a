"""A small random checkpoint for each row of the paper's model zoo, and the image that its equations give.

The oracle follows the authors' code: DDIMSampler, BERTEmbedder, ClassEmbedder, SpatialRescaler and inpaint.py, written
here in torch. UNets and autoencoders are diffusers' modules, whose tensors are stored under the authors' names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import embedding, gelu, interpolate, layer_norm, linear, one_hot, scaled_dot_product_attention

from ldm_runtime.pipeline import LatentDiffusionPipeline
from tests.support.compvis_checkpoints import CompVis
from tests.support.compvis_states import State, autoencoder_state, bert_state, joined, unet_state, with_schedule

SIZE = 8
"""Height and width of the latents."""
WIDTHS = (32, 64)
CONTEXT = 16
SPREAD = 100.0
"""Magnitude of the latents that a random UNet leads to."""
MEAN = "model_ema."


Sampled = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: Of the published model.
        checkpoint: The small checkpoint.
        options: Fields of a request.
        image: Initial latents and a number of steps -> latents, and image float32 [1, 3, H, W] in [0, 1].
    """

    name: str
    checkpoint: CompVis
    options: dict[str, Any]
    image: Callable[[torch.Tensor, int], Sampled]

    def noise(self) -> NDArray[np.float32]:
        """Initial latents float32 [1, C, h, w]."""
        channels = self.checkpoint.modules["unet"].config.out_channels
        return torch.randn(1, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).numpy()

    def expected(self, steps: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Latents and image of this noise."""
        with torch.no_grad():
            latents, image = self.image(torch.from_numpy(self.noise()), steps)
            return latents.numpy(), image.numpy()


def sampled(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    steps: int,
    betas: tuple[float, float],
) -> torch.Tensor:
    """DDIMSampler with eta 0: a step more than asked where the steps do not divide 1000."""
    line = torch.linspace(betas[0] ** 0.5, betas[1] ** 0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - line, 0).float()
    timesteps = list(range(1, 1001, 1000 // steps))
    for index, timestep in reversed(list(enumerate(timesteps))):
        alpha, before = alphas[timestep], alphas[timesteps[index - 1]] if index else alphas[0]
        noise = predict(x, torch.tensor([timestep]))
        x0 = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        x = before.sqrt() * x0 + (1 - before).sqrt() * noise
    return x


def bert_embedder(state: State, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states of token ids; no attention mask, 64 channels per head, layer norms before each part."""

    def normed(name: str, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, 64)).transpose(1, 2)

    x = embedding(ids, state["token_emb.weight"]) + state["pos_emb.emb.weight"][: ids.shape[1]]
    layers = {int(name.split(".")[2]) for name in state if name.startswith("attn_layers.")}
    for layer in sorted(layers):
        name = f"attn_layers.layers.{layer}"
        inside = normed(f"{name}.0", x)
        if layer % 2:
            hidden = gelu(linear(inside, state[f"{name}.1.net.0.0.weight"], state[f"{name}.1.net.0.0.bias"]))
            x = x + linear(hidden, state[f"{name}.1.net.2.weight"], state[f"{name}.1.net.2.bias"])
        else:
            query, key, value = (split(linear(inside, state[f"{name}.1.to_{one}.weight"])) for one in "qkv")
            mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            x = x + linear(mixed, state[f"{name}.1.to_out.weight"], state[f"{name}.1.to_out.bias"])
    return normed("norm", x)


def spatial_rescaler(weight: torch.Tensor, classes: torch.Tensor, stages: int) -> torch.Tensor:
    """One-hot classes, halved bilinearly and mapped by a 1x1 convolution."""
    x = one_hot(classes, weight.shape[1]).permute(0, 3, 1, 2).float()
    for _ in range(stages):
        x = interpolate(x, scale_factor=0.5, mode="bilinear")
    return nn.functional.conv2d(x, weight)


def plain_unet(
    in_channels: int, out: int, heads: Callable[[int], int], attention: tuple[bool, ...], **form: bool
) -> Any:
    """A UNet without cross-attention; ``form``: updown, scale_shift."""
    updown = form.get("updown", False)
    kinds = ["Attn" if attended else "Resnet" if updown else "" for attended in attention]
    sampled_by = ["sample" if kind == "Resnet" else "" for kind in kinds]
    unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=in_channels,
        out_channels=out,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=[f"{k}Down{s}Block2D" for k, s in zip(kinds, sampled_by, strict=True)],
        up_block_types=[f"{k}Up{s}Block2D" for k, s in zip(kinds[::-1], sampled_by[::-1], strict=True)],
        attention_head_dim=WIDTHS[-1] // heads(WIDTHS[-1]),
        attn_norm_num_groups=32,
        downsample_type="resnet" if updown else "conv",
        upsample_type="resnet" if updown else "conv",
        resnet_time_scale_shift="scale_shift" if form.get("scale_shift") else "default",
        norm_eps=1e-5,
    )
    for module in unet.modules():
        if isinstance(module, Attention):
            width = module.to_q.in_features
            module.heads, module.scale = heads(width), (width / heads(width)) ** -0.5
    return unet


def cross_unet(channels: int, heads: Any, depth: int = 1, *, middle_only: bool = False) -> Any:
    """A UNet with cross-attention at the lower level, or in the middle alone, which takes half the time to trace."""
    kind = "" if middle_only else "CrossAttn"
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", f"{kind}DownBlock2D"),
        up_block_types=(f"{kind}UpBlock2D", "UpBlock2D"),
        cross_attention_dim=CONTEXT,
        attention_head_dim=heads,
        transformer_layers_per_block=depth,
    )


def vq(levels: int = 3, channels: int = 3, *, mid: bool = True, attention: bool = False) -> Any:
    """An autoencoder with 16 codes as far apart as the latents of random UNets."""
    kinds = ["Attn" if attention and level == levels - 1 else "" for level in range(levels)]
    found = VQModel(
        block_out_channels=(32,) * levels,
        down_block_types=[f"{kind}DownEncoderBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        latent_channels=channels,
        num_vq_embeddings=16,
        vq_embed_dim=channels,
        scaling_factor=1.0,
        mid_block_add_attention=mid,
    )
    found.quantize.embedding.weight.data *= 16 * SPREAD
    return found


def kl(scale: float) -> Any:
    return AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=scale,
    )


def bert(tokens: int, vocabulary: int) -> State:
    """A BERTEmbedder of one layer."""
    config = LDMBertConfig(
        vocab_size=vocabulary,
        max_position_embeddings=tokens,
        encoder_layers=1,
        d_model=CONTEXT,
        encoder_ffn_dim=4 * CONTEXT,
        dropout=0.0,
    )
    return bert_state(LDMBertModel(config))  # type: ignore[no-untyped-call]


def averaged(state: State) -> State:
    """The UNet's tensors as moving averages, and other ones as its plain weights."""
    prefix = "model.diffusion_model."
    names = [name for name in state if name.startswith(prefix)]
    means = {f"{MEAN}{name.removeprefix('model.').replace('.', '')}": state[name] for name in names}
    return state | {name: state[name] * 0.5 for name in names} | means | {f"{MEAN}decay": torch.tensor(0.9999)}


def decoded(autoencoder: Any, latents: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return (autoencoder.decode(latents / scale, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


def checkpoint(
    unet: Any, blocks: dict[str, Any], autoencoder: Any, condition: State, betas: tuple[float, float], **more: Any
) -> CompVis:
    """A checkpoint with moving averages unless its yaml forbids them.

    Args:
        unet, autoencoder: Modules.
        blocks: Keys of the UNet's yaml: heads.
        condition: Tensors of what conditions the UNet.
        betas: linear_start and linear_end.
        more: Further keys of the yaml, and tensors.
    """
    heads = None if isinstance(unet, UNet2DConditionModel) else lambda width: blocks.get("num_heads") or width // 32
    levels = len(autoencoder.config.block_out_channels)
    tensors = {name: more.pop(name) for name in list(more) if isinstance(more[name], torch.Tensor)}
    state = joined(unet_state(unet, 1, heads), autoencoder_state(autoencoder, levels), condition, **tensors)
    params = {
        "linear_start": betas[0],
        "linear_end": betas[1],
        "image_size": SIZE,
        "unet_config": {"params": {"model_channels": WIDTHS[0], "channel_mult": [1, 2], **blocks}},
        "first_stage_config": {"params": {"ddconfig": {"ch": 32, "num_res_blocks": 1}}},
        **more,
    }
    modules: dict[str, nn.Module] = {"unet": unet, "autoencoder": autoencoder}
    plain = with_schedule(state, *betas)
    return CompVis(modules, plain if more.get("use_ema") is False else averaged(plain), params)


STEPS = 6
"""Seven steps of the authors' sampler, since 6 does not divide 1000."""


def assert_equal(pipeline: LatentDiffusionPipeline, row: Row) -> None:
    """A pipeline's latents and image are those of the row's equations."""
    options: dict[str, Any] = {"latents": row.noise(), "eta": 0.0, "num_inference_steps": STEPS}
    found, (latents, image) = pipeline(**options, **row.options), row.expected(STEPS)
    assert np.abs(found.latents - latents).max() < 2e-5 * np.abs(latents).max()
    assert np.abs(found.arrays - image).max() < 1 / 255
    assert image.std() > 10 / 255
