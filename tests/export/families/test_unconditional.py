"""Unconditional latent diffusion: images, precisions and engines of small random checkpoints of LDMPipeline."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel, VQModel
from diffusers import LDMPipeline as Reference
from safetensors.torch import load_file

from ldm_calibration.settings import CalibrationSettings
from ldm_export.bundle.build import BuildOptions, build
from ldm_export.checkpoint.modules import load_module
from ldm_export.cli import main
from ldm_export.engine.request import EngineRequest
from ldm_export.families import open_checkpoint
from ldm_export.families.unconditional import UNCONDITIONAL
from ldm_export.quality.measures import TOLERANCES
from ldm_export.quality.verification import verify
from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime.errors import CheckpointError, SpecError
from ldm_runtime.model import check_model
from tests.support.checkpoints import edit_json, write_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"


def unconditional_checkpoint(folder: Path, *, vq: bool, levels: int = 2) -> Path:
    """Write a small random checkpoint of LDMPipeline, as diffusers saves it; the UNet's second level attends."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32)[:levels],
            down_block_types=("DownBlock2D", "AttnDownBlock2D")[:levels],
            up_block_types=("AttnUpBlock2D", "UpBlock2D")[-levels:],
            layers_per_block=1,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        shared: dict[str, Any] = {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 3,
            "norm_num_groups": 8,
            "sample_size": 16,
        }
        vqvae = VQModel(num_vq_embeddings=16, vq_embed_dim=3, **shared) if vq else AutoencoderKL(**shared)
        if vq:  # a codebook as wide as the latents, so that no rounding decides between two entries
            vqvae.quantize.embedding.weight.data *= 60
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    Reference(vqvae=vqvae, unet=unet, scheduler=scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["vq", "kl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with quantized or continuous latents; read-only."""
    folder = tmp_path_factory.mktemp("unconditional") / request.param
    return unconditional_checkpoint(folder, vq=request.param == "vq")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its bundle in fp32 and fp16; read-only."""
    return build(open_checkpoint(checkpoint), tmp_path_factory.mktemp("built") / "bundle", "fp16").bundle


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    pipeline = Reference.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("seed", "eta", "steps"), [(0, 0.0, 5), (1, 0.3, 5), (7, 1.0, 9), (2**40, 0.5, 3)], ids=str)
def test_images_equal_diffusers(bundle: Bundle, reference: Any, seed: int, eta: float, steps: int) -> None:
    with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime") as pipe:
        ours = pipe(count=4, seed=seed, num_inference_steps=steps, eta=eta).images
    with torch.random.fork_rng(devices=[]):
        generator = torch.manual_seed(seed)  # one generator for the batch; the steps' noise continues it
        theirs = reference(batch_size=4, generator=generator, eta=eta, num_inference_steps=steps).images
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        pair = [np.asarray(image, np.int64) for image in (one, other)]
        assert np.abs(pair[0] - pair[1]).max() <= 1
        assert pair[0].shape == (16, 16, 3) and pair[0].std() > 1


def test_the_defaults_are_those_of_the_pipeline(bundle: Bundle, reference: Any) -> None:
    with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime") as pipe:
        (ours,) = pipe(seed=5).images
    with torch.random.fork_rng(devices=[]):
        (theirs,) = reference(generator=torch.manual_seed(5)).images
    assert np.abs(np.asarray(ours, np.int64) - np.asarray(theirs, np.int64)).max() <= 1


def test_the_bundle_has_no_conditioning_and_no_guidance(bundle: Bundle) -> None:
    bundle.check()
    model = bundle.manifest.model
    check_model(model)
    assert (model.family, model.conditioning, model.guidance) == ("unconditional", (), ())
    assert list(model.components) == ["time_embedding", "unet", "shallow_unet", "decoder", "step"]
    assert str(model.components["unet"].inputs[0]) == "sample: float32 [batch, 3, 8, 8]"
    assert bundle.manifest.request["quantize"] == ["unet", "decoder"]
    assert "tokenizer.json" not in bundle.manifest.files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "a red circle"}, "prompts: got a value, but this unconditional model takes count instead"),
        ({"count": 33}, r"images: got 33 in one call, expected 1\.\.32"),
        ({"height": 32}, "height: got 32, expected a multiple of 2 from 16 to 16 pixels"),
    ],
    ids=str,
)
def test_requests_that_the_model_does_not_take(bundle: Bundle, options: dict[str, Any], message: str) -> None:
    pipeline = LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime")
    with pipeline as pipe, pytest.raises(SpecError, match=message):
        pipe(seed=0, num_inference_steps=2, **options)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_verification(bundle: Bundle, checkpoint: Path, precision: str) -> None:
    result = verify(bundle, open_checkpoint(checkpoint), None, 5, precision, TOLERANCES[precision])
    assert result.failures == []
    assert [component.name for component in result.components] == ["unet", "decoder"]
    assert len(result.images) == 4 and {image.label for image in result.images} == {"without conditioning"}


def test_the_command_line(bundle: Bundle, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    assert main(["verify", str(folder), "--against", str(checkpoint), "--steps", "3", "--json"]) == 0
    backends = "onnxruntime:fp32,openvino:fp32"
    assert main(["verify", str(folder), "--backends", backends, "--steps", "3", "--json"]) == 0
    assert main(["verify", str(folder), "--layers", "--json"]) == 0
    assert main(["inspect", str(folder)]) == 0
    assert "unconditional" in capsys.readouterr().out


def test_prompts_are_refused(bundle: Bundle, checkpoint: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    message = "prompts: got some, but this model has no conditioning"
    refused("verify", bundle.folder, "--against", checkpoint, "--prompts", "prompts.txt", message=message)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["kl"], indirect=True)
def test_engines(checkpoint: Path, bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    built = build(open_checkpoint(checkpoint), folder, "fp16", EngineRequest("tensorrt-rtx", ("8.9",))).bundle
    for name, component in built.manifest.components.items():
        (engine,) = component.engines
        assert engine.compute_capabilities == ("8.9",), name
        assert engine.precision == ("fp32" if name == "step" else "fp16")
    unet = built.manifest.components["unet"].engines[0]
    assert unet.profiles[-1]["sample"] == ((1, 3, 8, 8), (1, 3, 8, 8), (8, 3, 8, 8))


@pytest.mark.parametrize("checkpoint", ["vq"], indirect=True)
def test_int8(checkpoint: Path, bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    settings = CalibrationSettings(
        ({},) * 2, ({},) * 2, steps=4, samples=2, trial_steps=4, sensitivity="results", min_psnr=15.0
    )
    built = build(open_checkpoint(checkpoint), folder, options=BuildOptions("int8", calibration=settings)).bundle
    assert built.precision == "int8"
    assert built.manifest.components["unet"].graphs["int8"] == "unet/int8.onnx"
    assert built.manifest.components["time_embedding"].graphs["int8"] == "time_embedding/fp32.onnx"
    with LatentDiffusionPipeline.from_bundle(built, precision="int8", backend="onnxruntime") as pipe:
        images = pipe(count=2, seed=0, num_inference_steps=4).images
    assert len(images) == 2 and np.asarray(images[0]).std() > 1


def test_latents_are_divided_by_the_default_scaling_factor(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    edit_json(folder / "vqvae/config.json", scaling_factor=...)
    with caplog.at_level(logging.WARNING):
        UNCONDITIONAL.describe(open_checkpoint(folder))
    assert "has no scaling_factor; latents are divided by 0.18215, as LDMPipeline does" in caplog.text
    caplog.clear()
    UNCONDITIONAL.describe(open_checkpoint(checkpoint))
    assert not caplog.records


def test_attention_under_its_older_names(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    state = load_file(folder / "unet" / WEIGHTS)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in state.items()}
    write_tensors(folder / "unet" / WEIGHTS, state)
    edit_json(folder / "unet/config.json", _class_name="UNetUnconditionalModel")
    edit_json(folder / "model_index.json", unet=["diffusers", "UNetUnconditionalModel"])
    ours, expected = (load_module(open_checkpoint(path), "unet").state_dict() for path in (folder, checkpoint))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"num_class_embeds": 10}, "the unet takes a class label"),
        ("unet/config.json", {"in_channels": 4}, r"in and out channels are \(4, 3\), the latents' 3"),
        ("unet/config.json", {"sample_size": [8, 8]}, r"sample_size is \(8, 8\), expected one number"),
        ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "expected UNet2DModel"),
    ],
    ids=str,
)
def test_checkpoints_that_do_not_fit(
    checkpoint: Path, tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    edit_json(folder / file, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)
