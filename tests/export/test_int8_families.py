"""int8 for models of any family: bundles of small models, with and without conditioning, calibrated and reported."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_calibration.quality import image_psnr
from ldm_calibration.record import read_record
from ldm_calibration.settings import CalibrationSettings
from ldm_export.bundle.add_int8 import calibrate
from ldm_export.bundle.int8_report import write_report
from ldm_export.screen import Screen
from ldm_export.verbs.int8_options import add_int8_arguments, settings_of, show
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import CALIBRATION_RECORD
from ldm_runtime.errors import BuildError, SpecError
from tests.support.small_models import bundle_of, text_model, unconditional_model

PROMPTS = tuple({"prompts": f"a {colour} circle"} for colour in ("red", "blue"))
SETTINGS = CalibrationSettings(PROMPTS, PROMPTS, 4, 2, "results", 4, min_psnr=20.0)
PLAIN = replace(SETTINGS, requests=({},), trial_requests=({},) * 8)


@pytest.fixture
def text_bundle(tmp_path: Path) -> Bundle:
    return bundle_of(text_model(tmp_path / "model"), tmp_path / "bundle", ("unet", "decoder", "text_encoder"))


@pytest.fixture
def plain_bundle(tmp_path: Path) -> Bundle:
    return bundle_of(unconditional_model(tmp_path / "model"), tmp_path / "bundle", ("unet", "decoder"))


def options(*texts: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_int8_arguments(parser)
    return parser.parse_args(list(texts))


def test_a_text_model_keeps_its_constant_components_in_fp32(text_bundle: Bundle) -> None:
    progress: list[tuple[str, int, int]] = []
    built = calibrate(text_bundle.folder, SETTINGS, lambda *count: progress.append(count))
    manifest = built.bundle.manifest
    assert built.bundle.precision == "int8"
    graphs = {name: part.graphs["int8"] for name, part in manifest.components.items()}
    assert graphs == {
        "text_encoder": "text_encoder/int8.onnx",
        "cross_attention_kv": "cross_attention_kv/fp32.onnx",
        "time_embedding": "time_embedding/fp32.onnx",
        "unet": "unet/int8.onnx",
        "decoder": "decoder/int8.onnx",
    }
    built.bundle.check()
    assert all(0 <= done <= total for _, done, total in progress)
    bundle, report = write_report(built.bundle)
    assert report["budget"]["verdict"].startswith("at least 20 dB on 2 images, mean ") and report["budget"]["met"]
    assert report["warnings"] == [
        "the budget was checked on only 2 trial images; give at least 8 prompts or --trials 8 for a reliable mean"
    ]
    assert report["settings"]["eta"] == 0.3 and report["speed"]["batch"] == 2
    assert report["speed"]["unet_ms"]["int8"] > 0
    again = calibrate(bundle.folder, SETTINGS)
    assert set(again.origins.values()) == {"kept"} and write_report(again.bundle)[0].manifest == bundle.manifest


def test_a_model_without_conditioning(plain_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, report = write_report(calibrate(plain_bundle.folder, PLAIN).bundle)
    assert report["warnings"] == [] and report["speed"]["batch"] == 1
    assert [image["request"] for image in report["images"]] == [{}] * 8
    assert set(report["components"]) == {"unet", "decoder"}
    show(report, Screen())
    assert "at least 20 dB on 8 images, mean" in capsys.readouterr().out
    output, images = report["images"][0], []
    for precision in ("fp32", "int8"):
        with LatentDiffusionPipeline.from_bundle(bundle, precision=precision, backend="onnxruntime") as pipeline:
            images.append(np.asarray(pipeline(seed=[output["seed"]], num_inference_steps=4).images[0]))
    assert image_psnr(*images) == pytest.approx(output["psnr"], abs=1.5)


def test_a_budget_that_the_record_does_not_keep_is_reported_as_not_met(plain_bundle: Bundle, tmp_path: Path) -> None:
    record = json.loads(calibrate(plain_bundle.folder, PLAIN).bundle.file(CALIBRATION_RECORD).read_text())
    record["settings"]["min_psnr"] = 99.0
    (tmp_path / "record.json").write_text(json.dumps(record))
    _, report = write_report(calibrate(plain_bundle.folder, tmp_path / "record.json").bundle)
    assert report["budget"]["met"] is False and report["budget"]["verdict"].startswith("at least 99 dB on 8 images")


def test_a_grader_gets_images_and_requests_and_is_reported(text_bundle: Bundle) -> None:
    counts: list[int] = []

    def grade(images: Sequence[Any], requests: Sequence[Any]) -> list[bool]:
        counts.append(len(images))
        assert [image.dtype for image in images] == [np.uint8] * 2 and tuple(requests) == PROMPTS
        return [True, False]

    settings = replace(SETTINGS, min_psnr=None, max_accuracy_loss=0.0)
    with pytest.raises(SpecError, match="no grader"):
        calibrate(text_bundle.folder, settings)
    built = calibrate(text_bundle.folder, settings, grade=grade)
    summary = write_report(built.bundle)[1]["summary"]
    assert counts and (summary["correct_fp32"], summary["correct_int8"]) == (0.5, 0.5)


def test_a_bundle_must_name_what_int8_quantizes(tmp_path: Path) -> None:
    bundle = bundle_of(unconditional_model(tmp_path / "model"), tmp_path / "bundle", ())
    with pytest.raises(BuildError, match=r"^quantize: got \[\] in the manifest's request"):
        calibrate(bundle.folder, PLAIN)


def test_the_same_record_gives_the_same_graphs(text_bundle: Bundle, tmp_path: Path) -> None:
    copy = bundle_of(text_model(tmp_path / "again"), tmp_path / "copy", ("unet", "decoder", "text_encoder"))
    first = calibrate(text_bundle.folder, SETTINGS).bundle
    second = calibrate(copy.folder, first.file(CALIBRATION_RECORD)).bundle
    for name in read_record(first.file(CALIBRATION_RECORD)).components:
        assert second.graph(name, "int8").read_bytes() == first.graph(name, "int8").read_bytes()


def test_options_of_models_with_and_without_text(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\n")
    settings = settings_of(options("--prompts", str(file), "--trials", "1"), ("text",))
    assert settings.requests == ({"prompts": "a red circle"}, {"prompts": "a blue square"})
    assert settings.trial_requests == settings.requests[:1] and settings.min_psnr == 35.0
    plain = settings_of(options("--max-accuracy-loss", "0.1"), ())
    assert plain.requests == ({},) * 16 and plain.trial_requests == ({},) * 100 and plain.min_psnr is None
    with pytest.raises(SpecError, match=r"^--prompts: int8 is calibrated on real prompts, got none"):
        settings_of(options(), ("text",))
    with pytest.raises(SpecError, match=r"^--prompts: got .*, but this model has no conditioning"):
        settings_of(options("--prompts", str(file)), ())
    with pytest.raises(SpecError, match=r"^--trials: got 0"):
        settings_of(options("--trials", "0"), ())
