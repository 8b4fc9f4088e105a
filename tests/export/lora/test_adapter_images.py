"""LoRA adapters of a bundle that requests select: the images of weights into which the same files are merged."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from ldm_export.bundle.build import build
from ldm_export.cli import main
from ldm_export.families import open_checkpoint
from ldm_export.lora import parse_lora, with_loras
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from tests.support.bundles import cuda_bundle
from tests.support.lora_bundle import BOTH, SMALL, WHOLE, Pixels, image, make_lora_bundle
from tests.support.lora_files import UNET, XL_PREFIXES, factors_of, kohya
from tests.support.shared import SharedFolders
from tests.support.torch_pipeline import torch_pipeline


@pytest.fixture(scope="module")
def merged(sd2_checkpoint: Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pixels]:
    """Images of torch's modules with merged weights: without adapters, with one, and with two."""
    texts = {"plain": {}, "one": {WHOLE: 0.7}, "two": BOTH}
    images = {}
    for name, loras in texts.items():
        given = [parse_lora(f"{bundle.folder.parent / lora}.safetensors:{scale}") for lora, scale in loras.items()]
        checkpoint = with_loras(open_checkpoint(sd2_checkpoint), given)
        with torch_pipeline(checkpoint, tmp_path_factory.mktemp("merged") / name) as pipe:
            images[name] = image(pipe)
    assert np.abs(images["one"] - images["plain"]).max() > 8 < np.abs(images["one"] - images["two"]).max()
    return images


@pytest.mark.parametrize(("backend", "precision"), [("openvino", "fp32"), ("onnxruntime", "fp16")])
def test_images_equal_those_of_merged_weights(
    bundle: Bundle, merged: dict[str, Pixels], backend: str, precision: str
) -> None:
    with LatentDiffusionPipeline.from_bundle(bundle, precision=precision, backend=backend) as pipeline:
        assert np.abs(image(pipeline, loras={WHOLE: 0.7}) - merged["one"]).max() <= 1
        assert np.abs(image(pipeline) - merged["plain"]).max() <= 1


def test_selections_alternate_and_change_nothing(pipe: LatentDiffusionPipeline, merged: dict[str, Pixels]) -> None:
    plain, one, two = image(pipe), image(pipe, loras={WHOLE: 0.7}), image(pipe, loras=BOTH)
    for ours, theirs in ((plain, "plain"), (one, "one"), (two, "two")):
        assert np.abs(ours - merged[theirs]).max() <= 1
    third = image(pipe, loras={SMALL: 2})  # the first selection is freed
    assert (image(pipe, loras={WHOLE: 0.7}) == one).all()
    assert (image(pipe, loras=dict(reversed(BOTH.items()))) == two).all()
    assert (image(pipe, loras={SMALL: 2.0, WHOLE: 0}) == third).all()
    for nothing in (None, {}, {WHOLE: 0.0}):
        assert (image(pipe, loras=nothing) == plain).all()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_selections_alternate_on_a_gpu(
    sd2_checkpoint: Path, pipe: LatentDiffusionPipeline, shared: SharedFolders, tmp_path: Path, precision: str
) -> None:
    make_lora_bundle(sd2_checkpoint, cuda_bundle(shared, "sd2", open_checkpoint(sd2_checkpoint)), tmp_path)
    selections: tuple[dict[str, float], ...] = ({}, {WHOLE: 0.7}, BOTH, {WHOLE: 0.7}, {})
    with LatentDiffusionPipeline.from_bundle(
        tmp_path / "bundle", precision=precision, backend="onnxruntime", device="cuda"
    ) as on_gpu:
        images = [image(on_gpu, loras=selection) for selection in selections]
    for ours, selection in zip(images, selections, strict=True):
        assert np.abs(ours - image(pipe, loras=selection)).max() <= 3
    most = 1 if precision == "fp16" else 0  # ONNX Runtime's fused group normalization adds in any order
    assert max(np.abs(images[3] - images[1]).max(), np.abs(images[4] - images[0]).max()) <= most


def test_one_selection_at_a_time(bundle: Bundle, pipe: LatentDiffusionPipeline) -> None:
    with LatentDiffusionPipeline.from_bundle(
        bundle, precision="fp32", backend="onnxruntime", lora_selections=1
    ) as small:
        for loras in (BOTH, {WHOLE: 0.7}, BOTH):
            assert (image(small, loras=loras) == image(pipe, loras=loras)).all()
        assert (small.most_loras, pipe.most_loras) == (1, 2)
    for wrong in (0, 65, "2", True):
        with pytest.raises(SpecError, match=r"lora_selections: got .*, expected a whole number from 1 to 64"):
            LatentDiffusionPipeline.from_bundle(bundle, lora_selections=wrong)  # type: ignore[arg-type]


def test_cached_features_have_the_weights_of_the_adapter(pipe: LatentDiffusionPipeline, bundle: Bundle) -> None:
    options = {"cache_every": 2, "full_steps": 1}
    changed, plain = image(pipe, loras={WHOLE: 0.7}, **options), image(pipe, **options)
    pipe.load()
    whole = image(pipe, loras={WHOLE: 0.7})
    assert np.abs(changed - plain).max() > 8
    assert np.abs(changed - whole).mean() < 0.5 * np.abs(plain - whole).mean()


@pytest.mark.slow
def test_images_equal_those_of_a_bundle_built_with_the_file(
    pipe: LatentDiffusionPipeline, bundle: Bundle, sd2_checkpoint: Path, tmp_path: Path
) -> None:
    given = parse_lora(f"{bundle.folder.parent / WHOLE}.safetensors:0.7")
    built = build(with_loras(open_checkpoint(sd2_checkpoint), [given]), tmp_path / "built").bundle
    with LatentDiffusionPipeline.from_bundle(built, precision="fp32", backend="onnxruntime") as other:
        for options in ({}, {"cache_every": 2, "full_steps": 1}, {"scheduler": "EulerDiscreteScheduler"}):
            ours = image(pipe, loras={WHOLE: 0.7}, num_inference_steps=6, **options)
            assert np.abs(ours - image(other, num_inference_steps=6, **options)).max() <= 1


def test_images_of_xl_equal_those_of_merged_weights(xl_bundle: Bundle, xl_checkpoint: Path, tmp_path: Path) -> None:
    pipeline, last = DiffusionPipeline.from_pretrained(xl_checkpoint), "encoder.layers.{}.self_attn.q_proj"
    layers = pipeline.text_encoder.config.num_hidden_layers
    modules = {
        "unet": [*UNET],
        "text_encoder": [last.format(index) for index in range(layers)],
        "text_encoder_2": [f"text_model.{last.format(0)}", "text_projection"],
    }
    file = tmp_path / "xl.safetensors"
    save_file(kohya(factors_of(pipeline, modules), True, XL_PREFIXES), file)
    folder = Path(shutil.copytree(xl_bundle.folder, tmp_path / "bundle"))
    assert main(["add-lora", str(folder), f"xl={file}"]) == 0
    checkpoint = with_loras(open_checkpoint(xl_checkpoint), [parse_lora(f"{file}:0.5")])
    with torch_pipeline(checkpoint, tmp_path / "files") as pipe:
        theirs = image(pipe)
    with LatentDiffusionPipeline.from_bundle(folder, precision="fp32", backend="onnxruntime") as pipe:
        ours, plain = image(pipe, loras={"xl": 0.5}), image(pipe)
    assert np.abs(ours - theirs).max() <= 1 < np.abs(ours - plain).max()
