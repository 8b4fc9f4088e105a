"""Finds the TensorRT engine of a bundle that runs on this machine, and rejects others before they are opened."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from types import ModuleType

from ldm_runtime.backends.driver import Gpu, check_driver, installed_gpu, no_gpu
from ldm_runtime.backends.engine_advice import build_command, other_gpu, rebuild_command
from ldm_runtime.backends.host import import_engine, is_installed
from ldm_runtime.bundle import Bundle
from ldm_runtime.engine_facts import EngineFacts
from ldm_runtime.errors import BackendError, UnsupportedError
from ldm_runtime.specs import ComponentSpec
from ldm_runtime.verified_file import VerifiedFile

__all__ = [
    "PACKAGES",
    "RUNTIMES",
    "MatchedEngine",
    "check_graph",
    "engines_of",
    "find_engine",
    "match_engine",
    "runs_version",
    "runtime_for",
]

PACKAGES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Package that builds engines, as bundles and extras name it -> its module."""
RUNTIMES = {**PACKAGES, "tensorrt-lean": "tensorrt_lean"}
"""Package that runs engines -> its module. TensorRT's lean runtime runs version-compatible plans only."""


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
        BackendError: As ``find_engine``, or there is no GPU.
        ManifestError: The engine is not the file that was built.
    """
    gpu = installed_gpu()
    if isinstance(gpu, str):
        raise no_gpu(gpu)
    facts, package = find_engine(bundle, component, precision, gpu)
    return MatchedEngine(facts, bundle.verified(facts.file), bundle.manifest.components[component].spec, package)


def find_engine(bundle: Bundle, component: str, precision: str, gpu: Gpu) -> tuple[EngineFacts, ModuleType]:
    """Find the engine of a component for a GPU, and the installed package that runs it. No file is read.

    Raises:
        UnsupportedError: The bundle has no engine of the component in that precision.
        BackendError: Its engines were built for other GPUs, from another graph or by another version, or the package is
            missing or cannot be loaded.
    """
    engines = engines_of(bundle, component, precision)
    check_graph(bundle, component, precision, engines)
    fitting = [engine for engine in engines if gpu.capability in engine.compute_capabilities]
    if not fitting:
        raise other_gpu(component, engines, gpu)
    return runtime_for(fitting, gpu)


def engines_of(bundle: Bundle, component: str, precision: str) -> tuple[EngineFacts, ...]:
    """Return the engines of a component in one precision.

    Raises:
        UnsupportedError: There are none; the message has the command that builds them.
    """
    part = bundle.manifest.components[component]
    if engines := tuple(engine for engine in part.engines if engine.precision == precision):
        return engines
    others = sorted({engine.precision for engine in part.engines})
    raise UnsupportedError(
        f"{bundle.folder}: {component} has no {precision} engine, only {', '.join(others) or 'none'}; build it "
        f"with {build_command(precision, installed_gpu())}"
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


def runtime_for(engines: Sequence[EngineFacts], gpu: Gpu) -> tuple[EngineFacts, ModuleType]:
    """Return the first of these engines that an installed package runs, with the package's module.

    Raises:
        BackendError: A package is unknown, not installed, cannot be loaded, has another version, or needs a newer
            driver.
    """
    refusals: list[BackendError] = []
    for engine in engines:
        try:
            return engine, _open_runtime(engine, gpu)
        except BackendError as error:
            refusals.append(error)
    raise refusals[0]


def _open_runtime(engine: EngineFacts, gpu: Gpu) -> ModuleType:
    if engine.package not in PACKAGES:
        known = ", ".join(PACKAGES)
        raise BackendError(f"{engine.file}: package {engine.package!r:.40} is none of {known}; rebuild it")
    lean = engine.version_compatible and not is_installed(PACKAGES[engine.package])
    name = "tensorrt-lean" if lean else engine.package
    package = import_engine(RUNTIMES[name], name)
    if not runs_version(engine, package.__version__):
        raise BackendError(
            f"{engine.file}: built by {engine.package} {engine.version}, here is {package.__version__}; install that "
            f"version or {rebuild_command(engine)}"
        )
    check_driver(gpu, name, _cuda_of(name))
    return package


def _cuda_of(package: str) -> str:
    """Major CUDA version of an installed package, read from its requirements, e.g. tensorrt_cu13; "" if unknown."""
    try:
        required = " ".join(requires(package) or ())
    except PackageNotFoundError:  # installed without pip
        return ""
    match = re.search(r"[_-]cu(\d+)\b", required)
    return match[1] if match else ""


def runs_version(engine: EngineFacts, version: str) -> bool:
    """True if a version of the package runs an engine.

    An engine runs on the version that built it; a version-compatible plan also on later versions of the same major
    number.
    """
    if version == engine.version or not engine.version_compatible:
        return version == engine.version
    built, here = ([int(part) for part in text.split(".") if part.isdecimal()] for text in (engine.version, version))
    return built[:1] == here[:1] and here >= built
