"""DDIM with the timesteps of CompVis' DDIMSampler."""

from __future__ import annotations

import pytest

from ldm_runtime.errors import SpecError
from ldm_runtime.schedulers import DDIM

OPTIONS = {"timestep_spacing": "compvis", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}


@pytest.mark.parametrize(
    ("steps", "count"), [(10, 10), (15, 16), (30, 31), (60, 63), (75, 77), (150, 167), (400, 500), (1, 1)]
)
def test_there_are_as_many_as_the_authors_take(steps: int, count: int) -> None:
    timesteps = DDIM(**OPTIONS).trajectory(steps).timesteps  # type: ignore[arg-type]
    assert list(timesteps) == [step + 1 for step in range(0, 1000, 1000 // steps)][::-1]
    assert len(timesteps) == count


@pytest.mark.parametrize("steps", [3, 9, 27, 36, 37, 101, 111, 251, 333, 501, 1000])
def test_numbers_that_go_beyond_the_schedule_are_refused(steps: int) -> None:
    with pytest.raises(SpecError, match="steps"):
        DDIM(**OPTIONS).trajectory(steps)  # type: ignore[arg-type]
