"""The record of measured settings: which of them a request takes, and what is refused when a record is read."""

from __future__ import annotations

from typing import Any

import pytest

from ldm_runtime.backends.engine import Choice
from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.measured_settings import settled
from ldm_runtime.quality import QualityRecord, QualityResult, QualitySetting
from ldm_runtime.request import Request


def result(steps: int, seconds: float, worst: float | None, correct: float | None, **setting: int) -> QualityResult:
    mean = None if worst is None else worst + 5
    return QualityResult(QualitySetting("fp32", steps, **setting), seconds, mean, worst, correct)


REFERENCE = result(50, 10.0, None, 0.9)
CACHED = result(50, 4.0, 40.0, 0.9, cache_every=3)
SLOW_HALF = result(25, 5.0, 36.0, 0.9)
HALF = result(25, 3.0, 30.0, 0.8, cache_every=2)
FEW = result(5, 1.0, 12.0, 0.4)
RECORD = QualityRecord((REFERENCE, CACHED, SLOW_HALF, HALF, FEW), 16, {"fp32": "onnxruntime on cpu"}, {"eta": 0.5})


@pytest.mark.parametrize(
    ("min_psnr", "fastest", "fewest"),
    [
        (0, FEW, FEW),
        (12.0, FEW, FEW),
        (12.1, HALF, HALF),
        (30.1, CACHED, SLOW_HALF),
        (36.1, CACHED, CACHED),
        (41, REFERENCE, REFERENCE),
    ],
)
def test_the_worst_image_decides(min_psnr: float, fastest: QualityResult, fewest: QualityResult) -> None:
    assert RECORD.fastest(min_psnr) is fastest
    assert RECORD.fewest_steps(min_psnr) is fewest


INT8 = QualityResult(QualitySetting("int8", 50), 0.5, 43.0, 38.0, 0.8)
BOTH = QualityRecord((*RECORD.results, INT8), 16, {})


def test_only_settings_of_the_loaded_precision_are_taken() -> None:
    assert BOTH.fastest(35) is BOTH.fastest(35, "int8") is INT8
    assert BOTH.fastest(35, "fp32") is CACHED and BOTH.fewest_steps(35, "int8") is INT8
    with pytest.raises(
        SpecError,
        match=r"^budget: got 39 dB, but no setting that was measured in int8 is good enough; the "
        r"best has worst 38.0 dB, mean 43.0 dB, 80% correct; ask for less, .* BUNDLE --quality --save`$",
    ):
        BOTH.fastest(39, "int8")
    with pytest.raises(
        SpecError, match=r"^steps: got auto, but no setting .* int8 is good .*80% correct; ask for less"
    ):
        BOTH.fewest_steps(None, "int8")
    with pytest.raises(
        SpecError,
        match=r"^budget: got 1 dB, but the settings of this bundle were measured in fp32, int8, not in bf16; "
        r"measure it with `ldm-export bench BUNDLE --quality --save --precision bf16`$",
    ):
        BOTH.fastest(1, "bf16")


@pytest.mark.parametrize(
    ("graph", "arithmetic", "precision"),
    [("fp32", "fp32", "fp32"), ("fp32", "bf16", "bf16"), ("int8", "bf16", "int8"), ("bf16", "fp32", "bf16")],
)
def test_the_precision_of_a_choice(graph: str, arithmetic: str, precision: str) -> None:
    assert Choice("openvino", "cpu", graph, arithmetic, 1, "").precision == precision


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ({"budget": 30.1}, CACHED),
        ({"budget": 30.1, "num_inference_steps": "auto"}, SLOW_HALF),
        ({"num_inference_steps": "auto"}, SLOW_HALF),
        ({"budget": 50, "guidance_scale": 2.0}, REFERENCE),
    ],
)
def test_a_request_takes_the_values_of_a_setting(asked: dict[str, Any], taken: QualityResult) -> None:
    request, setting = settled(Request("a", seed=5, **asked), BOTH, "fp32")
    assert setting is taken and request.budget is None
    assert {name: getattr(request, name) for name in taken.setting.options} == taken.setting.options
    assert (request.prompts, request.seed, request.guidance_scale) == ("a", 5, asked.get("guidance_scale"))


