"""Absurd numbers in settings and on the command line are refused in one short line; NumPy's numbers are accepted."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from ldm_calibration.settings import CalibrationSettings
from ldm_export.bench.benchmark import BenchSettings
from ldm_export.cli import main
from ldm_runtime.errors import SpecError

ABSURD: tuple[Any, ...] = (10**5000, -(10**400), "x" * 10_000, True, float("nan"), [[1]])
BENCH = ("runs", "steps", "guidance_scale", "eta", "height", "width", "threads")
CALIBRATION = ("steps", "samples", "trial_steps", "eta", "guidance_scale", "min_psnr", "max_accuracy_loss")


def calibration(**values: Any) -> CalibrationSettings:
    return CalibrationSettings(({"prompts": "a"},), ({"prompts": "a"},), **values)


@pytest.mark.parametrize(("make", "names"), [(BenchSettings, BENCH), (calibration, CALIBRATION)])
def test_settings(make: Any, names: tuple[str, ...]) -> None:
    for name in names:
        for value in ABSURD:
            with pytest.raises(SpecError, match=name.replace("_", ".")) as caught:
                make(**{name: value})
            assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def test_batches() -> None:
    for value in ABSURD:
        with pytest.raises(SpecError, match="batch") as caught:
            BenchSettings(batches=(1, value))
        assert len(str(caught.value)) <= 300


def test_numpy_numbers() -> None:
    bench = BenchSettings(batches=(np.int64(2),), steps=np.int32(3), eta=np.float32(0.5), threads=np.int8(2))
    assert bench == BenchSettings(batches=(2,), steps=3, eta=0.5, threads=2)
    settings = calibration(steps=np.int64(4), min_psnr=np.float32(30), guidance_scale=np.int64(5))
    assert json.loads(json.dumps(settings.to_json()))["guidance_scale"] == 5.0


@pytest.mark.parametrize("value", ["9" * 5000, "1e5000" + "0" * 5000, "x" * 5000])
@pytest.mark.parametrize("option", ["--steps", "--guidance", "--threads", "--seed", "--width"])
def test_command_line(capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", "bundle", "a", f"{option}={value}"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and option in last and len(last) <= 300
