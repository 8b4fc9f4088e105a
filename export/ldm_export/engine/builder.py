"""Builds TensorRT engines from ONNX graphs: for TensorRT for RTX on any machine, for TensorRT on its own GPU."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ldm_export.engine.attention import attentions_of
from ldm_export.engine.builder_package import check_request, engine_capabilities, open_package
from ldm_export.engine.config import add_profiles, choose_capabilities, limit_memory, load_timings, save_timings
from ldm_export.engine.inspector import inspect_engine
from ldm_export.engine.messages import OnProgress, builder_monitor, explain
from ldm_export.engine.profiles import bounded, profiles
from ldm_export.engine.proof import NO_MATRIX_WORK, has_matrix_work, prove
from ldm_export.engine.refit import refit_engine, refit_source, structure
from ldm_export.engine.request import EngineJob
from ldm_runtime.atomic_files import sha256
from ldm_runtime.backends.tensorrt_log import error_log, one_line
from ldm_runtime.engine_facts import EngineFacts
from ldm_runtime.errors import BuildError
from ldm_runtime.specs import ComponentSpec

__all__ = ["build_engine"]


def build_engine(job: EngineJob, on_progress: OnProgress = lambda done, total: None) -> EngineFacts:
    """Build one engine, prove its precision, and record which attentions it fuses.

    Args:
        job: The engine to build.
        on_progress: Called with the progress of the builder in thousandths.

    Returns:
        Entry of the manifest; its ``file`` is the target's name.

    Raises:
        BuildError: The package is missing or does not support the request, the builder fails, or matrix operations are
            in another precision than requested.
    """
    request, package = job.request, open_package(job.request.target)
    matrix = _readable_matrix_work(job, package)
    check_request(package, request, job.precision if matrix else None)
    engine = EngineFacts(
        file=job.target.name,
        package=request.target,
        version=package.__version__,
        compute_capabilities=engine_capabilities(request),
        precision=job.precision,
        graph=sha256(job.graph),
        profiles=profiles(bounded(job.spec, request)),
        structure=structure(job.graph) if request.refittable else "",
        version_compatible=request.version_compatible,
    )
    if source := refit_source(job.previous, job.spec.name, engine):
        refit_engine(package, source, job.graph, job.target)
    else:
        _build(package, job, engine, on_progress)
    if not matrix:
        proof = NO_MATRIX_WORK
    elif request.compute_capabilities:
        proof = prove(job.target, job.precision, job.islands, attentions_of(job.graph))
    else:
        proof = inspect_engine(package, job.target, job.precision, job.islands, attentions_of(job.graph))
    return replace(engine, proof=proof.facts())


def _readable_matrix_work(job: EngineJob, package: ModuleType) -> bool:
    """True if the graph has matrix operations.

    Raises:
        BuildError: The file is not an ONNX graph.
    """
    try:
        return has_matrix_work(job.graph)
    except Exception as error:  # protobuf's decoder raises its own exceptions
        message = one_line(str(error)) or type(error).__name__
        raise BuildError(f"{job.spec.name}: {package.__name__} cannot parse {job.graph}: {message}") from None


def _build(package: ModuleType, job: EngineJob, engine: EngineFacts, on_progress: OnProgress) -> None:
    spec, request, log = job.spec, job.request, error_log(package)
    try:
        builder = package.Builder(log)
    except Exception as error:  # the bindings raise exceptions without a common class if there is no driver
        raise BuildError(_no_builder(package, error)) from None
    network = builder.create_network(_strongly_typed(package))
    _parse(package, network, job.graph, spec, log)
    config = builder.create_builder_config()
    choose_capabilities(package, config, request.compute_capabilities)
    limit_memory(package, config)
    timings = None if request.timings is None else load_timings(config, Path(request.timings))
    if request.refittable:
        config.set_flag(package.BuilderFlag.REFIT)
    if request.version_compatible:
        config.set_flag(package.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(package.BuilderFlag.EXCLUDE_LEAN_RUNTIME)  # a plan with code in it could not be trusted
    if not request.compute_capabilities:
        config.profiling_verbosity = package.ProfilingVerbosity.DETAILED  # for the inspector
    monitor = builder_monitor(package, on_progress)
    config.progress_monitor = monitor
    if refused := add_profiles(builder, config, engine.profiles):
        raise BuildError(f"{spec.name}: {package.__name__} refuses the shapes {refused}; choose other bounds")
    built = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if built is None:
        raise BuildError(f"{spec.name}: {package.__name__} built no engine: {explain(log.first())}")
    if timings is not None:
        save_timings(timings, Path(str(request.timings)))
    with job.target.open("wb") as file:
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
    if tuple(map(sorted, got)) != tuple(map(sorted, expected)):  # a file of zeros parses as an empty graph
        raise BuildError(
            f"{spec.name}: {package.__name__} cannot parse {graph}: it has inputs {got[0]} and outputs {got[1]}, "
            f"expected {expected[0]} and {expected[1]}; rebuild the graph"
        )


def _strongly_typed(package: ModuleType) -> int:
    """Return the network flag. TensorRT 11 has strongly typed networks only, and still accepts the flag."""
    flag = getattr(package.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _no_builder(package: ModuleType, error: Exception) -> str:
    return (
        f"{package.__name__} cannot build here: {one_line(str(error))}; it needs an NVIDIA GPU and its driver. "
        "--target tensorrt-rtx builds without"
    )
