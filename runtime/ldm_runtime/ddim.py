"""The DDIM sampler (Song et al. 2020, arXiv:2010.02502) with the options and arithmetic of diffusers' DDIMScheduler."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError
from ldm_runtime.schedule import Schedule

F32 = NDArray[np.float32]

MAX_TRAIN_TIMESTEPS = 100_000
CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}
SWITCHES = ("clip_sample", "set_alpha_to_one", "thresholding", "rescale_betas_zero_snr")
FLOAT32_MAX = float(np.finfo(np.float32).max)

# Keys of older versions and of other schedulers, as published latent diffusion checkpoints carry them, and the values
# with which they leave a DDIM step as it is (None: any value).
FOREIGN: dict[str, tuple[Any, ...] | None] = {
    "tensor_format": None,  # early diffusers: numpy or torch
    "timestep_values": (None,),  # early diffusers, never read; a list would be meant to be
    "skip_prk_steps": None,  # PNDM's warm-up
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),  # DDPM; not learned
    "interpolation_type": None,  # from here on Euler's
    "final_sigmas_type": None,
    "timestep_type": (None, "discrete"),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "use_karras_sigmas": (None, False),
    "use_exponential_sigmas": (None, False),
    "use_beta_sigmas": (None, False),
}


@dataclass(frozen=True)
class DDIM:
    """A DDIMScheduler's configuration; names, meanings and defaults are those of diffusers 0.42.

    Raises:
        SpecError: names the option, what it got and what it takes. Narrower than diffusers: num_train_timesteps is at
            most 100 000, betas lie in (0, 1), trained_betas has num_train_timesteps of them, steps_offset is not
            negative, clip_sample_range and sample_max_value are positive.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        count = self.num_train_timesteps
        self._expect("num_train_timesteps", _integer(count, 1, MAX_TRAIN_TIMESTEPS), f"1..{MAX_TRAIN_TIMESTEPS}")
        self._expect("steps_offset", _integer(self.steps_offset, 0, count - 1), f"0..{count - 1}")
        for name in SWITCHES:
            self._expect(name, isinstance(getattr(self, name), bool), "true or false")
        for name, choices in CHOICES.items():
            self._expect(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        for name in ("beta_start", "beta_end"):
            self._expect(name, _beta(getattr(self, name)), "a number in (0, 1)")
        for name in ("clip_sample_range", "sample_max_value"):
            value = getattr(self, name)
            self._expect(name, _number(value) and 0 < value <= FLOAT32_MAX, "a finite number > 0")
        ratio = self.dynamic_thresholding_ratio
        self._expect("dynamic_thresholding_ratio", _number(ratio) and 0 <= ratio <= 1, "a number in [0, 1]")
        betas = self.trained_betas
        fits = betas is None or (isinstance(betas, tuple) and len(betas) == count and all(map(_beta, betas)))
        self._expect("trained_betas", fits, f"null or {count} numbers in (0, 1), one per training timestep")
        if not np.isfinite(self.alphas_cumprod).all():
            raise SpecError(
                "scheduler: rescale_betas_zero_snr: got true, but these betas rescale to NaN; expected false"
            )

    def _expect(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise SpecError(f"scheduler: {name}: got {reprlib.repr(getattr(self, name))}, expected {expected}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DDIM:
        """Read a parsed scheduler_config.json.

        Missing keys take diffusers' defaults. Keys that start with ``_`` are ignored, also ``_class_name``: the caller
        checks whether the checkpoint names another scheduler.

        Raises:
            SpecError: an unknown key, unless it is another scheduler's and leaves DDIM as it is (FOREIGN); a bad value.
        """
        if not isinstance(config, Mapping):
            raise SpecError(f"scheduler: got {reprlib.repr(config)}, expected an object of options")
        names = [field.name for field in dataclasses.fields(cls)]
        options: dict[str, Any] = {}
        for name, value in config.items():
            if name in names:
                options[name] = tuple(value) if isinstance(value, list) else value
            elif name in FOREIGN:
                allowed = FOREIGN[name]
                if allowed is not None and value not in allowed:
                    raise SpecError(
                        f"scheduler: {name}: got {reprlib.repr(value)}, which DDIM lacks; expected one of {allowed}"
                    )
            elif not (isinstance(name, str) and name.startswith("_")):
                raise SpecError(f"scheduler: unknown option {reprlib.repr(name)}, expected some of {', '.join(names)}")
        return cls(**options)

    def to_config(self) -> dict[str, Any]:
        """Every option, ready for JSON; ``from_config`` and diffusers' DDIMScheduler take it back."""
        config = dataclasses.asdict(self)
        if self.trained_betas is not None:
            config["trained_betas"] = list(self.trained_betas)
        return config

    @property
    def alphas_cumprod(self) -> F32:
        """ᾱ of every training timestep, float32 [num_train_timesteps], rounded where torch rounds."""
        betas = self._betas()
        return _cumprod(1 - (_rescale_zero_terminal_snr(betas) if self.rescale_betas_zero_snr else betas))

    def _betas(self) -> F32:
        count = self.num_train_timesteps
        if self.trained_betas is not None:
            return np.array(self.trained_betas, np.float32)
        if self.beta_schedule == "linear":
            return _linspace(self.beta_start, self.beta_end, count)
        if self.beta_schedule == "scaled_linear":
            return _linspace(self.beta_start**0.5, self.beta_end**0.5, count) ** 2
        bars = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        return np.array([min(1 - bars[i + 1] / bars[i], 0.999) for i in range(count)], np.float32)

    def timesteps(self, steps: int) -> NDArray[np.int64]:
        """The ``steps`` timesteps of a trajectory, int64, falling, all within the training timesteps.

        Raises:
            SpecError: steps is not in 1..num_train_timesteps, or timestep_spacing and steps_offset lead out of them.
        """
        count = self.num_train_timesteps
        if not _integer(steps, 1, count):
            raise SpecError(f"steps: got {reprlib.repr(steps)}, expected 1..{count}")
        if self.timestep_spacing == "leading":
            found: NDArray[Any] = np.arange(steps)[::-1] * (count // steps) + self.steps_offset
        elif self.timestep_spacing == "linspace":
            found = np.linspace(0, count - 1, steps).round()[::-1]
        else:
            found = np.round(np.arange(count, 0, -(count / steps))) - 1
        if found[0] >= count:
            where = f"steps_offset: got {self.steps_offset} with {steps} steps"
            raise SpecError(f"{where}: timestep {found[0]}, expected at most {count - 1}; take fewer steps")
        if len(found) != steps:  # a rounding fault of diffusers, which goes on to timestep -1 and spoils the image
            where = f"steps: got {steps}, which timestep_spacing 'trailing' rounds to {len(found)} timesteps"
            raise SpecError(f"{where} down to {found[-1]:.0f}, expected {steps}; take another number of steps")
        return found.astype(np.int64)

    def schedule(self, steps: int, eta: float = 0.0) -> Schedule:
        """Every number that ``steps`` steps need. ``eta``: 0 is deterministic DDIM, 1 as noisy as DDPM.

        Raises:
            SpecError: steps or eta out of range; an eta so large that noise outweighs its step; a timestep with no
                signal (ᾱ = 0: zero terminal SNR) or no noise (ᾱ = 1) where the prediction type divides by it.
        """
        timesteps = self.timesteps(steps)
        if not (_number(eta) and 0 <= eta <= FLOAT32_MAX):
            raise SpecError(f"eta: got {reprlib.repr(eta)}, expected a finite number >= 0; 0 to 1 is usual")
        alphas = self.alphas_cumprod
        previous = timesteps - self.num_train_timesteps // steps
        final = np.float32(1) if self.set_alpha_to_one else alphas[0]
        alpha, alpha_prev = alphas[timesteps], np.where(previous >= 0, alphas[previous], final)
        beta, beta_prev = 1 - alpha, 1 - alpha_prev
        with np.errstate(all="ignore"):  # what is not finite is refused below
            variance = beta_prev / beta * (1 - alpha / alpha_prev)
            sigma = np.float32(eta) * np.sqrt(variance)
            direction = beta_prev - np.float32(eta) * (np.float32(eta) * variance)  # not σ², which rounds below 0
            schedule = Schedule(
                prediction_type=self.prediction_type,
                clip=self.clip_sample_range if self.clip_sample else None,
                threshold=(self.dynamic_thresholding_ratio, self.sample_max_value) if self.thresholding else None,
                eta=float(eta),
                timesteps=timesteps,
                signal=np.sqrt(alpha),
                spread=np.sqrt(beta),
                signal_prev=np.sqrt(alpha_prev),
                direction=np.sqrt(np.maximum(direction, 0)),
                sigma=sigma,
            )
            finite = np.isfinite(variance) & np.isfinite(schedule.unclipped_rows()[:, :2]).all(axis=1)
            limit = np.sqrt(beta_prev / variance)
        if not finite.all():
            i = int(np.argmin(finite))
            raise SpecError(
                f"scheduler: timestep {timesteps[i]}: got alpha_cumprod {alpha[i]:g}, then {alpha_prev[i]:g}, where "
                f"prediction_type {self.prediction_type!r} divides by zero; expected other betas or timestep_spacing, "
                "and with rescale_betas_zero_snr a model of prediction_type 'v_prediction'"
            )
        wild = ~(direction >= -1e-6)  # between that and 0 is rounding, where diffusers gives NaN
        if wild.any():
            i = int(np.nanargmin(limit))
            most = math.floor(float(limit[i]) * 1e4) / 1e4
            where = f"at timestep {timesteps[i]} the noise outweighs the step"
            raise SpecError(f"eta: got {eta:g} with {steps} steps, expected at most {most:g}: {where}")
        return schedule


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _integer(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _beta(value: Any) -> bool:
    return _number(value) and 0 < value < 1


def _linspace(start: float, end: float, count: int) -> F32:
    """torch.linspace in float32: from both ends to the middle."""
    first, last, index = np.float32(start), np.float32(end), np.arange(count, dtype=np.float32)
    step = (last - first) / np.float32(max(count - 1, 1))
    return np.where(index < count // 2, first + step * index, last - step * index[::-1]) if count > 1 else index + first


def _cumprod(alphas: F32) -> F32:
    """torch.cumprod on the CPU: products in double, each rounded to float32."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _rescale_zero_terminal_snr(betas: F32) -> F32:
    """Betas whose last ᾱ is 0 (Lin et al. 2023, arXiv:2305.08891, algorithm 1)."""
    root = np.sqrt(_cumprod(1 - betas))
    with np.errstate(all="ignore"):
        bars = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        return 1 - np.concatenate([bars[:1], bars[1:] / bars[:-1]])
