"""Denoising loop on a device: latents and history stay in its memory, and a step uploads only its coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import BackendError, SpecError
from ldm_runtime.guidance import StepBranches
from ldm_runtime.model import NOISE_PRED, SAMPLE, UNET
from ldm_runtime.request import Plan
from ldm_runtime.schedulers.trajectory import padded_rows
from ldm_runtime.specs import ComponentSpec

__all__ = ["GUIDED_STEP", "STEP", "Device", "DeviceLoop", "Tensor", "coefficients", "slots_of"]

F32 = NDArray[np.float32]
Tensor = tuple[tuple[int, ...], str]
"""Shape and dtype."""
STEP, GUIDED_STEP = "step", "guided_step"
"""Components that compute the next latents from a prediction, without and with guidance; always fp32."""
NOISE, COEFFICIENTS, HISTORY = "noise", "coefficients", "history"
NEXT_SAMPLE, NEXT_HISTORY = "next_sample", "next_history"


class Device(Protocol):
    """Components that share named tensors on one device: an output of one is the input of another of its name."""

    def hold(self, tensors: Mapping[str, Tensor], components: Sequence[str]) -> None:
        """Allocate these tensors and prepare these components to run on them; what is there already stays."""

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Copy from the host; the array may be changed afterwards."""

    def read(self, name: str) -> NDArray[Any]:
        """Copy to the host, after all launches so far; the array belongs to the caller."""

    def copy(self, source: str, target: str) -> None:
        """Copy a tensor to another of the same shape, on the device."""

    def launch(self, component: str) -> None:
        """Run a component on its tensors, in order with all other calls; it may still run on return."""

    def close(self) -> None:
        """Free the memory."""


class DeviceLoop:
    """Runs a plan's denoising loop on a device; the pipeline's NumPy loop is the reference.

    Args:
        open_device: Returns a device with the components "unet", ``STEP`` and, for guided models, ``GUIDED_STEP``;
            called at the first use.
        slots: State slots of the step components, see ``slots_of``.
        lock: Held while the device is used, e.g. that of a backend whose engine the device shares; reentrant.
    """

    def __init__(self, open_device: Callable[[], Device], slots: int = 1, lock: RLock | None = None):
        self._open, self._slots = open_device, slots
        self._device: Device | None = None
        self._running: object = None
        self._lock = RLock() if lock is None else lock

    def takes(self, plan: Plan) -> bool:
        """True if the device can run a plan; otherwise the pipeline runs it in NumPy.

        The step components have no clipping of x0, no scaling of the UNet's input and no reuse of guidance, and a fixed
        number of state slots.
        """
        trajectory = plan.trajectory
        uniform = not plan.guided or all(branches is StepBranches.BOTH for branches in plan.steps)
        unscaled = bool((trajectory.input_scale == 1).all())
        return trajectory.affine and trajectory.slots <= self._slots and uniform and unscaled

    def steps(
        self, plan: Plan, schedule: Mapping[str, NDArray[Any]], conditioning: Mapping[str, NDArray[Any]]
    ) -> Iterator[Callable[[], F32]]:
        """Run one step for each item that is asked for; the item reads the latents, until the next step.

        Args:
            plan: A plan that ``takes`` accepts.
            schedule: The UNet's schedule inputs, [calls, …], as ``Denoiser.embed``.
            conditioning: The UNet's conditioning inputs, [plan.rows, …], the same in all steps.

        Raises:
            SpecError: The plan cannot run on the device.
            BackendError: The device failed, or another request has started on it since.
        """
        if not self.takes(plan):
            raise SpecError(
                "device loop: got a plan with clipping, reused guidance or too many slots; use the pipeline"
            )
        step = GUIDED_STEP if plan.guided else STEP
        tensors = _tensors(plan, self._slots, schedule, conditioning)
        noise = plan.noise()
        latents = plan.start(noise)[0]
        current = object()
        with self._lock:
            device = self._device = self._device or self._open()
            self._running = current
            device.hold(tensors, (UNET, step))
            device.write(SAMPLE, np.concatenate([latents, latents]) if plan.guided else latents)
            for name in {NOISE, HISTORY} & tensors.keys():
                device.write(name, np.zeros(tensors[name][0], np.float32))
            for name, array in conditioning.items():
                device.write(name, array)

        def read() -> F32:
            with self._running_alone(current):
                return device.read(SAMPLE)[: plan.images]

        scalars = coefficients(plan.trajectory.rows, self._slots, plan.guidance_scale)
        for index in range(len(plan.trajectory)):
            step_noise = next(noise) if plan.trajectory.needs_noise else None
            with self._running_alone(current):
                for name, array in schedule.items():
                    device.write(name, np.repeat(array[index : index + 1], plan.rows, 0))
                device.write(COEFFICIENTS, np.repeat(scalars[index : index + 1], plan.images, 0))
                if step_noise is not None:
                    device.write(NOISE, step_noise)
                device.launch(UNET)
                device.launch(step)
                device.copy(NEXT_SAMPLE, SAMPLE)
                if self._slots > 1:
                    device.copy(NEXT_HISTORY, HISTORY)
            yield read

    @contextmanager
    def _running_alone(self, request: object) -> Iterator[None]:
        """Hold the device for a request, which must be the one that has started last.

        Raises:
            BackendError: Another request has started, or the loop was closed, so that the tensors are not its own.
        """
        with self._lock:
            if self._running is not request:
                raise BackendError("device loop: another request has started on the device; finish one before the next")
            yield

    def close(self) -> None:
        """Free the device's memory; the next request opens it again."""
        with self._lock:
            device, self._device, self._running = self._device, None, None
            if device is not None:
                device.close()


