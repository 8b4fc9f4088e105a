"""Trajectories: what a step computes, what it refuses, and that it leaves its inputs alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ldm_runtime.errors import SpecError
from ldm_runtime.noise import TorchGenerator
from ldm_runtime.schedulers import DDIM, PNDM, Clip, DPMSolverMultistep, Scheduler, Threshold, Trajectory
from ldm_runtime.schedulers import SCHEDULERS as SCHEDULERS_BY_CLASS
from tests.runtime.schedulers.scheduler_cases import CASES

SCHEDULERS: list[Scheduler] = [
    DDIM(),
    DDIM(clip_sample=False),
    DDIM(thresholding=True),
    PNDM(),
    PNDM(skip_prk_steps=True),
    DPMSolverMultistep(),
    DPMSolverMultistep(solver_order=3, thresholding=True),
    DPMSolverMultistep(algorithm_type="sde-dpmsolver++"),
    *(SCHEDULERS_BY_CLASS[name]() for name in CASES),
]


def arrays(trajectory: Trajectory) -> tuple[list[np.ndarray], np.ndarray, np.ndarray | None]:
    """A random state, prediction and, where needed, noise."""
    shape = (2, 3, 4)
    state = [TorchGenerator(seed).randn(shape) for seed in range(trajectory.slots)]
    return state, TorchGenerator(8).randn(shape), TorchGenerator(9).randn(shape) if trajectory.needs_noise else None


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
@pytest.mark.parametrize("i", [0, 1, 5])
def test_a_step_is_the_sum_of_its_row(scheduler: Scheduler, i: int) -> None:
    trajectory = scheduler.trajectory(8, 0.5)
    state, prediction, noise = arrays(trajectory)
    before = [array.copy() for array in (*state, prediction)]
    result = trajectory.step(state, prediction, i, noise)
    x0 = trajectory.predict_x0(state[0], prediction, i)
    terms = np.stack([*state, prediction, x0, x0 * 0 if noise is None else noise]).astype(np.float64)
    expected = np.tensordot(trajectory.rows[i].astype(np.float64), terms, axes=1)
    np.testing.assert_allclose(np.stack(result), expected, rtol=0, atol=3e-6 * max(1, np.abs(expected).max()))
    assert not any(np.shares_memory(a, b) for a in result for b in (*state, prediction))
    assert all(np.array_equal(a, b) for a, b in zip(before, (*state, prediction), strict=True))
    if not trajectory.affine:
        assert trajectory.rows[..., -2].any()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_ddim_adds_in_one_order(prediction_type: str, eta: float) -> None:
    trajectory = DDIM(clip_sample=False, prediction_type=prediction_type).trajectory(20, eta)
    (x,), out, noise = arrays(trajectory)
    for i, ((a, b, _, c),) in enumerate(trajectory.rows[:-1]):
        expected = a * x + b * out if noise is None else a * x + b * out + c * noise
        np.testing.assert_array_equal(trajectory.step([x], out, i, noise)[0], expected)


def test_arrays_are_read_only() -> None:
    trajectory = PNDM().trajectory(5)
    for array in (trajectory.timesteps, trajectory.rows, trajectory.x0_weights, trajectory.input_scale):
        with pytest.raises(ValueError, match="read-only"):
            array.flat[0] = 1
    assert trajectory.timesteps.dtype == np.int64
    assert {a.dtype for a in (trajectory.rows, trajectory.x0_weights, trajectory.input_scale)} == {np.dtype("f4")}


def test_start() -> None:
    x = TorchGenerator(0).randn((1, 4, 8))
    state = DPMSolverMultistep(solver_order=3).trajectory(5).start(x)
    assert [np.array_equal(array, x) for array in state] == [True, False, False]
    assert not np.any(state[1:])
    with pytest.raises(SpecError, match=r"latents: got float64 \[1, 4, 8\], expected float32"):
        DDIM().trajectory(5).start(x.astype(np.float64))  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.995, 1.0])
@pytest.mark.parametrize("highest", [0.8, 1.0, 1.5, 40.0])
def test_limits_of_x0(ratio: float, highest: float) -> None:
    x = 3 * TorchGenerator(0).randn((3, 2, 5, 7))
    x[1] /= 100
    scheduler = DDIMScheduler(dynamic_thresholding_ratio=ratio, sample_max_value=highest)
    expected = scheduler._threshold_sample(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(Threshold(ratio, highest)(x), expected, rtol=1e-6, atol=1e-6)
    result = Clip(highest)(x)
    np.testing.assert_array_equal(result, torch.from_numpy(x).clamp(-highest, highest).numpy())
    assert result.dtype == np.float32


def test_steps_misused() -> None:
    x = TorchGenerator(0).randn((1, 4, 8))
    plain, noisy = DDIM(clip_sample=False).trajectory(5), DDIM(clip_sample=False).trajectory(5, 0.5)
    bad: Any
    for bad in (-1, 5, 1.0, None, True):
        with pytest.raises(SpecError, match=rf"got step {bad!r}, expected 0\.\.4"):
            plain.step([x], x, bad)
    assert np.array_equal(plain.step([x], x, np.int64(1))[0], plain.step([x], x, 1)[0])  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"noise: got some, expected none"):
        plain.step([x], x, 0, x)
    with pytest.raises(SpecError, match=r"noise: got none, expected some"):
        noisy.step([x], x, 0)
    with pytest.raises(SpecError, match=r"state: got 2 arrays, expected 1"):
        plain.step([x, x], x, 0)
    with pytest.raises(SpecError, match=r"state: got 1 arrays, expected 4"):
        PNDM(skip_prk_steps=True).trajectory(5).step([x], x, 0)
    with pytest.raises(SpecError, match=r"state\[1\]: got float32 \[2, 4, 8\], expected the shape of x"):
        DPMSolverMultistep().trajectory(5).step([x, np.concatenate([x, x])], x, 0)
    with pytest.raises(SpecError, match=r"prediction: got float16 \[1, 4, 8\], expected float32"):
        plain.step([x], x.astype(np.float16), 0)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"x: got float64 \[1, 4, 8\], expected float32"):
        plain.step([x.astype(np.float64)], x, 0)  # type: ignore[list-item]
    with pytest.raises(SpecError, match=r"prediction: got float32 \[2, 4, 8\], expected the shape of x, \[1, 4, 8\]"):
        plain.step([x], np.concatenate([x, x]), 0)
    with pytest.raises(SpecError, match=r"noise: got float32 \[4, 8\], expected the shape of x"):
        noisy.step([x], x, 0, x[0])
    with pytest.raises(SpecError, match=r"x: got float32 \[8\], expected float32 \[batch, \.\.\.\]"):
        plain.step([x[0, 0]], x[0, 0], 0)
    with pytest.raises(SpecError, match=r"x: got float32 \[0, 4, 8\]"):
        plain.predict_x0(x[:0], x[:0], 0)
