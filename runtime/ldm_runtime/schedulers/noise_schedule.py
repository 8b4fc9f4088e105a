"""Noise schedule of training: betas, cumulative products of alphas, and timesteps; the base of all schedulers."""

from __future__ import annotations

import dataclasses
import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import shown
from ldm_runtime.schedulers.options import among, beta, choice, fail, integer
from ldm_runtime.schedulers.trajectory import Trajectory

__all__ = [
    "BETA_SCHEDULES",
    "COMPVIS_SPACING",
    "EARLY_KEYS",
    "MAX_TRAIN_TIMESTEPS",
    "PREDICTION_TYPES",
    "SIGMA_KEYS",
    "SMALLEST_ALPHA",
    "TIMESTEP_SPACINGS",
    "NoiseSchedule",
    "spaced_timesteps",
]

F32 = NDArray[np.float32]

MAX_TRAIN_TIMESTEPS = 100_000
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SMALLEST_ALPHA = np.float32(2**-24)
"""Last ᾱ of schedulers in sigmas with rescale_betas_zero_snr. It is not 0, so that sigma is finite."""
COMPVIS_SPACING = "compvis"
"""A timestep spacing for DDIM that diffusers does not have; see ``spaced_timesteps``."""

# Keys of older versions and other schedulers that published latent diffusion checkpoints contain, and the values
# that change nothing (None: any value).
EARLY_KEYS: Mapping[str, tuple[Any, ...] | None] = {
    "tensor_format": None,  # early diffusers: numpy or torch
    "timestep_values": (None,),  # early diffusers, which never read it; a list is refused
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),  # DDPM; not learned
    "interpolation_type": None,  # Euler
    "timestep_type": (None, "discrete"),  # Euler
}
SIGMA_KEYS: Mapping[str, tuple[Any, ...] | None] = {
    "final_sigmas_type": None,
    "sigma_min": (None,),
    "sigma_max": (None,),
    "use_karras_sigmas": (None, False),
    "use_exponential_sigmas": (None, False),
    "use_beta_sigmas": (None, False),
}


