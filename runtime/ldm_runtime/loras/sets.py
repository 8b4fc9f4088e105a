"""Models with the weights of selected adapters: loaded when a request selects them, the least recently used freed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from threading import RLock
from typing import Any, Generic, TypeVar

from ldm_runtime.backends import Backend
from ldm_runtime.backends.factory import OpenModel
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from ldm_runtime.loras.adapter_file import LoraAdapter, read_adapter
from ldm_runtime.loras.changes import Scaled, changed_part, weight_changes
from ldm_runtime.loras.selection import Selection, selection
from ldm_runtime.number_checks import integer

__all__ = ["DEFAULT_SELECTIONS", "LoraSets", "lora_selections"]

DEFAULT_SELECTIONS, MAX_SELECTIONS = 2, 64
"""Selections whose components stay loaded. Each takes the memory of the components that it changes."""

_T = TypeVar("_T")


def lora_selections(value: Any, name: str = "lora_selections") -> int:
    """Check the number of selections whose components stay loaded.

    Raises:
        SpecError: It is not a whole number from 1 to 64; the message calls it ``name``.
    """
    return integer(name, value, 1, MAX_SELECTIONS)


class LoraSets(Generic[_T]):
    """The models of a pipeline's selections of adapters; threads may share it.

    Args:
        bundle: The bundle with the adapters.
        opened: The components without adapters, which are shared where a selection does not change them.
        model: Makes a model of the components that a selection changes.
        most: Selections that are kept.

    Attributes:
        names: Names of the bundle's adapters.
        most: As given.
    """

    def __init__(self, bundle: Bundle, opened: OpenModel, model: Callable[[Mapping[str, Backend]], _T], most: int):
        self._bundle, self._opened, self._model = bundle, opened, model
        self.names = tuple(bundle.manifest.loras)
        self.most = most
        self._lock = RLock()
        self._adapters: dict[str, LoraAdapter] = {}
        self._sets: OrderedDict[Selection, tuple[_T, list[LazyBackend]]] = OrderedDict()

    def check(self, given: Any) -> Selection:
        """Check the field ``loras`` of a request, and that this engine can change the weights.

        Raises:
            SpecError: An adapter or its weight cannot be used, or the engine or the precision cannot change weights.
            ManifestError: An adapter is damaged, or does not fit the graphs.
        """
        selected = selection(given, self.names)
        if selected:
            if reason := self._opened.refuses_changes:
                raise SpecError(
                    f"loras: {reason}; use onnxruntime or openvino with fp32 or fp16 graphs, or merge the adapter with "
                    "`ldm-export build --lora`"
                )
            with self._lock:
                for name, _ in selected:
                    if name not in self._adapters:
                        adapter = self._read(name)
                        self._changed([(adapter, 1.0)])
                        self._adapters[name] = adapter
        return selected

    def get(self, selected: Selection) -> _T:
        """The model of a checked selection. The least recently used one is freed if there are too many.

        Raises:
            ManifestError: The bundle was replaced, or an adapter is damaged.
        """
        with self._lock:
            if selected not in self._sets:
                changed = self._changed([(self._adapters[name], weight) for name, weight in selected])
                while len(self._sets) >= self.most:
                    _, (_, backends) = self._sets.popitem(last=False)
                    for backend in backends:
                        backend.close()
                self._sets[selected] = self._model(changed), list(changed.values())
            self._sets.move_to_end(selected)
            return self._sets[selected][0]

    def clear(self) -> None:
        """Free all models; the next request with adapters loads them again."""
        with self._lock:
            sets, self._sets = self._sets, OrderedDict()
        for _, backends in sets.values():
            for backend in backends:
                backend.close()

    def _read(self, name: str) -> LoraAdapter:
        return read_adapter(name, self._bundle.verified(self._bundle.manifest.loras[name].file))

    def _changed(self, selected: list[Scaled]) -> dict[str, LazyBackend]:
        """The components that adapters change, which are loaded on first use.

        Raises:
            SpecError: They change no component.
        """
        changed = {}
        for component in self._opened.backends:
            part = changed_part(self._bundle.manifest.model, component)
            if part is not None:
                backend = self._opened.changed(component, partial(weight_changes, part, selected))
                if backend is not None:
                    changed[component] = backend
        if not changed:
            raise SpecError(f"loras: {selected[0][0].name} changes no component of this bundle; add it again")
        return changed
