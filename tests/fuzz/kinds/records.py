"""Calibration records: read, and sometimes applied to the bundle that they belong to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

from ldm_calibration.record import read_record
from ldm_calibration.settings import CalibrationSettings
from ldm_export.bundle.add_int8 import calibrate
from ldm_runtime.bundle_layout import CALIBRATION_RECORD
from tests.fuzz.mutation import changed_bytes, changed_document
from tests.fuzz.outcome import Attempt
from tests.support.small_models import bundle_of, unconditional_model

__all__ = ["prepare"]

APPLIED = 0.1
"""Share of the accepted records that are applied, which takes longer."""
SETTINGS = CalibrationSettings(({},), ({},), steps=2, samples=2, trial_steps=2, sensitivity="results", min_psnr=5.0)


def prepare(folder: Path) -> Attempt:
    """Calibrate a small model; an input is its record, changed."""
    bundle = folder / "bundle"
    bundle_of(unconditional_model(folder / "model"), bundle, ("unet", "decoder"))
    shutil.copytree(bundle, folder / "fp32")
    calibrate(bundle, SETTINGS)
    text = (bundle / CALIBRATION_RECORD).read_bytes()
    document = json.loads(text)
    file = folder / "record.json"

    def attempt(random: Random) -> None:
        file.write_bytes(
            changed_bytes(random, text)
            if random.random() < 0.2
            else json.dumps(changed_document(random, document)).encode()
        )
        record = read_record(file)
        for part in record.components.values():
            assert part.int8_share <= 1 or part.flops <= 0
        if random.random() < APPLIED:
            shutil.rmtree(bundle)
            shutil.copytree(folder / "fp32", bundle)
            calibrate(bundle, file)

    return attempt