@dataclass(frozen=True)
class NoiseSchedule(ABC):
    """Base of the schedulers: the options that define the betas, with the names and defaults of diffusers 0.42.

    Raises:
        SpecError: Names the option, the value and the expected values. Narrower than diffusers: num_train_timesteps is
            at most 100 000, betas lie in (0, 1), and trained_betas has num_train_timesteps of them.
    """

    CLASS: ClassVar[str]
    FOREIGN: ClassVar[Mapping[str, tuple[Any, ...] | None]]
    BETA_SCHEDULES: ClassVar[tuple[str, ...]] = BETA_SCHEDULES
    CALLS_PER_STEP: ClassVar[int] = 1
    """Number of UNet calls of every step but the last; ``order`` in diffusers' schedulers."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        self._set("num_train_timesteps", integer, 1, MAX_TRAIN_TIMESTEPS)
        self._set("beta_start", beta)
        self._set("beta_end", beta)
        self._set("beta_schedule", choice, self.BETA_SCHEDULES)
        if self.trained_betas is not None:
            self._set("trained_betas", _trained, self.num_train_timesteps)

    def _set(self, name: str, check: Any, *limits: Any) -> None:
        """Replace an option by the result of ``check(name, value, *limits)``."""
        object.__setattr__(self, name, check(name, getattr(self, name), *limits))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a parsed scheduler_config.json or the result of ``to_config``.

        Missing keys take diffusers' defaults. The key "class" and keys that begin with "_" are ignored, so the caller
        decides whether the config belongs to this scheduler.

        Raises:
            SpecError: An unknown key, except one of another scheduler that changes nothing here; a bad value.
        """
        if not isinstance(config, Mapping):
            raise SpecError(f"scheduler: got {shown(config)}, expected an object of options")
        names = [field.name for field in dataclasses.fields(cls)]
        options: dict[str, Any] = {}
        for name, value in config.items():
            if among(name, names):
                options[name] = value
            elif among(name, tuple(cls.FOREIGN)):
                allowed = cls.FOREIGN[name]
                if allowed is not None and not among(value, allowed):
                    where = f"scheduler: {name}: got {shown(value)}, which {cls.CLASS} lacks"
                    raise SpecError(f"{where}; expected one of {allowed}")
            elif not (isinstance(name, str) and (name.startswith("_") or name == "class")):
                near = difflib.get_close_matches(name[:50], names, 3) if isinstance(name, str) else []
                expected = ", ".join(near or names[:3])
                where = f"scheduler: unknown option {shown(name)}"
                raise SpecError(f"{where}, expected an option of {cls.CLASS}, such as {expected}")
        return cls(**options)

    def to_config(self) -> dict[str, Any]:
        """Return every option, ready for JSON, and the class name of diffusers as "class".

        ``from_config`` and the class of the same name in diffusers accept it.
        """
        config = dataclasses.asdict(self)
        if self.trained_betas is not None:
            config["trained_betas"] = list(self.trained_betas)
        return {"class": self.CLASS, **config}

    @abstractmethod
    def trajectory(self, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the calls of ``num_inference_steps`` steps; see ``Scheduler``."""

    def trajectory_after(self, steps: int, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory without its first ``steps`` steps, like diffusers' pipelines that start from an image.

        Multistep methods begin with an empty history.

        Args:
            steps: Number of steps to leave out, below ``num_inference_steps``.
            num_inference_steps, eta: See ``trajectory``.

        Raises:
            SpecError: As ``trajectory``.
        """
        return self.trajectory(num_inference_steps, eta).after(steps * self.CALLS_PER_STEP)

    @property
    def alphas_cumprod(self) -> F32:
        """ᾱ of every training timestep, float32 [num_train_timesteps], as torch's but for last bits (``_linspace``)."""
        return self._cumulative(False)

    def _cumulative(self, rescale_zero_snr: bool) -> F32:
        betas = self._betas()
        return _cumprod(1 - (_rescale_zero_terminal_snr(betas) if rescale_zero_snr else betas))

    def _cumulative_above_zero(self, rescale_zero_snr: bool) -> F32:
        """Like ``_cumulative``, but if rescaled the last value is ``SMALLEST_ALPHA``, so that its sigma is finite."""
        alphas = self._cumulative(rescale_zero_snr)
        if rescale_zero_snr:
            alphas[-1] = SMALLEST_ALPHA
        return alphas

    def _betas(self) -> F32:
        count = self.num_train_timesteps
        if self.trained_betas is not None:
            return np.array(self.trained_betas, np.float32)
        if self.beta_schedule == "linear":
            return _linspace(self.beta_start, self.beta_end, count)
        if self.beta_schedule == "scaled_linear":
            return _linspace(self.beta_start**0.5, self.beta_end**0.5, count) ** 2
        if self.beta_schedule == "sigmoid":
            return _sigmoid(_linspace(-6, 6, count)) * np.float32(self.beta_end - self.beta_start) + np.float32(
                self.beta_start
            )
        bars = [_ALPHA_BARS[self.beta_schedule](i / count) for i in range(count + 1)]
        return np.array([min(1 - bars[i + 1] / bars[i], 0.999) for i in range(count)], np.float32)


def _laplace(time: float) -> float:
    log_snr = -0.5 * math.copysign(1, 0.5 - time) * math.log(1 - 2 * abs(0.5 - time) + 1e-6)
    return math.sqrt(math.exp(log_snr) / (1 + math.exp(log_snr)))


_ALPHA_BARS: Mapping[str, Callable[[float], float]] = {  # beta_schedule -> ᾱ at a time from 0 to 1
    "squaredcos_cap_v2": lambda time: math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2,
    "exp": lambda time: math.exp(time * -12.0),
    "laplace": _laplace,
}


def spaced_timesteps(spacing: str, count: int, steps: int, offset: int) -> NDArray[np.int64]:
    """Return descending timesteps as DDIM and PNDM space them (Lin et al. 2023, arXiv:2305.08891, table 2).

    For some numbers of steps, rounding makes "trailing" give an additional timestep, -1. diffusers samples with it: the
    model is called with timestep -1, and ᾱ is that of the last training timestep. The same happens here.

    Args:
        spacing: "leading", "linspace", "trailing" or "compvis". The last is that of DDIMSampler in
            CompVis/latent-diffusion: every (count // steps)-th timestep, which are more than ``steps`` if ``steps``
            does not divide ``count``.
        count: Number of training timesteps.
        steps: Number of inference steps.
        offset: Added to the timesteps of "leading".

    Returns:
        int64 [steps]; with "trailing" and "compvis", possibly more.

    Raises:
        SpecError: The first timestep is beyond the training timesteps.
    """
    if spacing == "compvis":
        timesteps: NDArray[Any] = np.arange(0, count, count // steps)[::-1] + offset
    elif spacing == "leading":
        timesteps = np.arange(steps)[::-1] * (count // steps) + offset
    elif spacing == "linspace":
        timesteps = np.linspace(0, count - 1, steps).round()[::-1]
    else:
        timesteps = np.round(np.arange(count, 0, -(count / steps))) - 1
    if timesteps[0] >= count:
        where = f"steps_offset: got {offset} with {steps} steps"
        raise SpecError(f"{where}: timestep {timesteps[0]}, expected at most {count - 1}; take fewer steps")
    return timesteps.astype(np.int64)


def _trained(name: str, value: Any, count: int) -> tuple[float, ...]:
    try:
        if not isinstance(value, (tuple, list, np.ndarray)) or len(value) != count:
            raise SpecError(name)
        return tuple(beta(name, number) for number in value)
    except (SpecError, TypeError) as error:
        expected = f"null or {count} numbers in (0, 1), one per training timestep"
        raise fail(name, value, expected) from error


def _linspace(start: float, end: float, count: int) -> F32:
    """torch.linspace in float32: from both ends to the middle.

    torch adds in vectors whose width depends on the CPU, and so do its last bits.
    """
    first, last, index = np.float32(start), np.float32(end), np.arange(count, dtype=np.float32)
    step = (last - first) / np.float32(max(count - 1, 1))
    return np.where(index < count // 2, first + step * index, last - step * index[::-1]) if count > 1 else index + first


def _sigmoid(x: F32) -> F32:
    return np.asarray(1 / (1 + np.exp(-x)), np.float32)


def _cumprod(alphas: F32) -> F32:
    """torch.cumprod on the CPU: products in double precision, each rounded to float32."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _rescale_zero_terminal_snr(betas: F32) -> F32:
    """Betas whose last ᾱ is 0 (Lin et al. 2023, arXiv:2305.08891, algorithm 1)."""
    root = np.sqrt(_cumprod(1 - betas))
    with np.errstate(all="ignore"):
        bars = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        return 1 - np.concatenate([bars[:1], bars[1:] / bars[:-1]])
