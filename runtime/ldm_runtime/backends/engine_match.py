"""Which engine of a bundle serves here: wrong ones are refused before they are opened, with what to do instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldm_runtime.backends.host import import_engine
from ldm_runtime.bundle import Bundle
from ldm_runtime.engine_facts import Engine
from ldm_runtime.errors import BackendError

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Package, as engines name it → module."""


def check_graph(bundle: Bundle, component: str, precision: str, engines: Sequence[Engine]) -> None:
    """Refuse engines of another graph than the bundle's.

    Raises:
        BackendError: no engine of that precision, or none of the bundle's own graph.
    """
    part = bundle.manifest.components[component]
    if not engines:
        others = sorted({engine.precision for engine in part.engines})
        raise BackendError(
            f"{bundle.folder}: {component} has no {precision} engine, only {', '.join(others) or 'none'}; build it "
            f"with `ldm-export build --precision {precision} --target tensorrt-rtx --compute-capability …`"
        )
    digest = bundle.manifest.files[part.graphs[precision]].sha256 if precision in part.graphs else "none"
    for engine in engines:
        if engine.graph != digest:
            raise BackendError(
                f"{engine.file}: built from a graph of sha256 {engine.graph}, the bundle's is {digest}; "
                f"{rebuild_command(engine)}"
            )


def open_package(engines: Sequence[Engine]) -> Any:
    """The module that runs the first of these engines.

    Raises:
        BackendError: unknown, not installed, or broken.
    """
    name = engines[0].package
    if name not in MODULES:
        raise BackendError(f"{engines[0].file}: package {name!r:.40} is none of {', '.join(MODULES)}; rebuild it")
    return import_engine(MODULES[name], f'pip install "ldm-export[{name}]"')


def choose(component: str, engines: Sequence[Engine], version: str, capability: str) -> Engine:
    """The engine for this version and this GPU.

    Raises:
        BackendError: none; says what was found and what is needed.
    """
    for engine in engines:
        if engine.version == version and (not engine.compute_capabilities or capability in engine.compute_capabilities):
            return engine
    engine = engines[0]
    if engine.version != version:
        raise BackendError(
            f"{engine.file}: built by {engine.package} {engine.version}, here is {version}; install that version or "
            f"{rebuild_command(engine)}"
        )
    raise BackendError(
        f"{component}: its engines are for compute capability {', '.join(engine.compute_capabilities)}, this GPU has "
        f"{capability}; {rebuild_command(engine, capability)}"
    )


def rebuild_command(engine: Engine, capability: str | None = None) -> str:
    """The command that builds this engine anew, for another GPU where one is given."""
    capabilities = capability or ",".join(engine.compute_capabilities)
    option = f" --compute-capability {capabilities}" if capabilities else ""
    return f"rebuild with `ldm-export build --precision {engine.precision} --target {engine.package}{option}`"
