"""Options of diffusers' pipelines are named in the error, and objects describe themselves in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime.errors import SpecError
from ldm_runtime.option_names import OF_DIFFUSERS, check_names
from ldm_runtime.pipeline_options import BundleOptions, with_defaults
from ldm_runtime.request import Request
from tests.support.small_bundle import write_small_bundle


def test_options_of_diffusers_are_translated() -> None:
    known = dict.fromkeys(Request.__dataclass_fields__)
    check_names(known)
    assert not set(OF_DIFFUSERS) & set(known)
    for name, message in (
        ("generator", "generator: is an option of diffusers' pipelines; use seed=42"),
        ("num_images_per_prompt", "use images_per_prompt"),
        ("guidance", r"guidance: is not an option of a generation; did you mean guidance_\w+\?"),
        ("xyz", "xyz: is not an option of a generation; see ldm_runtime.Request"),
    ):
        with pytest.raises(SpecError, match=message):
            check_names({"seed": 1, name: 0})


def test_options_of_opening_a_bundle_are_named(tmp_path: Path) -> None:
    assert set(BundleOptions.__annotations__) == set(with_defaults({}))
    with pytest.raises(SpecError, match=r"backends: is not an option of from_bundle; did you mean backend\?"):
        LatentDiffusionPipeline.from_bundle(tmp_path, backends="openvino")  # type: ignore[call-arg]
    with pytest.raises(SpecError, match="xyz: is not an option of from_bundle; expected one of precision, backend, "):
        LatentDiffusionPipeline.from_bundle(tmp_path, xyz=1)  # type: ignore[call-arg]


def test_objects_describe_themselves(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    assert repr(bundle) == f"<Bundle '{tmp_path}/bundle': unconditional, fp32, 0.0 MB>"
    with LatentDiffusionPipeline.from_bundle(bundle, backend="onnxruntime", precision="fp32") as pipeline:
        assert repr(pipeline).startswith("<LatentDiffusionPipeline unconditional: time_embedding, unet, decoder, step,")
        assert repr(pipeline).endswith(", onnxruntime fp32 on cpu>")
        with pytest.raises(SpecError, match="output_type: is an option of diffusers"):
            pipeline(count=1, output_type="pil")  # type: ignore[call-arg]
        result = pipeline(count=2, num_inference_steps=1)
    assert repr(result) == "<Generation: 2 x 8x8 pixels, 3 channels>"
