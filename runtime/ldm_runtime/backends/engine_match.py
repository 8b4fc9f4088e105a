"""Finds the TensorRT engine of a bundle that runs on this machine, and refuses others before they are opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.backends.host import import_engine
from ldm_runtime.bundle import Bundle
from ldm_runtime.engine_facts import EngineFacts
from ldm_runtime.errors import BackendError
from ldm_runtime.specs import ComponentSpec
from ldm_runtime.verified_file import VerifiedFile

__all__ = [
    "PACKAGES",
    "MatchedEngine",
    "check_graph",
    "engines_of",
    "match_engine",
    "matching_engine",
    "open_package",
    "rebuild_command",
]

PACKAGES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Package as bundles and extras name it -> its module."""


@dataclass(frozen=True)
class MatchedEngine:
    """An engine that runs on this machine, with its file checked.

    Attributes:
        facts: The manifest's entry.
        file: The engine.
        spec: Inputs and outputs of the component.
        package: The module that runs it.
    """

    facts: EngineFacts
    file: VerifiedFile
    spec: ComponentSpec
    package: ModuleType


def match_engine(bundle: Bundle, component: str, precision: str) -> MatchedEngine:
    """Find the engine of a component for this machine and check its file.

    Raises:
        BackendError: There is no engine of that precision for this package version and GPU, the package is missing,
            or there is no GPU.
        ManifestError: The engine is not the file that was built.
    """
    engines = engines_of(bundle, component, precision)
    check_graph(bundle, component, precision, engines)
    package = open_package(engines)
    facts = matching_engine(component, engines, package.__version__, Cuda().capability())
    return MatchedEngine(facts, bundle.verified(facts.file), bundle.manifest.components[component].spec, package)


def engines_of(bundle: Bundle, component: str, precision: str) -> tuple[EngineFacts, ...]:
    """Return the engines of a component in one precision.

    Raises:
        BackendError: There are none; the message has the command that builds them.
    """
    part = bundle.manifest.components[component]
    if engines := tuple(engine for engine in part.engines if engine.precision == precision):
        return engines
    others = sorted({engine.precision for engine in part.engines})
    raise BackendError(
        f"{bundle.folder}: {component} has no {precision} engine, only {', '.join(others) or 'none'}; build it "
        f"with `ldm-export build --precision {precision} --target tensorrt-rtx --compute-capability …`"
    )


def check_graph(bundle: Bundle, component: str, precision: str, engines: Sequence[EngineFacts]) -> None:
    """Check that engines were built from the bundle's own graph.

    Raises:
        BackendError: An engine was built from another graph.
    """
    part = bundle.manifest.components[component]
    digest = bundle.manifest.files[part.graphs[precision]].sha256 if precision in part.graphs else "none"
    for engine in engines:
        if engine.graph != digest:
            raise BackendError(
                f"{engine.file}: built from a graph of sha256 {engine.graph:.16}…, the bundle's is {digest:.16}…; "
                f"{rebuild_command(engine)}"
            )


def open_package(engines: Sequence[EngineFacts]) -> ModuleType:
    """Import the package that runs the first of these engines.

    Raises:
        BackendError: The package is unknown, not installed, or cannot be loaded.
    """
    name = engines[0].package
    if name not in PACKAGES:
        raise BackendError(f"{engines[0].file}: package {name!r:.40} is none of {', '.join(PACKAGES)}; rebuild it")
    return import_engine(PACKAGES[name], name)


def matching_engine(component: str, engines: Sequence[EngineFacts], version: str, capability: str) -> EngineFacts:
    """Return the engine for a package version and a GPU.

    Args:
        component: Name of the component, for messages.
        engines: At least one engine of the component.
        version: Version of the package that is installed.
        capability: Compute capability of the GPU at hand, e.g. "8.9".

    Raises:
        BackendError: No engine matches. The message says what was found and what is needed. An engine that records no
            compute capability matches no GPU.
    """
    for engine in engines:
        if engine.version == version and capability in engine.compute_capabilities:
            return engine
    engine = engines[0]
    if engine.version != version:
        raise BackendError(
            f"{engine.file}: built by {engine.package} {engine.version}, here is {version}; install that version or "
            f"{rebuild_command(engine)}"
        )
    known = list(dict.fromkeys(one for engine in engines for one in engine.compute_capabilities))
    raise BackendError(
        f"{component}: its engines are for compute capability {', '.join(known) or 'none (not recorded)'}, this GPU "
        f"has {capability}; {rebuild_command(engine, capability)}"
    )


def rebuild_command(engine: EngineFacts, capability: str | None = None) -> str:
    """Return the command that builds an engine again, for another GPU if ``capability`` is given.

    TensorRT builds for the GPU at hand, so its command names no compute capability.
    """
    capabilities = "" if engine.package == "tensorrt" else capability or ",".join(engine.compute_capabilities)
    option = f" --compute-capability {capabilities}" if capabilities else ""
    where = " on this machine" if engine.package == "tensorrt" else ""
    return f"rebuild{where} with `ldm-export build --precision {engine.precision} --target {engine.package}{option}`"
