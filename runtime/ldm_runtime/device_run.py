"""Runs one plan on a device: its tensors, tables of the values that change from step to step, and the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.denoiser import Denoiser
from ldm_runtime.device import Call, Launcher, Memory, Tensor, Workspace, WorkspaceCache
from ldm_runtime.model import NOISE_PRED, SAMPLE, SHALLOW_UNET, TIMESTEP, UNET
from ldm_runtime.plan import Plan
from ldm_runtime.schedulers.scaled_rows import scaled_rows
from ldm_runtime.schedulers.trajectory import padded_rows
from ldm_runtime.specs import ComponentSpec, sizes_of

__all__ = [
    "COEFFICIENTS",
    "HISTORY",
    "NEXT_HISTORY",
    "NEXT_SAMPLE",
    "NOISE",
    "DeviceRun",
    "LoopDevice",
    "coefficients",
    "outputs_of",
    "state_tensors",
]

F32 = NDArray[np.float32]
NOISE, COEFFICIENTS, HISTORY = "noise", "coefficients", "history"
NEXT_SAMPLE, NEXT_HISTORY = "next_sample", "next_history"
TABLE_BYTES = 2**27
"""Maximum size of the tables of one shape in bytes."""


@dataclass(frozen=True, eq=False)
class LoopDevice:
    """A device with the components of a denoising loop.

    Attributes:
        memory: Its memory and stream.
        launchers: The UNet, the step components, and the components named in ``derived``.
        derived: Names of the components that derive UNet inputs on the device.
        close: Frees the components that only the loop uses.
        load_shallow: Loads the shallow UNet, which only requests with feature caching use. None if there is none.
        workspaces: Cache of the tensors of recently used shapes.
    """

    memory: Memory
    launchers: Mapping[str, Launcher]
    derived: frozenset[str] = frozenset()
    close: Callable[[], None] = lambda: None
    load_shallow: Callable[[], Launcher] | None = None
    workspaces: WorkspaceCache = field(default_factory=WorkspaceCache)


class DeviceRun:
    """Runs the steps of one plan. A table ``NAME.calls`` [calls, …] holds a tensor's values for the next UNet calls.

    Args:
        device: The device. The caller holds the lock of its memory, except during ``derive``.
        step: Name of the step component.
        slots: Number of its state slots.
        calls: Maximum number of rows of a table.
        plan: The plan.
        denoiser: Derives the UNet's inputs if the device does not.

    Raises:
        SpecError: A component does not take the shapes.
        BackendError: A component does not load, or the device failed.
    """

    def __init__(self, device: LoopDevice, step: str, slots: int, calls: int, plan: Plan, denoiser: Denoiser):
        self._memory, self._plan, self._slots, self._denoiser = device.memory, plan, slots, denoiser
        self._step, self._device = step, device
        self._written: dict[str, NDArray[Any]] = {}
        self._embedded: dict[str, NDArray[Any]] = {}
        self._shallow: dict[str, Call] = {}
        self._scalars = coefficients(scaled_rows(plan.trajectory), slots, plan.guidance_scale)
        unet = device.launchers[UNET].spec
        self._dtypes = {tensor.name: tensor.dtype for tensor in unet.inputs}
        self._request = self._on_device(denoiser.request_components)
        self._schedule = self._on_device(denoiser.schedule_components)
        rows = {t.name: t.bounds("opt")[1:] for t in unet.inputs if t.name in denoiser.schedule_inputs}
        per_call = sum(
            plan.rows * prod(shape) * np.dtype(self._dtypes[name]).itemsize for name, shape in rows.items()
        ) + 4 * (prod(plan.shape) + plan.images * self._scalars.shape[1])
        most = [tensor.bounds("max")[0] for spec in self._schedule for tensor in spec.inputs]
        self.calls = max(1, min(calls, TABLE_BYTES // per_call, *most))
        self._tables: dict[str, Tensor] = {
            name: ((self.calls, plan.rows, *shape), self._dtypes[name]) for name, shape in rows.items()
        }

    def _on_device(self, components: Sequence[ComponentSpec]) -> tuple[ComponentSpec, ...]:
        """Specs of the components if the device runs all of them with the UNet's dtypes; otherwise ()."""
        if not all(spec.name in self._device.derived for spec in components):
            return ()
        specs = tuple(self._device.launchers[spec.name].spec for spec in components)
        known = dict(self._dtypes)
        for tensor in (tensor for spec in specs for tensor in (*spec.inputs, *spec.outputs)):
            if known.setdefault(tensor.name, tensor.dtype) != tensor.dtype:
                return ()
        self._dtypes = known
        return specs

    def derive(self, encoded: Mapping[str, NDArray[Any]]) -> None:
        """Load and run the components that do not run on the device. The caller must not hold the memory's lock.

        Another thread may run such a component at this time: it holds the component's lock and waits for the memory's.

        Args:
            encoded: Outputs of the conditioners, [rows, …].
        """
        plan, denoiser = self._plan, self._denoiser
        conditioning = dict(encoded) if self._request else denoiser.condition(encoded)
        self._written = {name: array for name, array in conditioning.items() if name in self._dtypes}
        self._embedded = {} if self._schedule else denoiser.embed(plan.trajectory.timesteps)
        if plan.caches:
            assert self._device.load_shallow is not None
            self._shallow = {SHALLOW_UNET: Call(self._device.load_shallow(), {})}

    def start(self, latents: F32) -> None:
        """Copy the plan to the device. Call ``derive`` first.

        Args:
            latents: Initial latents multiplied by the first input scale, float32 [images, C, h, w].
        """
        plan, known, written = self._plan, self._dtypes, self._written
        tables: dict[str, Tensor] = {
            f"{NOISE}.calls": ((self.calls, *plan.shape), "float32"),
            f"{COEFFICIENTS}.calls": ((self.calls, plan.images, self._scalars.shape[1]), "float32"),
        }
        tensors = (
            tables
            | state_tensors(plan.shape, plan.rows, self._slots)
            | {name: (array.shape, known[name]) for name, array in written.items()}
        )
        calls = {name: Call(self._device.launchers[name], {}) for name in (UNET, self._step)} | self._shallow
        for spec in self._request:
            tensors |= outputs_of(spec, tensors)
            calls[spec.name] = Call(self._device.launchers[spec.name], {})
        for name, ((_, *row), dtype) in self._tables.items():
            tensors |= {f"{name}.calls": ((self.calls, *row), dtype), name: (tuple(row), dtype)}
            tensors[f"{name}.timesteps"] = (self.calls, *row[1:]), dtype
        for spec in self._schedule:
            names = {tensor.name: f"{tensor.name}.timesteps" for tensor in (*spec.inputs, *spec.outputs)}
            inputs = {tensor.name: ((self.calls, *tensor.bounds("opt")[1:]), tensor.dtype) for tensor in spec.inputs}
            tensors |= {names[name]: tensor for name, tensor in (inputs | outputs_of(spec, inputs)).items()}
            calls[spec.name] = Call(self._device.launchers[spec.name], names)
        tensors |= outputs_of(self._device.launchers[UNET].spec, tensors)
        label = f"{plan.images} images in {plan.rows} rows of {'×'.join(map(str, plan.shape[1:]))}"
        self.space = self._device.workspaces.get(
            (*sorted(tensors.items()), *calls), lambda: Workspace(self._memory, tensors, calls, label)
        )
        self.space.write(SAMPLE, np.concatenate([latents, latents]) if plan.guided else latents)
        if self._slots > 1:
            self.space.write(HISTORY, np.zeros(tensors[HISTORY][0], np.float32))
        for name, array in written.items():
            self.space.write(name, array)
        for spec in self._request:
            self.space.run(spec.name)

    def step(self, index: int, noise: F32 | None) -> None:
        """Launch one step. The steps are launched in order.

        Args:
            index: Index of the step.
            noise: Noise of the step, float32 [images, C, h, w]; None if the trajectory needs none.
        """
        space, slot = self.space, index % self.calls
        if slot == 0:
            self._fill(index)
        if noise is not None:
            space.write_ahead(f"{NOISE}.calls", noise[None], slot)
        for name in (*self._tables, COEFFICIENTS):
            self._select(name, slot)
        space.run(SHALLOW_UNET if self._plan.shallow[index] else UNET)
        if noise is not None:
            self._memory.await_uploads()
            self._select(NOISE, slot)
        space.run(self._step)
        space.copy(space.regions[NEXT_SAMPLE], space.regions[SAMPLE])
        if self._slots > 1:
            space.copy(space.regions[NEXT_HISTORY], space.regions[HISTORY])

    def _select(self, name: str, slot: int) -> None:
        self.space.copy(self.space.regions[f"{name}.calls"].rows(slot, slot + 1), self.space.regions[name])

    def _fill(self, index: int) -> None:
        """Fill the tables with the values of the UNet calls from ``index`` on. Noise is copied step by step."""
        space, plan = self.space, self._plan
        self._memory.hold_uploads()
        scalars = self._scalars[index : index + self.calls]
        space.write(f"{COEFFICIENTS}.calls", np.repeat(scalars[:, None], plan.images, 1))
        timesteps = plan.trajectory.timesteps[index : index + self.calls]
        if self._schedule:
            space.write(f"{TIMESTEP}.timesteps", np.resize(self._denoiser.timesteps(timesteps), self.calls))
            for spec in self._schedule:
                space.run(spec.name)
        else:
            for name, array in self._embedded.items():
                space.write(f"{name}.timesteps", array[index : index + self.calls])
        for name in self._tables:
            source, table = space.regions[f"{name}.timesteps"], space.regions[f"{name}.calls"]
            for row in range(plan.rows):
                self._memory.spread(source, table.address + row * source.row_bytes, table.row_bytes)


