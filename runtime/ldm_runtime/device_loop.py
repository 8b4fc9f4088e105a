"""A denoising loop that stays on the device: latents go in once and come out once, a step sends its few scalars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import BackendError
from ldm_runtime.request import Plan
from ldm_runtime.schedule import Schedule

F32 = NDArray[np.float32]
Tensor = tuple[tuple[int, ...], str]
"""Shape and dtype."""
STEP, GUIDED_STEP = "step", "guided_step"
"""The components of a bundle that turn a prediction into the next latents, without and with guidance; always fp32."""


class Device(Protocol):
    """Components that share named tensors on one device: an output of one is an input of another by its name."""

    def hold(self, tensors: Mapping[str, Tensor], components: Sequence[str]) -> None:
        """Have memory for these tensors, and these components ready to run on them."""

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Copy from the host; the array may be changed afterwards."""

    def read(self, name: str) -> NDArray[Any]:
        """Copy to the host, after all that was launched; the array is the caller's."""

    def copy(self, source: str, target: str) -> None:
        """Copy a tensor to another of the same shape, on the device."""

    def launch(self, component: str) -> None:
        """Run a component on what its tensors hold, in order with all else; it need not have ended on return."""

    def close(self) -> None:
        """Free the memory."""


class DeviceLoop:
    """Denoises a plan on a device, step by step; the NumPy loop of the pipeline is the reference it agrees with.

    Args:
        open_device: gives a device with the components "unet", ``STEP`` and ``GUIDED_STEP``; called at the first use.
    """

    def __init__(self, open_device: Callable[[], Device]):
        self._open = open_device
        self._device: Device | None = None
        self._running: object = None

    def steps(
        self, plan: Plan, schedule: Schedule, conditioning: Mapping[str, NDArray[Any]]
    ) -> Iterator[Callable[[], F32]]:
        """Run a step each time it is asked for the next one; gives what reads the latents, until the step after.

        Args:
            conditioning: the UNet's inputs besides ``sample`` and ``timestep``, the same in all steps; [rows, …].

        Raises:
            SpecError: the schedule clips, so its steps have no coefficients.
            BackendError: the device failed, or another request has begun on it since.
        """
        coefficients = schedule.rows
        device = self._device = self._device or self._open()
        self._running = mine = object()
        images, rows = plan.shape[0], plan.shape[0] * (2 if plan.guided else 1)
        step = GUIDED_STEP if plan.guided else STEP
        device.hold(_tensors(plan, rows, conditioning), ("unet", step))
        noise = plan.noise()
        latents = next(noise) if plan.latents is None else plan.latents
        device.write("sample", np.concatenate([latents, latents]) if plan.guided else latents)
        device.write("noise", np.zeros(plan.shape, np.float32))
        for name, array in conditioning.items():
            device.write(name, array)
        for timestep, row in zip(schedule.timesteps, coefficients, strict=True):
            if self._running is not mine:
                raise BackendError("the device's loop has begun another request; finish one before the next")
            device.write("timestep", np.full(rows, timestep, np.int64))
            scalars = np.append(row, np.float32(plan.guidance_scale)).astype(np.float32)
            device.write("coefficients", np.tile(scalars, (images, 1)))
            if schedule.needs_noise:
                device.write("noise", next(noise))
            device.launch("unet")
            device.launch(step)
            device.copy("next_sample", "sample")
            yield lambda: device.read("sample")[:images]

    def close(self) -> None:
        """Free the device's memory; the next step needs it anew."""
        device, self._device, self._running = self._device, None, None
        if device is not None:
            device.close()


def _tensors(plan: Plan, rows: int, conditioning: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    tall = (rows, *plan.shape[1:])
    shared: dict[str, Tensor] = {
        "sample": (tall, "float32"),
        "timestep": ((rows,), "int64"),
        "noise_pred": (tall, "float32"),
        "noise": (plan.shape, "float32"),
        "coefficients": ((plan.shape[0], 4), "float32"),
        "next_sample": (tall, "float32"),
    }
    return shared | {name: (array.shape, str(array.dtype)) for name, array in conditioning.items()}
