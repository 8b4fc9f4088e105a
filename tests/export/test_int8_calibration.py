"""Calibrating a real bundle: again, after a kill, within a budget, and what is refused."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ldm_calibration.graph_files import load_graph
from ldm_calibration.layers import find_layers
from ldm_calibration.qdq import QuantizedTensors, Scaling
from ldm_calibration.sensitivity import measure_sensitivity
from ldm_calibration.settings import CalibrationSettings
from ldm_export.bundle.add_int8 import calibrate
from ldm_export.bundle.int8_report import write_report
from ldm_export.cli import main
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import CALIBRATION_RECORD, QUALITY_REPORT
from ldm_runtime.errors import BuildError
from ldm_runtime.quality import QualityRecord, QualityResult, QualitySetting
from tests.support.isolated import context
from tests.support.small_models import bundle_of, text_model
from tests.support.tiny_int8 import LATENTS_SETTINGS, QUANTIZED, SETTINGS, model_of, part


@pytest.fixture
def small(tmp_path: Path) -> Bundle:
    """A bundle of a few operators in fp32, in the test's own folder."""
    return bundle_of(text_model(tmp_path / "model"), tmp_path / "bundle", QUANTIZED)


def test_calibrating_again_does_nothing_and_another_budget_takes_the_rest_over(
    small: Bundle,
) -> None:
    folder = small.folder
    write_report(calibrate(folder, SETTINGS).bundle)
    before = (folder / "manifest.json").read_bytes()
    again = calibrate(folder, SETTINGS)
    assert set(again.origins.values()) == {"kept"}
    assert write_report(again.bundle)[0].manifest == again.bundle.manifest
    assert (folder / "manifest.json").read_bytes() == before
    reference = QualityResult(QualitySetting("fp32", 4), 1.0, None, None)
    with_quality = again.bundle.with_quality(QualityRecord((reference,), 1, {}))
    assert QUALITY_REPORT in with_quality.manifest.files
    strict = calibrate(folder, replace(SETTINGS, min_psnr=18.0))
    assert strict.origins["calibration"] == "made" and strict.origins["unet.fp32"] == "kept"
    assert "int8" not in strict.bundle.manifest.measured
    assert QUALITY_REPORT not in strict.bundle.manifest.files  # figures of the graphs before
    strict.bundle.check()


@pytest.mark.parametrize("settings", [SETTINGS, LATENTS_SETTINGS], ids=["results", "latents"])
def test_a_layer_that_is_quantized_worse_counts_as_more_sensitive(
    calibrated: Bundle, settings: CalibrationSettings
) -> None:
    calibration = part(calibrated, "unet")
    layer = calibration.chosen[0]
    source = next(
        one.source for one in find_layers(load_graph(calibrated.graph("unet", "fp32")).graph) if one.name == layer
    )
    fine = measure_sensitivity(model_of(calibrated), settings, "unet", calibration.tensors, [layer])
    sources = calibration.tensors.sources
    coarse = {**sources, source: Scaling(sources[source].threshold * 10, sources[source].factors)}
    tensors = QuantizedTensors(coarse, calibration.tensors.results)
    rough = measure_sensitivity(model_of(calibrated), settings, "unet", tensors, [layer])
    assert rough[layer] < fine[layer] - 6


def test_killed_during_calibration_it_goes_on(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    process = context().Process(target=calibrate, args=(folder, SETTINGS))
    process.start()
    work = tmp_path / ".bundle.part"
    try:
        while not (work / "calibration.unet.stage").exists():
            assert process.is_alive()
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    Bundle.open(folder).check()
    assert Bundle.open(folder).precision == "fp32"
    output: list[str] = []
    built = calibrate(folder, SETTINGS, lambda stage, done, total: output.append(stage))
    assert "calibration.trajectories" not in output and "calibration.unet.ranges" not in output
    assert "calibration.decoder.ranges" in output and built.bundle.precision == "int8" and not work.exists()
    built.bundle.check()


def test_an_unreachable_budget_is_refused_with_what_can_be_reached(small: Bundle) -> None:
    before = (small.folder / "manifest.json").read_bytes()
    with pytest.raises(
        BuildError, match=r"^unet: the budget \(90 dB\) cannot be met .*What can be: [\d.]+ dB with 79%.*--min-psnr"
    ) as caught:
        calibrate(small.folder, replace(SETTINGS, min_psnr=90.0))
    assert "\n" not in str(caught.value)
    assert (small.folder / "manifest.json").read_bytes() == before


def test_without_prompts_it_is_refused(bundle_copy: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    refused("calibrate", bundle_copy, message="int8 is calibrated on real prompts, got none")
    refused("build", "-o", "new", "--min-psnr", "30", message="--min-psnr: of int8; give --precision int8 too")
    refused("calibrate", tmp_path / "none", message="no such folder")
    (tmp_path / "p.txt").write_text("a red circle\n")
    for options, message in (
        (("--min-psnr", "-1"), "min psnr: got -1.0"),
        (("--max-accuracy-loss", "2"), "max accuracy loss: got 2.0"),
        (("--calibration-steps", "1"), "steps: got 1"),
        (("--trials", "0"), "--trials: got 0"),
    ):
        refused("calibrate", bundle_copy, "--prompts", "p.txt", *options, message=message)


def test_calibrate_says_that_int8_becomes_the_default(
    calibrated: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(calibrated.folder, tmp_path / "bundle"))
    record = Path(shutil.copy(folder / CALIBRATION_RECORD, tmp_path))
    assert main(["calibrate", str(folder), "--record", str(record)]) == 0
    message = "`ldm-export generate` now takes int8 from this bundle; --precision fp32 is exact"
    assert message in capsys.readouterr().err
    assert Bundle.open(folder).precision == "int8"
