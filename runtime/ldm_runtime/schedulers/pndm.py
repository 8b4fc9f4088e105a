"""PNDM (Liu et al. 2022, arXiv:2202.09778) with the options and arithmetic of diffusers' PNDMScheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError
from ldm_runtime.schedulers.noise_schedule import (
    EARLY_KEYS,
    SIGMA_KEYS,
    TIMESTEP_SPACINGS,
    NoiseSchedule,
    spaced_timesteps,
)
from ldm_runtime.schedulers.options import choice, integer, step_count, switch
from ldm_runtime.schedulers.trajectory import Trajectory, noisy_weights

__all__ = ["FOREIGN", "MAX_STEPS", "PNDM"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

MAX_STEPS = 10_000
PREDICTION_TYPES = ("epsilon", "v_prediction")
# Adams-Bashforth weights of the prediction and of the previous ones, latest first.
MULTISTEP = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

FOREIGN: Mapping[str, tuple[Any, ...] | None] = {
    **EARLY_KEYS,
    **SIGMA_KEYS,
    "clip_sample": None,  # DDIM; diffusers writes it into configs of PNDM, which never clips
    "clip_sample_range": None,
    "thresholding": (None, False),
    "dynamic_thresholding_ratio": None,
    "sample_max_value": None,
    "rescale_betas_zero_snr": (None, False),
    "solver_order": None,  # from here on DPM-Solver
    "solver_type": None,
    "algorithm_type": None,
    "lower_order_final": None,
    "euler_at_final": None,
    "lambda_min_clipped": None,
    "use_lu_lambdas": (None, False),
    "use_flow_sigmas": (None, False),
    "flow_shift": None,
    "use_dynamic_shifting": None,
    "time_shift_type": None,
}


@dataclass(frozen=True)
class PNDM(NoiseSchedule):
    """Configuration of a PNDMScheduler; names, meanings and defaults are those of diffusers 0.42.

    Raises:
        SpecError: Names the option, the value and the expected values. Narrower than diffusers, besides the limits of
            ``NoiseSchedule``: steps_offset is not negative.
    """

    CLASS: ClassVar[str] = "PNDMScheduler"
    FOREIGN: ClassVar[Mapping[str, tuple[Any, ...] | None]] = FOREIGN

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("skip_prk_steps", switch)
        self._set("set_alpha_to_one", switch)
        self._set("prediction_type", choice, PREDICTION_TYPES)
        self._set("timestep_spacing", choice, TIMESTEP_SPACINGS)
        self._set("steps_offset", integer, 0, self.num_train_timesteps - 1)

    def timesteps(self, num_inference_steps: int) -> I64:
        """Return the timestep of every UNet call, int64 [calls].

        With skip_prk_steps there is one call more than steps, because the second timestep is used twice (a single step
        is one call). Without it, twelve Runge-Kutta calls take the place of the first three. With timestep_spacing
        "trailing", some numbers of steps give one call more, at timestep -1, as in diffusers (``spaced_timesteps``).

        Raises:
            SpecError: The number of steps is not in 1..10 000, or below 4 without skip_prk_steps, or steps_offset leads
                beyond the training timesteps.
        """
        steps = step_count(num_inference_steps, MAX_STEPS)
        spaced = spaced_timesteps(self.timestep_spacing, self.num_train_timesteps, steps, self.steps_offset)
        if self.skip_prk_steps:
            return np.concatenate([spaced[:1], spaced[1:2], spaced[1:]])
        if len(spaced) < 4:
            raise SpecError(f"steps: got {steps}, expected at least 4, which skip_prk_steps false needs")
        halves = np.repeat(spaced[:4], 2)
        halves[::2] += self.num_train_timesteps // steps // 2
        return np.concatenate([np.repeat(halves[1:], 2)[1:-1], spaced[3:]])

    def trajectory(self, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory: pseudo Runge-Kutta or linear multistep, each by formula (9) of the paper.

        Args:
            num_inference_steps: 1..10 000, without skip_prk_steps from 4; more than training timesteps repeat some.
            eta: Ignored; PNDM is deterministic.

        Raises:
            SpecError: An argument is out of range; a timestep lies beyond the training timesteps; the betas leave a
                timestep no signal.
        """
        return self.trajectory_after(0, num_inference_steps, eta)

    def trajectory_after(self, steps: int, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory without its first ``steps`` steps; arguments and errors as in ``NoiseSchedule``.

        Linear multistep begins anew, so the second of the calls that are left repeats the first step.

        Raises:
            SpecError: As ``trajectory``; also if Runge-Kutta steps would be left out, which diffusers handles
                incorrectly.
        """
        timesteps = self.timesteps(num_inference_steps)[steps:]
        if steps and not self.skip_prk_steps:
            raise SpecError(
                "scheduler: PNDMScheduler with skip_prk_steps false cannot start from an image; diffusers' Runge-Kutta "
                "steps are wrong there; use another scheduler"
            )
        steps = int(num_inference_steps)
        stride = self.num_train_timesteps // steps
        calls = _multistep_calls(timesteps, stride) if self.skip_prk_steps else _runge_kutta_calls(timesteps, stride)
        last = max(call.from_t for call in calls)
        if last >= self.num_train_timesteps:
            where = f"steps: got {steps} with timestep_spacing {self.timestep_spacing!r}: timestep {last}"
            raise SpecError(f"{where}, expected at most {self.num_train_timesteps - 1}; take another number of steps")
        slots = 4 if self.skip_prk_steps else 6
        rows = np.zeros((len(calls), slots, slots + 3))
        with np.errstate(all="ignore"):  # non-finite values are refused below
            of_x, of_prediction = self._weights(calls)
            for i, call in enumerate(calls):
                for column, weight in call.average.items():
                    rows[i, 0, column if column >= 0 else slots] = of_prediction[i] * weight
                rows[i, 0, call.base] += of_x[i]
                for slot, weights in call.history.items():
                    for column, weight in weights.items():
                        rows[i, slot, column if column >= 0 else slots] = weight
            float_rows, x0_weights = rows.astype(np.float32), self._x0_weights(timesteps)
            alphas = self.alphas_cumprod[timesteps]
        finite = np.isfinite(float_rows).all(axis=(1, 2)) & np.isfinite(x0_weights).all(axis=1)
        if not finite.all():
            at = timesteps[int(np.argmin(finite))]
            raise SpecError(
                f"scheduler: timestep {at}: alpha_cumprod is 0 or 1 and PNDM divides by it or by 1 - it; "
                "expected other betas"
            )
        return Trajectory(
            timesteps=timesteps,
            init_noise_sigma=1.0,
            input_scale=np.ones(len(timesteps), np.float32),
            needs_noise=False,
            rows=float_rows,
            x0_weights=x0_weights,
            noisy_weights=noisy_weights(np.sqrt(alphas), np.sqrt(1 - alphas)),
        )

    def _weights(self, calls: list[_Call]) -> tuple[F64, F64]:
        """Weights of x and of the averaged prediction in formula (9), float64 [calls] each."""
        alphas = self.alphas_cumprod.astype(np.float64)
        final = 1.0 if self.set_alpha_to_one else alphas[0]
        from_t, to_t = np.array([call.from_t for call in calls]), np.array([call.to_t for call in calls])
        alpha, alpha_prev = alphas[from_t], np.where(to_t >= 0, alphas[to_t], final)
        of_x = np.sqrt(alpha_prev / alpha)
        denominator = alpha * np.sqrt(1 - alpha_prev) + np.sqrt(alpha * (1 - alpha) * alpha_prev)
        of_eps = (alpha - alpha_prev) / denominator
        if self.prediction_type == "epsilon":
            return of_x, of_eps
        return of_x + of_eps * np.sqrt(1 - alpha), of_eps * np.sqrt(alpha)

    def _x0_weights(self, timesteps: I64) -> F32:
        alpha = self.alphas_cumprod.astype(np.float64)[timesteps]
        sqrt_alpha, sqrt_beta = np.sqrt(alpha), np.sqrt(1 - alpha)
        weights = (
            (1 / sqrt_alpha, -sqrt_beta / sqrt_alpha) if self.prediction_type == "epsilon" else (sqrt_alpha, -sqrt_beta)
        )
        return np.stack(weights, axis=1).astype(np.float32)


@dataclass(frozen=True)
class _Call:
    """One UNet call: a step between two timesteps along an average of predictions.

    In weights, a column is a slot of the state, or -1 for the prediction.

    Args:
        from_t, to_t: Timesteps whose ᾱ formula (9) uses; below 0, ``to_t`` is the end of the trajectory.
        base: Slot of the x that the step starts from.
        average: Weights of the averaged prediction.
        history: For each slot except 0, the weights of its new value; missing slots become zero.
    """

    from_t: int
    to_t: int
    base: int
    average: Mapping[int, float]
    history: Mapping[int, Mapping[int, float]]


def _multistep_calls(timesteps: I64, stride: int) -> list[_Call]:
    """Calls with skip_prk_steps. Slots: x and the last three predictions; slot 2 holds the first x at the beginning."""
    calls = []
    for i, t in enumerate(timesteps.tolist()):
        if i == 0:
            calls.append(_Call(t, t - stride, 0, {-1: 1.0}, {1: {-1: 1.0}, 2: {0: 1.0}}))
        elif i == 1:  # the first step again, along the mean of both predictions
            calls.append(_Call(t + stride, t, 2, {-1: 0.5, 1: 0.5}, {1: {1: 1.0}}))
        else:
            calls.append(_multistep_call(t, stride, min(i - 1, 3)))
    return calls


def _runge_kutta_calls(timesteps: I64, stride: int) -> list[_Call]:
    """Calls without skip_prk_steps. Slots: x, three predictions, x at the start of a Runge-Kutta step, and a sum."""
    calls, times = [], timesteps.tolist()
    keep = {slot: {slot: 1.0} for slot in (1, 2, 3)}
    for i, t in enumerate(times[:12]):
        start, stage = times[i // 4 * 4], i % 4
        to_t = t if i % 2 else t - stride // 2
        if stage == 0:
            calls.append(_Call(start, to_t, 0, {-1: 1.0}, {**_SHIFT, 4: {0: 1.0}, 5: {-1: 1 / 6}}))
        elif stage < 3:
            calls.append(_Call(start, to_t, 4, {-1: 1.0}, {**keep, 4: {4: 1.0}, 5: {5: 1.0, -1: 1 / 3}}))
        else:
            calls.append(_Call(start, to_t, 4, {5: 1.0, -1: 1 / 6}, keep))
    return calls + [_multistep_call(t, stride, 3) for t in times[12:]]


_SHIFT: Mapping[int, Mapping[int, float]] = {1: {-1: 1.0}, 2: {1: 1.0}, 3: {2: 1.0}}


def _multistep_call(t: int, stride: int, previous: int) -> _Call:
    """A linear multistep call that averages with ``previous`` earlier predictions."""
    weights = MULTISTEP[previous]
    return _Call(t, t - stride, 0, {-1: weights[0], **dict(enumerate(weights[1:], 1))}, _SHIFT)
