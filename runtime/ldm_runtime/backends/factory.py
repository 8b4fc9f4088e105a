"""Opens the components of a bundle on an engine: all that a pipeline runs, or a single one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm_runtime.backends.engine import Choice, Engine, Placement, Wish, pipeline_components
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.backends.registry import AUTO
from ldm_runtime.backends.selection import select_backend
from ldm_runtime.bundle import Bundle
from ldm_runtime.device_loop import DeviceLoop
from ldm_runtime.errors import BackendError
from ldm_runtime.number_checks import threads as checked_threads

__all__ = ["OpenModel", "open_component", "open_model"]


@dataclass(frozen=True, eq=False)
class OpenModel:
    """The components of a bundle, ready to be loaded.

    Attributes:
        backends: Component -> backend that is loaded on first use, for each component that the pipeline runs.
        choice: What runs them.
        loop: The denoising loop on the device, if there is one.
    """

    backends: dict[str, LazyBackend]
    choice: Choice
    loop: DeviceLoop | None


def open_model(
    bundle: Bundle,
    backend: str | Engine = AUTO,
    *,
    precision: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    cache: Path | None = None,
    once: bool = False,
) -> OpenModel:
    """Select an engine and check the files of every component that the pipeline runs; each file is read once.

    Args:
        bundle: The bundle.
        backend, precision, device: As ``select_backend`` and ``Wish`` take them.
        threads: CPU threads of one operator. None means all cores that this process may use.
        cache: Folder where an engine may keep compiled graphs.
        once: True if the model generates one image and is then freed.

    Raises:
        SpecError: ``threads`` is no number from 1 to 1024.
        ManifestError: A file is not the one that was built.
        BackendError: The engine cannot run the bundle on this machine.
    """
    threads = checked_threads(threads)
    engine, choice = select_backend(bundle, backend, Wish(precision, device, once))
    placement = Placement(choice.device, threads, cache)
    model = bundle.manifest.model
    backends = {
        name: LazyBackend(model.components[name], engine.open(bundle, name, choice, placement))
        for name in pipeline_components(model)
    }
    return OpenModel(backends, choice, engine.device_loop(bundle, choice, placement, backends))


def open_component(
    bundle: Bundle,
    component: str,
    backend: str | Engine = AUTO,
    *,
    precision: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    cache: Path | None = None,
) -> LazyBackend:
    """Load one component. Only its own files are read and checked.

    Arguments and errors are those of ``open_model``; the component must be one of the bundle's.
    """
    if component not in bundle.manifest.components:
        known = ", ".join(bundle.manifest.components)
        raise BackendError(f"{bundle.folder}: got component {component!r:.60}, expected one of {known}")
    threads = checked_threads(threads)
    engine, choice = select_backend(bundle, backend, Wish(precision, device))
    loader = engine.open(bundle, component, choice, Placement(choice.device, threads, cache))
    opened = LazyBackend(bundle.manifest.components[component].spec, loader)
    opened.load()
    return opened
