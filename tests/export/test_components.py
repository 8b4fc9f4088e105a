"""Specs derive from a checkpoint's configs, and the traced wrappers compute what diffusers computes, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from ldm_export.graph.components import Decoder, ModelShape, TextEncoder, UNet, free_upsampling, model_shape
from torch import nn

from ldm_export.families import open_checkpoint
from ldm_runtime.specs import Axis, dummy_inputs
from tests.support.checkpoints import VOCABULARY, edit_json, random_checkpoint, tiny_modules
from tests.support.configs_only import random_unet

SIZES = [(8, 8), (16, 24), (9, 11), (7, 2), (2, 2), (5, 16)]
TINY = ModelShape(tokens=77, context_width=24, latent_channels=4, latent_size=8)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_shapes_of_the_published_model() -> None:
    specs = ModelShape(tokens=77, context_width=1280, latent_channels=4, latent_size=32).specs()
    lines = {name: [*map(str, spec.inputs), "->", *map(str, spec.outputs)] for name, spec in specs.items()}
    assert lines == {
        "text_encoder": ["input_ids: int64 [batch, 77]", "->", "context: float32 [batch, 77, 1280]"],
        "unet": [
            "sample: float32 [batch, 4, height, width]",
            "timestep: int64 [batch]",
            "context: float32 [batch, 77, 1280]",
            "->",
            "noise_pred: float32 [batch, 4, height, width]",
        ],
        "decoder": ["latents: float32 [batch, 4, height, width]", "->", "image: float32 [batch, 3, 8*height, 8*width]"],
    }
    assert {name: spec.name for name, spec in specs.items()} == {name: name for name in specs}


@pytest.mark.parametrize(
    ("which", "batch", "size"), [("min", 1, (2, 2)), ("opt", 1, (32, 32)), ("max", 32, (128, 128))]
)
def test_rows_are_twice_the_batch_and_pixels_eight_times_the_latents(which: str, batch: int, size) -> None:
    specs = ModelShape(tokens=77, context_width=1280, latent_channels=4, latent_size=32).specs()
    rows = batch if which == "min" else 2 * batch  # without guidance a single row will do
    assert specs["text_encoder"].inputs[0].bounds(which) == (batch, 77)
    assert [tensor.bounds(which) for tensor in specs["unet"].inputs] == [(rows, 4, *size), (rows,), (rows, 77, 1280)]
    assert specs["unet"].outputs[0].bounds(which) == (rows, 4, *size)
    assert specs["decoder"].inputs[0].bounds(which) == (batch, 4, *size)
    assert specs["decoder"].outputs[0].bounds(which) == (batch, 3, 8 * size[0], 8 * size[1])


def test_other_factors_channels_and_sizes() -> None:
    shape = ModelShape(16, 24, latent_channels=8, latent_size=64, image_channels=1, latent_factor=4)
    latents, image = shape.specs()["decoder"].inputs[0], shape.specs()["decoder"].outputs[0]
    height = Axis("height", 2, 64, 256)
    assert latents.shape[1:3] == (8, height)
    assert image.shape[1:3] == (1, 4 * height)


@pytest.mark.parametrize("vq", [False, True])
@pytest.mark.parametrize("layout", ["current", "older"])
def test_shape_of_a_checkpoint(tmp_path: Path, vq: bool, layout: str) -> None:
    assert model_shape(open_checkpoint(random_checkpoint(tmp_path / "tiny", vq=vq, layout=layout))) == TINY


def test_shape_follows_the_configs(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "tiny")
    edit_json(folder / "bert/config.json", max_position_embeddings=512, d_model=32)
    edit_json(folder / "unet/config.json", cross_attention_dim=32, sample_size=16, in_channels=6, out_channels=6)
    edit_json(
        folder / "vqvae/config.json",
        latent_channels=6,
        out_channels=1,
        block_out_channels=[32, 32, 64],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
    )
    assert model_shape(open_checkpoint(folder)) == ModelShape(77, 32, 6, 16, image_channels=1, latent_factor=4)
    edit_json(folder / "bert/config.json", max_position_embeddings=20)
    assert model_shape(open_checkpoint(folder)).tokens == 20


def test_text_encoder_gives_the_last_hidden_state() -> None:
    theirs = tiny_modules()["bert"]
    ids = torch.randint(0, len(VOCABULARY), (3, 77), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        context = TextEncoder(copy.deepcopy(theirs)).eval()(ids)
        assert torch.equal(context, theirs(ids)[0])
    assert context.shape == (3, 77, 24) and context.std() > 0.1


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
    assert torch.equal(image, expected)
    assert image.shape == (2, 3, 8 * size[0], 8 * size[1]) and image.std() > 0.01


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


def test_the_smallest_inputs_of_every_spec_run() -> None:
    modules = tiny_modules()
    wrapped = {"text_encoder": TextEncoder(modules["bert"]), "unet": UNet(modules["unet"])}
    wrapped["decoder"] = Decoder(modules["vqvae"])
    for name, spec in TINY.specs().items():
        feed = [torch.from_numpy(array) for array in dummy_inputs(spec, "min").values()]
        with torch.inference_mode():
            assert tuple(wrapped[name].eval()(*feed).shape) == spec.outputs[0].bounds("min")
