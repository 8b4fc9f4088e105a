"""The interface of an engine: whether it is available, how it would run a bundle, and how it opens a component."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from ldm_runtime.backends import Backend
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.bundle import Bundle
from ldm_runtime.device_loop import DeviceLoop
from ldm_runtime.loras.changes import ChangedWeight
from ldm_runtime.model import DENOISERS, ModelDescription
from ldm_runtime.verified_file import VerifiedFile

__all__ = [
    "FLOAT_GRAPHS",
    "Choice",
    "Engine",
    "Loader",
    "Placement",
    "WeightChange",
    "WeightChanger",
    "Wish",
    "pipeline_components",
    "step_graphs",
]

Loader = Callable[[], Backend]
"""Loads one component. Its files have been checked."""


@dataclass(frozen=True)
class Wish:
    """Requested engine options.

    Attributes:
        precision: "fp32", "fp16", "bf16" or "int8". None means the precision that the bundle was built for.
        device: "auto", "cpu" or "cuda".
        once: True if the model generates one image and is then freed, so that compilation time counts.
        below_rank: Only choices of a lower rank than this are needed. None means all of them.
    """

    precision: str | None = None
    device: str = "auto"
    once: bool = False
    below_rank: int | None = None

    def needs(self, rank: int) -> bool:
        """True if a choice of this rank is needed."""
        return self.below_rank is None or rank < self.below_rank


@dataclass(frozen=True)
class Choice:
    """One way to run a bundle.

    Attributes:
        backend: Name of the engine.
        device: "cpu" or "cuda".
        graph: Precision whose graphs are run: "fp32", "fp16", "bf16" or "int8".
        arithmetic: Precision of arithmetic for operations whose precision the graph does not fix.
        rank: Preference of the backend "auto", which takes the choice of the lowest rank.
        reason: Why "auto" takes it, in a few words, and why it could not take engines of a lower rank.
    """

    backend: str
    device: str
    graph: str
    arithmetic: str
    rank: int
    reason: str

    def same_way(self, other: Choice) -> bool:
        """True if another choice runs the same graphs in the same way; rank and reason are not compared."""
        return replace(self, reason=other.reason) == other

    @property
    def precision(self) -> str:
        """The ``Wish.precision`` that computes in this way; fp32 graphs computed in bf16 are "bf16"."""
        return self.arithmetic if self.graph == "fp32" else self.graph

    def facts(self) -> dict[str, str]:
        """Description as JSON values, without the rank."""
        return {name: value for name, value in asdict(self).items() if name != "rank"}

    def __str__(self) -> str:
        return f"{self.backend}, {self.graph} graphs computed in {self.arithmetic}: {self.reason}"


@dataclass(frozen=True)
class Placement:
    """Device, CPU threads and cache folder of a component.

    Attributes:
        device: "cpu" or "cuda".
        threads: CPU threads of one operator. None means all cores that this process may use.
        cache: Folder where an engine may keep compiled graphs for the next process. None keeps none.
    """

    device: str
    threads: int | None = None
    cache: Path | None = None


@runtime_checkable
class Engine(Protocol):
    """Interface of an engine that runs bundles.

    ``BACKENDS`` lists the engines of this package. A caller may pass an object with this interface as ``backend`` to
    ``LatentDiffusionPipeline.from_bundle``, to use an engine of their own.
    """

    @property
    def name(self) -> str:
        """Name of the engine, as callers give it, e.g. "onnxruntime"."""

    @property
    def extra(self) -> str:
        """Extra of the package ldm-export that installs the engine, e.g. "onnxruntime"; "" if there is none."""

    def available(self) -> str | None:
        """None if the engine's package is installed, otherwise a short phrase that says so."""

    def choices(self, bundle: Bundle, wish: Wish) -> Iterator[Choice]:
        """Yield the ways in which the engine would run the bundle. Nothing is loaded, and no file is read.

        Whatever can be checked without loading is checked here: the GPU, the driver, the package and its version. The
        first choice is used if the caller names the engine. The backend "auto" takes the choice of the lowest rank of
        all engines, and the next one if its components do not load.

        Raises:
            UnsupportedError: The engine cannot run the bundle as requested on any machine. "auto" leaves it out.
            BackendError: The engine cannot run the bundle on this machine, or not in the best way; the latter is raised
                after the remaining choices were yielded. "auto" takes another choice and reports the error.
        """

    def open(self, bundle: Bundle, component: str, choice: Choice, placement: Placement) -> Loader:
        """Check the files of one component and return a function that loads it.

        Raises:
            ManifestError: A file is not the one that was built.
            BackendError: The engine cannot run the component.
        """

    def device_loop(
        self, bundle: Bundle, choice: Choice, placement: Placement, backends: Mapping[str, LazyBackend]
    ) -> DeviceLoop | None:
        """Return a denoising loop that stays on the device, or None if the engine or the bundle has none.

        Args:
            bundle: The bundle.
            choice: How it runs.
            placement: Where it runs.
            backends: Backend of each component that the pipeline runs. Its ``loader`` is the result of ``open``.

        Raises:
            ManifestError: A file of the step graphs is not the one that was built.
        """


WeightChange = Callable[[VerifiedFile], Sequence[ChangedWeight]]
"""Returns the weights of a graph that change; their new values are computed when the component is loaded."""
FLOAT_GRAPHS = ("fp32", "fp16")
"""Precisions of graphs whose weights can change."""


@runtime_checkable
class WeightChanger(Protocol):
    """An engine that loads a component with other weights than those of its graph, for LoRA adapters."""

    def open_changed(
        self, bundle: Bundle, component: str, choice: Choice, placement: Placement, change: WeightChange
    ) -> Loader | None:
        """As ``Engine.open``, with changed weights; None if nothing changes in this component.

        Raises:
            ManifestError: As ``Engine.open``, or a change does not fit the graph.
        """


def step_graphs(model: ModelDescription) -> tuple[str, ...]:
    """Names of the components that compute a scheduler's step on a device; the pipeline itself does not run them."""
    return tuple(name for name, spec in model.components.items() if spec.runs == "step" and name not in DENOISERS)


def pipeline_components(model: ModelDescription) -> tuple[str, ...]:
    """Names of the components that the pipeline runs: all of them except the step graphs."""
    steps = step_graphs(model)
    return tuple(name for name in model.components if name not in steps)