def state_tensors(shape: tuple[int, ...], rows: int, slots: int) -> dict[str, Tensor]:
    """Shapes and dtypes of the tensors of a step component, and of the UNet's latents and prediction.

    Args:
        shape: Shape of the latents, (images, C, h, w).
        rows: Number of rows of the UNet.
        slots: Number of state slots of the step component.
    """
    images, channels, *size = shape
    all_rows, history = (rows, channels, *size), (images, (slots - 1) * channels, *size)
    tensors: dict[str, Tensor] = {
        SAMPLE: (all_rows, "float32"),
        NOISE_PRED: (all_rows, "float32"),
        NOISE: (shape, "float32"),
        COEFFICIENTS: ((images, slots * (slots + 2) + 1), "float32"),
        NEXT_SAMPLE: (all_rows, "float32"),
    }
    if slots > 1:
        tensors |= {HISTORY: (history, "float32"), NEXT_HISTORY: (history, "float32")}
    return tensors


def coefficients(rows: F32, slots: int, guidance_scale: float) -> F32:
    """Return the values of a step component's input "coefficients" for each call.

    Args:
        rows: ``scaled_rows`` of a trajectory, float32 [calls, own, own + 3], with at most ``slots`` slots.
        slots: Slots of the component.
        guidance_scale: Guidance scale.

    Returns:
        float32 [calls, slots · (slots + 2) + 1]: for each slot, the weights of state, prediction and noise; then the
            guidance scale.
    """
    padded = np.delete(padded_rows(rows, slots), slots + 1, axis=2)  # without x0, whose weights are zero
    scales = np.full((len(rows), 1), guidance_scale, np.float32)
    return np.concatenate([padded.reshape(len(rows), -1), scales], axis=1)


def outputs_of(spec: ComponentSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shapes and dtypes of a component's outputs, computed from its inputs in ``tensors``."""
    sizes = sizes_of(spec, {tensor.name: tensors[tensor.name][0] for tensor in spec.inputs})
    return {tensor.name: (tensor.shape_at(sizes), tensor.dtype) for tensor in spec.outputs}
