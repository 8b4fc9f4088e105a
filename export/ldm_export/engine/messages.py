"""Progress and errors of a TensorRT builder, reduced to one line that can be displayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ldm_runtime.backends.tensorrt_log import one_line

__all__ = ["OnProgress", "builder_monitor", "explain"]

OnProgress = Callable[[int, int], None]
"""Called with the number of steps done and the number of all steps."""
_EXPLANATIONS = (
    (
        "could not find any implementation",
        "out of memory",
        "choose smaller --batch, --height and --width, or free memory",
    ),
    ("out of memory", "out of memory", "choose smaller --batch, --height and --width, or free memory"),
    ("cuda_success", "it needs a GPU for this", "build on a machine with one and its driver, or ask for less"),
    ("cuda error", "it needs a GPU for this", "build on a machine with one and its driver, or ask for less"),
    ("fp32 gemm is not supported", "no fp32 matrix product on this GPU", "use --precision fp16"),
    ("but must have type", "a tensor has a type that the builder does not take", "use another --precision"),
)
"""(Part of the builder's message, meaning, advice) triples. The first match is used."""


def builder_monitor(package: ModuleType, on_progress: OnProgress) -> Any:
    """Return an ``IProgressMonitor`` that reports the progress of the outermost phase in thousandths.

    Progress of nested phases counts as a fraction of their parent's step. Control-C cancels the build at the next step
    and sets ``interrupted``, because the bindings discard exceptions.
    """

    class Monitor(package.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            package.IProgressMonitor.__init__(self)
            self.phases: dict[str, _Phase] = {}
            self.furthest = 0.0
            self.interrupted = False

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = _Phase(parent, max(steps, 1))

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.phases:
                self.phases[name].done = step + 1
            return self._report()

        def phase_finish(self, name: str) -> None:
            if name in self.phases:
                self.phases[name].done = self.phases[name].steps
                self._report()
                del self.phases[name]

        def _report(self) -> bool:
            self.furthest = max(self.furthest, _fraction(self.phases, None))
            try:
                on_progress(round(1000 * self.furthest), 1000)
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

    return Monitor()


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


def _fraction(phases: Mapping[str, _Phase], parent: str | None) -> float:
    """Return the progress of the furthest phase directly below a parent, including phases nested in its step."""
    inner = [
        min(1.0, (phase.done + (_fraction(phases, name) if phase.done < phase.steps else 0)) / phase.steps)
        for name, phase in phases.items()
        if phase.parent == parent
    ]
    return max(inner, default=0.0)


def explain(message: str) -> str:
    """Return a builder's error in one line: its meaning, the builder's own message, and advice."""
    line = one_line(message)
    for part, meaning, advice in _EXPLANATIONS:
        if part in line.lower():
            return f"{meaning} ({line}); {advice}"
    return f"{line}; choose other bounds or report it with the graph"