def slots_of(step: ComponentSpec) -> int:
    """State slots of a step component: the latents, and the arrays of its history."""
    shapes = {tensor.name: tensor.bounds("opt") for tensor in step.inputs}
    return 1 + (shapes[HISTORY][1] // shapes[SAMPLE][1] if HISTORY in shapes else 0)


def coefficients(rows: F32, slots: int, guidance_scale: float) -> F32:
    """The input "coefficients" of a step component, for each call.

    Args:
        rows: ``Trajectory.rows``, float32 [calls, own, own + 3], with at most ``slots`` slots.
        slots: Slots of the component.
        guidance_scale: Guidance scale.

    Returns:
        float32 [calls, slots · (slots + 2) + 1]: for each slot its weights of the state, the prediction and the noise;
        at the end the guidance scale.
    """
    padded = np.delete(padded_rows(rows, slots), slots + 1, axis=2)  # without x0, whose weights are zero
    scales = np.full((len(rows), 1), guidance_scale, np.float32)
    return np.concatenate([padded.reshape(len(rows), -1), scales], axis=1)


def _tensors(
    plan: Plan, slots: int, schedule: Mapping[str, NDArray[Any]], conditioning: Mapping[str, NDArray[Any]]
) -> dict[str, Tensor]:
    images, channels, *size = plan.shape
    all_rows, history = (plan.rows, channels, *size), (images, (slots - 1) * channels, *size)
    tensors: dict[str, Tensor] = {
        SAMPLE: (all_rows, "float32"),
        NOISE_PRED: (all_rows, "float32"),
        NOISE: (plan.shape, "float32"),
        COEFFICIENTS: ((images, slots * (slots + 2) + 1), "float32"),
        NEXT_SAMPLE: (all_rows, "float32"),
    }
    if slots > 1:
        tensors |= {HISTORY: (history, "float32"), NEXT_HISTORY: (history, "float32")}
    tensors |= {name: ((plan.rows, *array.shape[1:]), str(array.dtype)) for name, array in schedule.items()}
    return tensors | {name: (array.shape, str(array.dtype)) for name, array in conditioning.items()}
