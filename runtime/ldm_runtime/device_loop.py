"""Denoising loop on a device: a step starts without waiting for the one before, and the host waits only to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.denoiser import Denoiser
from ldm_runtime.device_run import COEFFICIENTS, HISTORY, DeviceRun, LoopDevice
from ldm_runtime.errors import DisplacedError, SpecError
from ldm_runtime.guidance import StepBranches
from ldm_runtime.model import SAMPLE
from ldm_runtime.request import Plan
from ldm_runtime.schedulers.scaled_rows import scale_after, scaled
from ldm_runtime.specs import ComponentSpec
from ldm_runtime.start import Start

__all__ = ["COEFFICIENTS", "GUIDED_STEP", "HISTORY", "STEP", "DeviceLoop", "slots_of"]

F32 = NDArray[np.float32]
STEP, GUIDED_STEP = "step", "guided_step"
"""Components that compute the next latents from a prediction, without and with guidance; always fp32."""
TABLE_CALLS = 64
"""Most UNet calls whose coefficients, schedule inputs and noise are on the device together."""


class DeviceLoop:
    """Runs a plan's denoising loop on a device; the pipeline's NumPy loop is the reference.

    Coefficients and schedule inputs of the next ``calls`` UNet calls are copied to the device at once, and noise beside
    the work of earlier steps.

    Args:
        open_device: Returns a device with the components "unet", ``STEP`` and, for guided models, ``GUIDED_STEP``;
            called at the first use, without the lock of the device's memory.
        slots: State slots of the step components, see ``slots_of``.
        lock: Held while the device is used, e.g. that of a backend whose engine the device shares; reentrant.
        calls: Most UNet calls whose inputs are on the device together.
        shallow: True if the device can load the shallow UNet, for requests with cached features.

    Attributes:
        slots: As given.
    """

    def __init__(
        self,
        open_device: Callable[[], LoopDevice],
        slots: int = 1,
        lock: RLock | None = None,
        calls: int = TABLE_CALLS,
        shallow: bool = False,
    ):
        self._open, self.slots, self._calls, self._shallow = open_device, slots, calls, shallow
        self._device: LoopDevice | None = None
        self._running: object = None
        self._lock = RLock() if lock is None else lock

    def takes(self, plan: Plan) -> bool:
        """True if the device can run a plan; otherwise the pipeline runs it in NumPy.

        The step components have no clipping of x0, no reuse and no rescaling of guidance, and a fixed number of state
        slots.
        """
        trajectory = plan.trajectory
        uniform = not plan.guided or all(branches is StepBranches.BOTH for branches in plan.steps)
        uniform = uniform and not plan.guidance_rescale and not plan.puts_back
        uniform = uniform and (self._shallow or not plan.caches)
        return trajectory.affine and trajectory.slots <= self.slots and uniform

    def steps(
        self, plan: Plan, encoded: Mapping[str, NDArray[Any]], denoiser: Denoiser, start: Start
    ) -> Iterator[Callable[[], F32]]:
        """Run one step for each item that is asked for; the item reads the latents, until the next step.

        Args:
            plan: A plan that ``takes`` accepts.
            encoded: What the conditioners encoded, [plan.rows, …].
            denoiser: Derives the UNet's inputs from it, where the device has no component for that.
            start: Initial latents and noise.

        Raises:
            SpecError: The plan cannot run on the device.
            BackendError: The device failed, or another request has started on it since.
        """
        if not self.takes(plan):
            raise SpecError("device loop: got a plan with clipping, other guidance or too many slots; use the pipeline")
        trajectory = plan.trajectory
        latents = scaled(start.latents, scale_after(trajectory, 0))
        current = object()
        with self._lock:
            device, self._running = self.open(), current
            step = GUIDED_STEP if plan.guided else STEP
            run = DeviceRun(device, step, self.slots, self._calls, plan, denoiser)
            run.derive(encoded)
            with device.memory.lock:
                run.start(latents)

        def read(calls: int) -> F32:
            with self._running_alone(current):
                latents: F32 = run.space.read(SAMPLE, 0, plan.images)
                return scaled(latents, 1 / scale_after(trajectory, calls))

        for index in range(len(trajectory)):
            step_noise = next(start.noise) if trajectory.needs_noise else None
            with self._running_alone(current):
                run.step(index, step_noise)
            yield partial(read, index + 1)

    def open(self) -> LoopDevice:
        """Return the device, which is opened at the first use."""
        with self._lock:
            if self._device is None:
                self._device = self._open()
            return self._device

    @contextmanager
    def _running_alone(self, request: object) -> Iterator[None]:
        """Hold the device for a request, which must be the one that has started last.

        Raises:
            DisplacedError: Another request has started, or the loop was closed, so that the tensors are not its own.
        """
        with self._lock:
            if self._running is not request or self._device is None:
                raise DisplacedError(
                    "device loop: another request has started on the device; finish one before the next"
                )
            with self._device.memory.lock:
                yield

    def memory(self) -> dict[str, int]:
        """Bytes of device memory for each shape that is kept, with what the engine allocated for it."""
        with self._lock:
            return {} if self._device is None else self._device.workspaces.bytes()

    def close(self) -> None:
        """Free the device's memory; the next request opens it again."""
        with self._lock:
            device, self._device, self._running = self._device, None, None
            if device is not None:
                with device.memory.lock:
                    device.workspaces.close()
                    device.close()


def slots_of(step: ComponentSpec) -> int:
    """State slots of a step component: the latents, and the arrays of its history."""
    shapes = {tensor.name: tensor.bounds("opt") for tensor in step.inputs}
    return 1 + (shapes[HISTORY][1] // shapes[SAMPLE][1] if HISTORY in shapes else 0)
