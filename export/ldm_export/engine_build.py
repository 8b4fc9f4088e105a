"""Builds TensorRT engines from ONNX graphs: for TensorRT for RTX on any machine, for TensorRT on the GPU at hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ldm_export.engine_package import check_capabilities, known_capabilities, open_package
from ldm_export.engine_profiles import Bounds, bounded, profiles
from ldm_export.engine_proof import prove
from ldm_runtime.bundle import sha256
from ldm_runtime.engine_facts import Engine
from ldm_runtime.errors import BuildError
from ldm_runtime.specs import ComponentSpec

Progress = Callable[[int, int], None]
OUT_OF_MEMORY = "could not find any implementation"
"""How the builder says that it ran out of memory."""


@dataclass(frozen=True)
class EngineRequest:
    """What engines are asked for.

    Attributes:
        target: "tensorrt-rtx" or "tensorrt".
        compute_capabilities: e.g. ("8.6", "8.9"); empty for "tensorrt", which builds for the GPU at hand.
        bounds: (name, min:opt:max) of "batch" in images and of "height" and "width" in pixels.
        refittable: keep what is needed to exchange the weights later without a rebuild.
    """

    target: str
    compute_capabilities: tuple[str, ...] = ()
    bounds: tuple[tuple[str, Bounds], ...] = ()
    refittable: bool = False

    @property
    def name(self) -> str:
        """Short, for file names: ``tensorrt-rtx-8.6-8.9``."""
        return "-".join((self.target, *self.compute_capabilities))


def build_engine(
    graph: Path,
    spec: ComponentSpec,
    precision: str,
    request: EngineRequest,
    target: Path,
    *,
    factor: int = 8,
    islands: Collection[str] = (),
    progress: Progress = lambda done, total: None,
) -> Engine:
    """Build one engine and prove its precision.

    Args:
        graph: ONNX file; external weights lie beside it.
        spec: of the component.
        precision: of the graph: "fp32", "fp16" or "bf16".
        target: file to write.
        factor: pixels of one latent.
        islands: matrix work of the graph that is meant to stay in fp32, by node name.
        progress: told steps done and in all of the builder's outermost phase.

    Returns:
        Facts for the manifest; ``file`` is the target's name.

    Raises:
        BuildError: the package is missing, the request is none it can serve, the builder fails, or matrix work is in
            another precision than asked.
    """
    package = open_package(request.target)
    check_capabilities(package, request.compute_capabilities, precision)
    shapes = profiles(bounded(spec, dict(request.bounds), factor))
    log = _log(package)
    try:
        builder = package.Builder(log)
    except Exception as error:  # the bindings raise bare classes where there is no driver
        raise BuildError(_no_builder(package, error)) from None
    network = builder.create_network(_strongly_typed(package))
    parser = package.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        first = parser.get_error(0).desc() if parser.num_errors else log.first()
        raise BuildError(f"{spec.name}: {package.__name__} cannot parse {graph}: {_line(first)}")
    config = builder.create_builder_config()
    _choose_capabilities(package, config, request.compute_capabilities)
    if request.refittable:
        config.set_flag(package.BuilderFlag.REFIT)
    config.progress_monitor = _monitor(package, progress)
    for bounds in shapes:
        one = builder.create_optimization_profile()
        for name, (low, best, high) in bounds.items():
            one.set_shape(name, low, best, high)
        if config.add_optimization_profile(one) < 0:
            raise BuildError(f"{spec.name}: {package.__name__} refuses the shapes {bounds}; choose other bounds")
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise BuildError(f"{spec.name}: {package.__name__} built no engine: {_translated(log.first())}")
    with target.open("wb") as file:
        file.write(built)
        file.flush()
        os.fsync(file.fileno())
    del built
    proof = prove(target, precision, islands)
    return Engine(
        file=target.name,
        package=request.target,
        version=package.__version__,
        compute_capabilities=request.compute_capabilities,
        precision=precision,
        graph=sha256(graph),
        profiles=shapes,
        proof=proof.facts(),
    )


def _strongly_typed(package: ModuleType) -> int:
    """The network flag; TensorRT 11 has strongly typed networks only and accepts it still."""
    flag = getattr(package.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _choose_capabilities(package: ModuleType, config: Any, capabilities: Sequence[str]) -> None:
    if capabilities:
        known = known_capabilities(package)
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(known[capability], index)


def _log(package: ModuleType) -> Any:
    class Log(package.ILogger):  # type: ignore[misc, name-defined]
        """Keeps the builder's errors instead of printing them."""

        def __init__(self) -> None:
            package.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (package.ILogger.ERROR, package.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def first(self) -> str:
            return self.errors[0] if self.errors else "it does not say why"

    return Log()


def _monitor(package: ModuleType, progress: Progress) -> Any:
    class Monitor(package.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Tells the steps of the phase with the most of them; phases within it are not told."""

        def __init__(self) -> None:
            package.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.steps[name] = steps

        def step_complete(self, name: str, step: int) -> bool:
            if self.steps[name] == max(self.steps.values()):
                progress(step + 1, self.steps[name])
            return True

        def phase_finish(self, name: str) -> None:
            if self.steps[name] == max(self.steps.values()):
                progress(self.steps[name], self.steps[name])

    return Monitor()


def _no_builder(package: ModuleType, error: Exception) -> str:
    return (
        f"{package.__name__} cannot build here: {_line(str(error))}; it needs an NVIDIA GPU and its driver. "
        "--target tensorrt-rtx builds without"
    )


def _translated(message: str) -> str:
    line = _line(message)
    if OUT_OF_MEMORY in line.lower():
        return f"out of memory ({line}); choose smaller --batch, --height and --width, or free memory"
    return f"{line}; choose other bounds or report it with the graph"


def _line(message: str) -> str:
    return " ".join(message.split())[:300]
