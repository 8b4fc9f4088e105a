"""The traced wrappers compute what diffusers computes, bit for bit, at any batch and size."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ldm_export.graph.wrappers import Decoder, UNet, free_upsampling
from tests.support.checkpoints import tiny_modules
from tests.support.configs_only import random_unet

SIZES = [(8, 8), (16, 24), (9, 11), (7, 2), (2, 2), (5, 16)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("levels", [2, 4])
def test_unet_gives_diffusers_noise(levels: int, size: tuple[int, int]) -> None:
    theirs = random_unet(levels, levels - 1)
    sample, timestep, context = random(3, 4, *size), torch.tensor([0, 500, 999]), random(3, 77, 24, seed=1)
    with torch.inference_mode():
        noise = UNet(copy.deepcopy(theirs)).eval()(sample, timestep, context)
        assert torch.equal(noise, theirs(sample, timestep, encoder_hidden_states=context).sample)
    assert noise.shape == sample.shape and noise.std() > 0.01


def test_unet_of_a_large_batch() -> None:
    theirs = random_unet(2, 1)
    sample, context = random(64, 4, 9, 6), random(64, 77, 24, seed=1)
    timestep = torch.arange(64) * 15
    with torch.inference_mode():
        noise = UNet(copy.deepcopy(theirs)).eval()(sample, timestep, context)
        assert torch.equal(noise, theirs(sample, timestep, encoder_hidden_states=context).sample)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vq", [False, True])
def test_decoder_gives_the_pipelines_image(vq: bool, size: tuple[int, int]) -> None:
    theirs = tiny_modules(vq=vq)["vqvae"]
    latents = 3 * random(2, 4, *size)
    with torch.inference_mode():
        image = Decoder(copy.deepcopy(theirs)).eval()(latents)
        # the last lines of LDMTextToImagePipeline
        expected = (theirs.decode(1 / theirs.config.scaling_factor * latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)  # convolutions may be computed in another order
    assert image.shape == (2, 3, 8 * size[0], 8 * size[1]) and image.std() > 0.01


@pytest.mark.parametrize("vq", [False, True])
def test_a_decoder_that_divides_gives_the_unconditional_pipelines_image(vq: bool) -> None:
    theirs = tiny_modules(vq=vq)["vqvae"]
    latents = 3 * random(2, 4, 7, 6)
    with torch.inference_mode():
        image = Decoder(copy.deepcopy(theirs), divide=True).eval()(latents)
        # the last lines of LDMPipeline
        expected = (theirs.decode(latents / theirs.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(image, expected)


def test_decoder_scales_and_clamps() -> None:
    autoencoder = tiny_modules()["vqvae"]
    autoencoder.register_to_config(scaling_factor=0.5)
    autoencoder.decoder.conv_out.weight.data *= 50
    latents = random(1, 4, 4, 4)
    with torch.inference_mode():
        image = Decoder(autoencoder).eval()(latents)
        raw = autoencoder.decode(2 * latents).sample
    assert (raw.min() < -1 and raw.max() > 1) and (image.min() == 0 and image.max() == 1)
    inside = raw.abs() < 1
    assert torch.equal(image[inside], (raw / 2 + 0.5)[inside]) and inside.any()


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda: random_unet(4, 3), lambda m: m(random(2, 4, 8, 8), 7, encoder_hidden_states=random(2, 77, 24)).sample),
        (lambda: tiny_modules()["vqvae"], lambda m: m(random(1, 3, 32, 32)).sample),
        (lambda: tiny_modules(vq=True)["vqvae"], lambda m: m(random(1, 3, 32, 32)).sample),
    ],
    ids=["unet", "kl", "vq"],
)
def test_free_upsampling_leaves_keys_and_results(
    make: Callable[[], nn.Module], call: Callable[[nn.Module], torch.Tensor]
) -> None:
    before, module = make(), make()
    assert free_upsampling(module) is module
    state = module.state_dict()
    assert list(state) == list(before.state_dict())
    assert all(torch.equal(state[key], tensor) for key, tensor in before.state_dict().items())
    module.load_state_dict(before.state_dict(), strict=True)
    with torch.inference_mode():
        assert torch.equal(call(module), call(before))
    assert any(isinstance(child, Upsample2D) for child in before.modules())
    assert not any(isinstance(child, Upsample2D) for child in module.modules())


def test_free_upsampling_leaves_other_kinds_alone() -> None:
    module = nn.ModuleList([Upsample2D(4, use_conv_transpose=True), Upsample2D(4), Upsample2D(4, use_conv=True)])
    kinds = [type(child) for child in free_upsampling(module)]
    assert kinds[:2] == [Upsample2D, Upsample2D] and kinds[2] is not Upsample2D
    twice = free_upsampling(module)
    assert [type(child) for child in twice] == kinds
