"""Replaces the weights of a refittable engine without rebuilding it. This needs a GPU."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import ModuleType

import onnx_ir as ir

from ldm_runtime.backends.tensorrt_log import error_log, one_line
from ldm_runtime.bundle import Bundle
from ldm_runtime.engine_facts import EngineFacts
from ldm_runtime.errors import BuildError, ManifestError

__all__ = ["refit_engine", "refit_source", "structure"]

SMALL = 16
"""Constants with at most this many values count as structure, e.g. a norm's epsilon, sizes and scales."""


def structure(graph: Path) -> str:
    """Return the SHA-256 of a graph without the values of its weights.

    It is equal for two checkpoints of the same architecture. It covers operators, attributes, names, shapes and types,
    and the values of small constants and integers.
    """
    model = ir.load(graph)
    constants = []
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        counts = tensor.size <= SMALL or not tensor.dtype.is_floating_point()
        content = hashlib.sha256(tensor.tobytes()).hexdigest() if counts else ""
        constants.append([name, tensor.dtype.name, [str(size) for size in tensor.shape], content])
    nodes = [
        [
            node.domain,
            node.op_type,
            [value.name if value else None for value in node.inputs],
            [[value.name, str(value.dtype)] for value in node.outputs],
            sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()),
        ]
        for node in model.graph
    ]
    sides = [[[value.name, str(value.shape)] for value in side] for side in (model.graph.inputs, model.graph.outputs)]
    return hashlib.sha256(json.dumps([sides, constants, nodes]).encode()).hexdigest()


def refit_source(previous: Bundle | None, component: str, target: EngineFacts) -> Path | None:
    """Return the file of an engine of an earlier build that can take the weights of ``target``, or None.

    The engine must be refittable and undamaged, and have been built by the same package and version, for the same GPUs,
    profiles and precision, from a graph of the same structure.
    """
    part = None if previous is None else previous.manifest.components.get(component)
    for engine in () if part is None else part.engines:
        facts = (
            "package",
            "version",
            "compute_capabilities",
            "precision",
            "profiles",
            "structure",
            "version_compatible",
        )
        if engine.structure and all(getattr(engine, name) == getattr(target, name) for name in facts):
            try:
                assert previous is not None
                return previous.file(engine.file)
            except ManifestError:
                return None  # damaged after it was built
    return None


def refit_engine(package: ModuleType, engine: Path, graph: Path, target: Path) -> None:
    """Write a copy of ``engine`` with the weights of ``graph`` to ``target``.

    Raises:
        BuildError: The engine cannot be opened, or it needs other weights than the graph has.
    """
    log = error_log(package)
    runtime = package.Runtime(log)
    opened = runtime.deserialize_cuda_engine(engine.read_bytes())
    if opened is None:
        raise BuildError(
            f"{engine}: {package.__name__} cannot open it: {one_line(log.first())}; leave --refittable out"
        )
    refitter = package.Refitter(opened, log)
    if not package.OnnxParserRefitter(refitter, log).refit_from_file(str(graph)):
        raise BuildError(f"{engine}: does not take the weights of {graph}: {one_line(log.first())}")
    if missing := refitter.get_missing_weights():
        raise BuildError(
            f"{engine}: lacks {len(missing)} weights, first {missing[0]!r:.80}, that {graph} does not have"
        )
    if not refitter.refit_cuda_engine():
        raise BuildError(f"{engine}: {package.__name__} cannot exchange its weights: {one_line(log.first())}")
    with target.open("wb") as file:
        file.write(opened.serialize())
        file.flush()
        os.fsync(file.fileno())
