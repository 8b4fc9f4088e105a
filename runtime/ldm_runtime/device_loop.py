"""Denoising loop on a device: steps are queued without waiting for each other; only reading latents waits."""

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
from ldm_runtime.plan import Plan
from ldm_runtime.schedulers.scaled_rows import scale_after, scaled
from ldm_runtime.specs import ComponentSpec
from ldm_runtime.start import Start

__all__ = ["COEFFICIENTS", "GUIDED_STEP", "HISTORY", "STEP", "DeviceLoop", "slots_of"]

F32 = NDArray[np.float32]
STEP, GUIDED_STEP = "step", "guided_step"
"""Step components, which compute the next latents from a prediction, without and with guidance; always in fp32."""
TABLE_CALLS = 64
"""Maximum number of UNet calls whose coefficients, schedule inputs and noise are on the device at once."""


class DeviceLoop:
    """Runs a plan's denoising loop on a device; the pipeline's NumPy loop is the reference.

    Coefficients and schedule inputs of the next ``calls`` UNet calls are copied to the device together. Noise is copied
    while earlier steps run.

    Args:
        open_device: Returns a device with the components "unet", ``STEP`` and, for guided models, ``GUIDED_STEP``. It
            is called at the first use, while the lock of the device's memory is not held.
        slots: Number of state slots of the step components, see ``slots_of``.
        lock: Held while the device is used, e.g. that of a backend whose engine the device shares; reentrant.
        calls: Maximum number of UNet calls whose inputs are on the device at once.
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
        """Return True if the device can run a plan; otherwise the pipeline runs it in NumPy.

        The step components do not clip x0, do not reuse or rescale guidance, and have a fixed number of state slots.
        """
        trajectory = plan.trajectory
        uniform = not plan.guided or all(branches is StepBranches.BOTH for branches in plan.steps)
        uniform = uniform and not plan.guidance_rescale and not plan.puts_back
        uniform = uniform and (self._shallow or not plan.caches)
        return trajectory.affine and trajectory.slots <= self.slots and uniform

    def steps(
        self, plan: Plan, encoded: Mapping[str, NDArray[Any]], denoiser: Denoiser, start: Start
    ) -> Iterator[Callable[[], F32]]:
        """Run one step per item. An item is a function that reads the latents, which is valid until the next step.

        Args:
            plan: A plan that ``takes`` accepts.
            encoded: Outputs of the conditioners, [plan.rows, …].
            denoiser: Derives the UNet's inputs from ``encoded`` if the device does not.
            start: Initial latents and noise.

        Raises:
            SpecError: The plan cannot run on the device.
            BackendError: The device failed, or another request has started on it meanwhile.
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
        """Return the device; the first call opens it."""
        with self._lock:
            if self._device is None:
                self._device = self._open()
            return self._device

    @contextmanager
    def _running_alone(self, request: object) -> Iterator[None]:
        """Hold the lock of the device while the block runs, for the request that was started last.

        Raises:
            DisplacedError: Another request was started or the loop was closed, so the tensors no longer belong to the
                request.
        """
        with self._lock:
            if self._running is not request or self._device is None:
                raise DisplacedError(
                    "device loop: another request has started on the device; finish one before the next"
                )
            with self._device.memory.lock:
                yield

    def memory(self) -> dict[str, int]:
        """Bytes of device memory for each shape in the cache, including what the engine allocated for it."""
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
    """Number of state slots of a step component: one for the latents, and one for each array of its history."""
    shapes = {tensor.name: tensor.bounds("opt") for tensor in step.inputs}
    return 1 + (shapes[HISTORY][1] // shapes[SAMPLE][1] if HISTORY in shapes else 0)
