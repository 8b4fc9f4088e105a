"""Small models that the calibration tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_calibration.model import CalibrationModel
from tests.support.small_models import text_model, unconditional_model


@pytest.fixture
def text(tmp_path: Path) -> CalibrationModel:
    """A model conditioned on text, in the test's own folder."""
    return text_model(tmp_path)


@pytest.fixture
def unconditional(tmp_path: Path) -> CalibrationModel:
    """A model without conditioning, in the test's own folder."""
    return unconditional_model(tmp_path)