def test_a_request_without_a_budget_stays_as_it_is() -> None:
    request = Request("a", num_inference_steps=7, cache_every=2)
    assert settled(request, BOTH) == settled(request, None) == (request, None)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"budget": 35, "cache_every": 2}, "budget: got 35 dB and cache_every too, but a measured setting decides"),
        ({"budget": 35, "num_inference_steps": 5}, "budget: got 35 dB and steps too, but a measured setting decides"),
        ({"num_inference_steps": "auto", "scheduler": "PNDMScheduler"}, "steps: got auto and scheduler too, but"),
        ({"budget": float("nan")}, "budget: got nan, expected a finite number"),
        ({"budget": "35"}, "budget: got '35', expected a finite number"),
    ],
)
def test_a_request_that_contradicts_itself(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=f"^{message}"):
        settled(Request("a", **asked), BOTH)


def test_nothing_was_measured() -> None:
    message = (
        r"^budget: got 35 dB, but this bundle has no measured settings; measure them with `ldm-export bench BUNDLE"
    )
    with pytest.raises(SpecError, match=message):
        settled(Request("a", budget=35), None)


def test_without_a_psnr_the_correct_images_decide() -> None:
    assert RECORD.fewest_steps() is SLOW_HALF
    ungraded = QualityRecord((result(50, 1.0, None, None), result(5, 0.1, 30.0, None)), 4, {})
    with pytest.raises(SpecError, match=r"^steps: got auto without a budget, but no grader"):
        ungraded.fewest_steps()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "35", True, None])
def test_a_psnr_is_a_finite_number(value: Any) -> None:
    with pytest.raises(SpecError, match=r"min_psnr: got .*, expected a finite number"):
        RECORD.fastest(value)


def test_a_setting_describes_itself() -> None:
    assert CACHED.setting.options == {"num_inference_steps": 50, "cache_every": 3, "guidance_every": 1}
    text = "2.50× as fast as fp32, 50 steps, worst 40.0 dB, mean 45.0 dB, 90% correct (16 images, onnxruntime on cpu)"
    assert RECORD.measured(CACHED) == text


def test_a_record_is_read_as_it_was_written() -> None:
    assert QualityRecord.from_json("x", RECORD.to_json()) == RECORD


SETTING = RECORD.to_json()["settings"][0]
DAMAGED = {
    "no settings": ({"settings": []}, "settings: got no reference in the first place"),
    "no list": ({"settings": 5}, "settings: got 5, expected a list of at most 1024"),
    "no reference": ({"settings": [SETTING | {"worst_psnr": 5.0}]}, "settings: got no reference"),
    "no object": ({"settings": [5]}, r"settings\[0\]: got int, expected an object"),
    "no precision": ({"settings": [SETTING | {"precision": 5}]}, r"settings\[0\].precision: got 5, expected a text"),
    "no steps": ({"settings": [SETTING | {"steps": 0}]}, r"settings\[0\].steps: got 0, expected a whole number from 1"),
    "no time": ({"settings": [SETTING | {"seconds": 0}]}, r"settings\[0\].seconds: got 0, expected a number from"),
    "no share": ({"settings": [SETTING | {"correct": True}]}, r"settings\[0\].correct: got True, expected a number"),
    "no images": ({"images": None}, "images: got None, expected a whole number from 1"),
    "no engines": ({"engines": [1]}, "engines: got list, expected an object"),
    "no option": ({"options": {"eta": "x"}}, "options.eta: got 'x', expected a number"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_record_is_refused_by_field(case: str) -> None:
    change, message = DAMAGED[case]
    with pytest.raises(ManifestError, match=f"^bundle/quality.json: {message}"):
        QualityRecord.from_json("bundle/quality.json", RECORD.to_json() | change)
