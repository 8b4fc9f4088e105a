"""What a calibration is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ldm_runtime.errors import SpecError

SENSITIVITIES = ("latents", "results")


@dataclass(frozen=True)
class Settings:
    """How to calibrate and what to keep to.

    Attributes:
        prompts: of the trajectories that are observed; picture ``i`` has seed ``i``.
        steps: denoising steps of these trajectories, spread over the whole schedule.
        samples: steps of each at which every tensor is observed.
        sensitivity: what layers are ranked by: "latents", each layer's own effect on the final latents, or "results",
            on its own result alone, which is much faster for a large model.
        trial_prompts: of the pictures the budget is kept on; picture ``i`` has seed 1000 + ``i``.
        trial_steps: denoising steps of these.
        eta, guidance_scale: of all trajectories.
        min_psnr: mean PSNR in dB against fp32 of the same seeds; None for no such bound.
        max_accuracy_loss: maximum loss of prompt accuracy against fp32, in [0, 1]; None for no such bound. It needs a
            grader of the model's images.

    Raises:
        SpecError: no prompts, or a number out of range.
    """

    prompts: tuple[str, ...]
    trial_prompts: tuple[str, ...]
    steps: int = 20
    samples: int = 10
    sensitivity: str = "latents"
    trial_steps: int = 50
    eta: float = 0.3
    guidance_scale: float = 6.0
    min_psnr: float | None = 35.0
    max_accuracy_loss: float | None = None

    @property
    def observed(self) -> tuple[Any, ...]:
        """What ranges, observers and sensitivities depend on; the budget is none of it."""
        return self.prompts, self.steps, self.samples, self.sensitivity, self.eta, self.guidance_scale

    def __post_init__(self) -> None:
        if not self.prompts or not self.trial_prompts:
            raise SpecError("prompts: got none to calibrate with, expected at least one; give --prompts FILE")
        for name in ("steps", "samples", "trial_steps"):
            if not 2 <= getattr(self, name) <= 1000:
                raise SpecError(f"{name.replace('_', ' ')}: got {getattr(self, name)}, expected 2..1000")
        if self.sensitivity not in SENSITIVITIES:
            raise SpecError(f"sensitivity: got {self.sensitivity!r:.40}, expected one of {', '.join(SENSITIVITIES)}")
        if self.min_psnr is not None and not (math.isfinite(self.min_psnr) and 0 <= self.min_psnr <= 100):
            raise SpecError(f"min psnr: got {self.min_psnr}, expected 0..100 dB")
        if self.max_accuracy_loss is not None and not 0 <= self.max_accuracy_loss <= 1:
            raise SpecError(f"max accuracy loss: got {self.max_accuracy_loss}, expected a share from 0 to 1")
