"""Builds TensorRT engines from ONNX graphs: for TensorRT for RTX on any machine, for TensorRT on the GPU at hand."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ldm_export.engine.builder_package import check_request, open_package
from ldm_export.engine.config import add_profiles, choose_capabilities, limit_memory, load_timings, save_timings
from ldm_export.engine.inspector import inspect_engine
from ldm_export.engine.messages import Progress, builder_log, builder_monitor, one_line, translated
from ldm_export.engine.profiles import bounded, profiles
from ldm_export.engine.proof import prove
from ldm_export.engine.refit import refit_engine, refit_source, structure
from ldm_export.engine.request import EngineRequest
from ldm_runtime.atomic_files import sha256
from ldm_runtime.bundle import Bundle
from ldm_runtime.engine_facts import Engine
from ldm_runtime.errors import BuildError
from ldm_runtime.specs import ComponentSpec


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
    matrix: bool = True,
    previous: Bundle | None = None,
) -> Engine:
    """Build one engine and prove its precision.

    Args:
        graph: ONNX file; external weights lie beside it.
        spec: of the component.
        precision: of the graph: "fp32", "fp16" or "bf16".
        target: file to write.
        factor: pixels of one latent.
        islands: matrix work of the graph that is meant to stay in fp32, by node name.
        progress: told how far the builder is, in thousandths.
        matrix: the graph has convolutions or matrix products, whose precision is proven.
        previous: where an engine may lie that takes the graph's weights without a rebuild.

    Returns:
        Facts for the manifest; ``file`` is the target's name.

    Raises:
        BuildError: the package is missing, the request is none it can serve, the builder fails, or matrix work is in
            another precision than asked.
    """
    package = open_package(request.target)
    check_request(package, request, precision, matrix)
    engine = Engine(
        file=target.name,
        package=request.target,
        version=package.__version__,
        compute_capabilities=request.compute_capabilities,
        precision=precision,
        graph=sha256(graph),
        profiles=profiles(bounded(spec, dict(request.bounds), factor)),
        structure=structure(graph) if request.refittable else "",
    )
    if source := refit_source(previous, spec.name, engine):
        refit_engine(package, source, graph, target)
    else:
        _build(package, graph, spec, request, engine, target, progress)
    if request.compute_capabilities:
        proof = prove(target, precision, islands, matrix=matrix)
    else:
        proof = inspect_engine(package, target, precision, islands, matrix=matrix)
    return replace(engine, proof=proof.facts())


def _build(
    package: ModuleType,
    graph: Path,
    spec: ComponentSpec,
    request: EngineRequest,
    engine: Engine,
    target: Path,
    progress: Progress,
) -> None:
    log = builder_log(package)
    try:
        builder = package.Builder(log)
    except Exception as error:  # the bindings raise bare classes where there is no driver
        raise BuildError(_no_builder(package, error)) from None
    network = builder.create_network(_strongly_typed(package))
    _parse(package, network, graph, spec, log)
    config = builder.create_builder_config()
    choose_capabilities(package, config, request.compute_capabilities)
    limit_memory(package, config)
    timings = None if request.timings is None else load_timings(config, Path(request.timings))
    if request.refittable:
        config.set_flag(package.BuilderFlag.REFIT)
    if not request.compute_capabilities:
        config.profiling_verbosity = package.ProfilingVerbosity.DETAILED  # for the inspector
    monitor = builder_monitor(package, progress)
    config.progress_monitor = monitor
    if refused := add_profiles(builder, config, engine.profiles):
        raise BuildError(f"{spec.name}: {package.__name__} refuses the shapes {refused}; choose other bounds")
    built = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if built is None:
        raise BuildError(f"{spec.name}: {package.__name__} built no engine: {translated(log.first())}")
    if timings is not None:
        save_timings(timings, Path(str(request.timings)))
    with target.open("wb") as file:
        file.write(built)
        file.flush()
        os.fsync(file.fileno())


def _parse(package: ModuleType, network: Any, graph: Path, spec: ComponentSpec, log: Any) -> None:
    parser = package.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        first = parser.get_error(0).desc() if parser.num_errors else log.first()
        raise BuildError(f"{spec.name}: {package.__name__} cannot parse {graph}: {one_line(first)}")
    got = (
        [network.get_input(index).name for index in range(network.num_inputs)],
        [network.get_output(index).name for index in range(network.num_outputs)],
    )
    expected = ([tensor.name for tensor in spec.inputs], [tensor.name for tensor in spec.outputs])
    if tuple(map(sorted, got)) != tuple(map(sorted, expected)):  # a file of zeros parses, and is empty
        raise BuildError(
            f"{spec.name}: {package.__name__} cannot parse {graph}: it has inputs {got[0]} and outputs {got[1]}, "
            f"expected {expected[0]} and {expected[1]}; rebuild the graph"
        )


def _strongly_typed(package: ModuleType) -> int:
    """The network flag; TensorRT 11 has strongly typed networks only and accepts it still."""
    flag = getattr(package.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _no_builder(package: ModuleType, error: Exception) -> str:
    return (
        f"{package.__name__} cannot build here: {one_line(str(error))}; it needs an NVIDIA GPU and its driver. "
        "--target tensorrt-rtx builds without"
    )
