"""The rows of the paper's model zoo as small checkpoints with their images; see ``paper_models``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.support.checkpoints import VOCABULARY
from tests.support.paper_models import (
    CONTEXT,
    SIZE,
    Row,
    Sampled,
    bert,
    bert_embedder,
    checkpoint,
    cross_unet,
    decoded,
    kl,
    plain_unet,
    sampled,
    spatial_rescaler,
    vq,
)

__all__ = ["CATEGORIES", "ROWS", "TOKENS", "make_row", "vocabulary"]

TOKENS = 92
CATEGORIES = ("Person", "Cat", "Traffic light")
VQ_BETAS, LARGE_BETAS, SR_BETAS, MASK_BETAS = (0.0015, 0.0195), (0.00085, 0.012), (0.0015, 0.0155), (0.0015, 0.0205)


def text(name: str, *, quantized: bool, scale: float) -> Row:
    unet = cross_unet(3 if quantized else 4, (1, 2) if quantized else 8)
    autoencoder = vq() if quantized else kl(0.18215)
    blocks = {"num_head_channels": 32} if quantized else {"num_heads": 8}
    factor, betas = (1.0, VQ_BETAS) if quantized else (0.18215, LARGE_BETAS)
    encoder = bert(77, 24)
    state = {f"transformer.{key}": tensor for key, tensor in encoder.items()}
    saved = checkpoint(unet, blocks, autoencoder, state, betas, scale_factor=factor, use_ema=quantized)
    ids = torch.zeros(2, 77, dtype=torch.long)  # [CLS] words [SEP], filled with [PAD]
    ids[0, :2], ids[1, :5] = torch.tensor([2, 3]), torch.tensor([2, 5, 6, 9, 3])

    def image(x: torch.Tensor, steps: int) -> Sampled:
        context = bert_embedder(encoder, ids)

        def predict(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            plain, wanted = unet(torch.cat([sample, sample]), timestep, context)[0].chunk(2)
            return plain + scale * (wanted - plain)

        latents = sampled(predict, x, steps, betas)
        return latents, decoded(autoencoder, latents, factor)

    return Row(name, saved, {"prompts": "a red circle", "guidance_scale": scale}, image)


def labels(name: str, *, older: bool) -> Row:
    classes, unet = (10, cross_unet(4, (1, 2))) if older else (11, cross_unet(3, 1, middle_only=True))
    autoencoder = vq(channels=4, attention=True) if older else vq()
    embedding = torch.randn(classes, CONTEXT)
    blocks = {"num_head_channels": 32} if older else {"num_heads": 1}
    saved = checkpoint(unet, blocks, autoencoder, {"embedding.weight": embedding}, VQ_BETAS, use_ema=older)

    def image(x: torch.Tensor, steps: int) -> Sampled:
        def predict(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            if older:
                return unet(sample, timestep, embedding[None, 7:8])[0]
            plain, wanted = unet(torch.cat([sample, sample]), timestep, embedding[[10, 7], None])[0].chunk(2)
            return plain + 3 * (wanted - plain)

        latents = sampled(predict, x, steps, VQ_BETAS)
        return latents, decoded(autoencoder, latents)

    return Row(name, saved, {"labels": [7]} | ({} if older else {"guidance_scale": 3.0}), image)


def unconditional(name: str, *, churches: bool) -> Row:
    scale = torch.tensor(0.25 if churches else 1.0)
    if churches:
        unet = plain_unet(4, 4, lambda width: 8, (True, True), updown=True, scale_shift=True)
        autoencoder, betas = kl(0.25), SR_BETAS
        blocks = {"num_heads": 8, "resblock_updown": True, "use_scale_shift_norm": True}
        saved = checkpoint(unet, blocks, autoencoder, {}, betas, scale_by_std=True, scale_factor=scale)
    else:
        unet, autoencoder, betas = plain_unet(3, 3, lambda width: width // 32, (False, True)), vq(), VQ_BETAS
        saved = checkpoint(unet, {"num_head_channels": 32}, autoencoder, {}, betas)

    def image(x: torch.Tensor, steps: int) -> Sampled:
        latents = sampled(lambda sample, t: unet(sample, t)[0], x, steps, betas)
        return latents, decoded(autoencoder, latents, float(scale))

    return Row(name, saved, {}, image)


def super_resolution(name: str) -> Row:
    unet, autoencoder = plain_unet(6, 3, lambda width: width // 32, (False, False)), vq()
    saved = checkpoint(unet, {"num_head_channels": 32}, autoencoder, {}, SR_BETAS)
    low = torch.rand(1, 3, SIZE, SIZE)

    def image(x: torch.Tensor, steps: int) -> Sampled:
        def predict(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return unet(torch.cat([sample, low * 2 - 1], 1), timestep)[0]

        latents = sampled(predict, x, steps, SR_BETAS)
        return latents, decoded(autoencoder, latents)

    return Row(name, saved, {"image": low.numpy()}, image)


def inpainting(name: str) -> Row:
    unet = plain_unet(7, 3, lambda width: 8, (False, True), updown=True)
    autoencoder = vq(mid=False)
    saved = checkpoint(unet, {"num_heads": 8, "resblock_updown": True}, autoencoder, {}, MASK_BETAS)
    picture, mask = torch.rand(1, 3, 4 * SIZE, 4 * SIZE), torch.zeros(1, 1, 4 * SIZE, 4 * SIZE)
    mask[..., 8:24, 4:20] = 1

    def image(x: torch.Tensor, steps: int) -> Sampled:
        masked = (1 - mask) * picture * 2 - 1
        given = torch.cat([autoencoder.encode(masked)[0], mask[..., ::4, ::4] * 2 - 1], 1)
        latents = sampled(lambda s, t: unet(torch.cat([s, given], 1), t)[0], x, steps, MASK_BETAS)
        return latents, (1 - mask) * picture + mask * decoded(autoencoder, latents)

    return Row(name, saved, {"image": picture.numpy(), "mask": mask.numpy()}, image)


def semantic(name: str) -> Row:
    unet, autoencoder = plain_unet(6, 3, lambda width: 2, (False, False)), vq()
    weight, classes = torch.randn(3, 7, 1, 1), torch.randint(7, (1, 4 * SIZE, 4 * SIZE))
    saved = checkpoint(
        unet,
        {"num_heads": 2, "attention_resolutions": [32, 16, 8]},
        autoencoder,
        {"channel_mapper.weight": weight},
        MASK_BETAS,
        cond_stage_config={"params": {"n_stages": 2, "in_channels": 7, "out_channels": 3, "multiplier": 0.5}},
    )

    def image(x: torch.Tensor, steps: int) -> Sampled:
        given = spatial_rescaler(weight, classes, 2)
        latents = sampled(lambda s, t: unet(torch.cat([s, given], 1), t)[0], x, steps, MASK_BETAS)
        return latents, decoded(autoencoder, latents)

    return Row(name, saved, {"segmentation": classes.numpy().astype(np.uint8)}, image)


def layout(name: str) -> Row:
    unet, autoencoder, encoder = cross_unet(3, (1, 2), 2, middle_only=True), vq(), bert(TOKENS, 100)
    state = {f"transformer.{key}": tensor for key, tensor in encoder.items()}
    saved = checkpoint(unet, {"num_head_channels": 32, "transformer_depth": 2}, autoencoder, state, MASK_BETAS)
    tokens = torch.randint(100, (1, TOKENS))

    def image(x: torch.Tensor, steps: int) -> Sampled:
        context = bert_embedder(encoder, tokens)
        latents = sampled(lambda s, t: unet(s, t, context)[0], x, steps, MASK_BETAS)
        return latents, decoded(autoencoder, latents)

    return Row(name, saved, {"tokens": tokens[0].tolist()}, image)


ROWS: dict[str, Callable[[str], Row]] = {
    "txt2img-f8-large": lambda name: text(name, quantized=False, scale=5.0),
    "text2img256": lambda name: text(name, quantized=True, scale=2.0),
    "cin256-v2": lambda name: labels(name, older=False),
    "cin256": lambda name: labels(name, older=True),
    "celeba256": lambda name: unconditional(name, churches=False),
    "lsun_churches256": lambda name: unconditional(name, churches=True),
    "bsr_sr": super_resolution,
    "inpainting_big": inpainting,
    "semantic_synthesis": semantic,
    "layout2img": layout,
}
"""Name of a published model -> makes its small row."""


def make_row(name: str, seed: int = 0) -> Row:
    """The row with weights and inputs of a seed; the checkpoint's modules are in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        row = ROWS[name](name)
    for module in row.checkpoint.modules.values():
        module.eval()
    return row


def vocabulary(name: str, folder: Path) -> Path | None:
    """The vocabulary of a row of texts, written to a folder; None for other rows."""
    if "2img" not in name or name.startswith("layout"):
        return None
    (folder / "words.txt").write_text("\n".join(VOCABULARY[:24]) + "\n")
    return folder / "words.txt"
