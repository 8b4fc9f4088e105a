"""The optional demo model: recognised by the digest of its weights, and refused in one line if it is not installed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ldm_calibration.record import read_record
from ldm_export.bundle.add_int8 import calibrate
from ldm_export.bundle.build import BuildOptions, build
from ldm_export.bundle.int8_report import write_report
from ldm_export.checkpoint.digest import weights_sha256
from ldm_export.demo import (
    TASKS,
    calibration_prompts,
    default_prompts,
    demo_checkpoint,
    demo_config,
    demo_grader,
    demo_task,
    is_demo,
)
from ldm_export.families import open_checkpoint
from ldm_export.prompts import PROMPTS
from ldm_export_demo import CHECKPOINTS
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import CALIBRATION_RECORD
from ldm_runtime.errors import BuildError, SpecError
from tests.support.small_models import bundle_of, text_model
from tests.support.tiny_int8 import QUANTIZED, SETTINGS


@pytest.fixture
def demo_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_checkpoint(), tmp_path / "renamed"))


def test_it_is_recognised_by_its_weights_alone(demo_copy: Path, tiny_checkpoint: Path) -> None:
    assert is_demo(demo_checkpoint()) and is_demo(demo_copy)
    assert not is_demo(tiny_checkpoint) and not is_demo(None)
    weights = demo_copy / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert not is_demo(demo_copy) and weights_sha256(demo_copy) != weights_sha256(demo_checkpoint())


def test_a_folder_of_the_same_name_is_another_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("shapes", "checkpoint"):
        assert not is_demo(Path(shutil.copytree(tiny_checkpoint, tmp_path / name)))


def test_a_bundle_is_recognised_by_what_its_build_recorded(shapes_bundle: Path, tiny_bundle: Path) -> None:
    demo, other = Bundle.open(shapes_bundle), Bundle.open(tiny_bundle)
    assert demo.manifest.request["checkpoint_sha256"] == weights_sha256(demo_checkpoint())
    assert is_demo(demo) and not is_demo(other)
    assert default_prompts(other) == PROMPTS != default_prompts(demo)
    assert demo_grader(other) is None and calibration_prompts(other, 2, 2) is None
    calibration, trials = calibration_prompts(demo, 4, 8) or ((), ())
    assert (len(calibration), len(trials)) == (4, 8) and not set(calibration) & set(trials)
    hostile = replace(demo.manifest, request={"checkpoint_sha256": [{"x": 1}]})
    assert not is_demo(replace(demo, manifest=hostile))


def test_its_grader_returns_none_for_what_it_cannot_grade(demo_copy: Path) -> None:
    grade = demo_grader(demo_copy)
    assert grade is not None
    image = np.zeros((64, 64, 3), np.uint8)
    circle = {"prompts": "a red circle"}
    assert grade([image], [circle]) == [False]
    assert grade([image], [{"prompts": "a photo of a cat"}]) is None and grade([image], [{}]) is None
    assert grade([image[:32]], [circle]) is None


@pytest.mark.parametrize("verb", [("build", "-o", "new"), ("build", "--demo", "inpainting", "-o", "new"), ("verify",)])
def test_without_it_one_line_says_how_to_install_it(
    verb: tuple[str, ...], tiny_bundle: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ldm_export_demo", None)  # importing it fails, as if it were not installed
    arguments = [*verb, *([tiny_bundle] if verb == ("verify",) else [])]
    for message in ("pip install ./demo", "make demo"):
        refused(*arguments, message=message)


def test_half_precision_is_measured_with_the_given_prompts(
    tiny_checkpoint: Path, half_bundle: Bundle, tmp_path: Path, refused: Callable[..., None]
) -> None:
    checkpoint, folder = open_checkpoint(tiny_checkpoint), shutil.copytree(half_bundle.folder, tmp_path / "bundle")
    options = BuildOptions("fp16", requests=({"prompts": "a red circle"},))
    ranges = json.loads(half_bundle.file("report/ranges.json").read_text())
    again = build(checkpoint, folder, options=options)
    assert again.origins["ranges"] == "made" and again.origins["unet.fp32"] == "kept"
    assert json.loads(again.bundle.file("report/ranges.json").read_text()) != ranges
    (tmp_path / "p.txt").write_text("a red circle\n")
    refused(
        "build", tiny_checkpoint, "-o", "new", "--prompts", "p.txt", message="--prompts: of fp16, bf16 or int8; give"
    )
    refused(
        *("build", tiny_checkpoint, "-o", "new", "--precision", "fp16", "--prompts", "p.txt", "--trials", "4"),
        message="--trials: of int8; give --precision int8 too",
    )


def test_prompt_accuracy_is_bounded_by_the_callers_grader(tmp_path: Path) -> None:
    bundle = bundle_of(text_model(tmp_path / "model"), tmp_path / "bundle", QUANTIZED).folder
    settings = replace(SETTINGS, max_accuracy_loss=0.5)
    with pytest.raises(SpecError, match=r"^max accuracy loss: got 0\.5, but no grader .*give --min-psnr"):
        calibrate(bundle, settings)
    with pytest.raises(BuildError, match=r"^max accuracy loss: the grader cannot grade the trial images"):
        calibrate(bundle, settings, grade=lambda images, requests: None)
    built = calibrate(bundle, settings, grade=lambda images, requests: [True, False])
    images = read_record(built.bundle.file(CALIBRATION_RECORD)).document["images"]
    assert [(one["correct_fp32"], one["correct_int8"]) for one in images] == [(True, True), (False, False)]
    summary = write_report(built.bundle)[1]["summary"]
    assert (summary["correct_fp32"], summary["correct_int8"]) == (0.5, 0.5)


def test_a_checkpoint_beside_a_demo_model_is_refused(tiny_checkpoint: Path, refused: Callable[..., None]) -> None:
    refused(
        *("build", tiny_checkpoint, "--demo", "inpainting", "-o", "new"),
        message=f"--demo: got inpainting beside the checkpoint {tiny_checkpoint}; give one of them",
    )


def test_the_demo_package_has_a_checkpoint_for_every_task(tiny_bundle: Path, shapes_bundle: Path) -> None:
    assert tuple(CHECKPOINTS) == TASKS
    assert all(demo_checkpoint(task).exists() for task in TASKS)
    assert [demo_config(task) is None for task in TASKS] == [True, True, False]
    assert demo_task(Bundle.open(shapes_bundle)) == TASKS[0] and demo_task(Bundle.open(tiny_bundle)) is None
