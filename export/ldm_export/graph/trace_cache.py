"""Cache of traced graphs without weights in a folder, so that models with the same structure are traced once.

The trace of a module does not depend on the values of its weights. Models that were fine-tuned from the same model have
the same structure, so their exports differ only in the weights. Small models gain most, because tracing takes nearly as
long as for large models, but reading and writing weights takes little time.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib.metadata
import logging
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn

import ldm_export
from ldm_runtime.specs import Axis, ComponentSpec, Dim

__all__ = ["VARIABLE", "UnknownStructure", "cached_trace", "key_of_trace"]

VARIABLE = "LDM_EXPORT_TRACE_CACHE"
"""Environment variable that names the folder; without it there is no cache."""
PACKAGES = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir")
"""Packages whose versions are part of each key, like the code of ``ldm_export``."""
IGNORED = {"_name_or_path", "_use_default_values"}
"""Attributes of a config that do not affect a trace: where it was loaded from, and the order of its defaults."""
_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)

logger = logging.getLogger(__name__)


class UnknownStructure(ValueError):
    """An attribute of a module cannot be described, so its trace has no key."""


def cached_trace(
    module: nn.Module, spec: ComponentSpec, trace: Callable[[nn.Module, ComponentSpec], bytes]
) -> ir.Model:
    """Return the result of ``trace(module, spec)``, a serialized model, from the cache if possible.

    Args:
        module, spec: Module and spec of a component.
        trace: Called if the cache does not have the trace.
    """
    path = _path(module, spec)
    kept = _read(path) if path else None
    if kept is not None:
        return kept
    data = trace(module, spec)
    if path:
        _write(path, data)
    return _parse(data)


def _path(module: nn.Module, spec: ComponentSpec) -> Path | None:
    """Path of a trace in the cache; None if it cannot be cached."""
    folder = os.environ.get(VARIABLE)
    try:
        return Path(folder) / f"{key_of_trace(module, spec)}.onnx" if folder else None
    except UnknownStructure as error:
        logger.info("%s: traced without a cache: %s", spec.name, error)
        return None


def key_of_trace(module: nn.Module, spec: ComponentSpec) -> str:
    """Return a SHA-256 (hex) of everything a trace depends on: code, versions, inputs and the structure of the module.

    The trace does not have the names of the spec, so components that differ in names alone share it.

    Raises:
        UnknownStructure: An attribute of the module is not plain data, a module, a tensor or an importable function.
    """
    tensors = [(tensor.dtype, *map(_dimension, tensor.shape)) for tensor in spec.inputs]
    digest = hashlib.sha256(repr((_code(), tensors)).encode())
    for part in _structure(module, {}):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _dimension(dim: Dim) -> object:
    """What a trace depends on: of an axis neither the usual nor the largest size."""
    return (dim.name, dim.min, dim.scale) if isinstance(dim, Axis) else dim


def _structure(value: object, seen: dict[int, int]) -> Iterator[str]:
    """Yield texts that describe an object and the objects it refers to; for tensors, shape and dtype but not values."""
    if isinstance(value, _VALUES):
        yield f"{type(value).__name__} {value!r}"
        return
    if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        if "<" in value.__qualname__:
            raise UnknownStructure(f"{value.__qualname__} is defined inside of a function")
        yield f"name {value.__module__}.{value.__qualname__}"
        return
    if id(value) in seen:
        yield f"same {seen[id(value)]}"
        return
    seen[id(value)] = len(seen)
    yield f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, torch.Tensor):
        yield f"{tuple(value.shape)} {value.dtype}"
    elif isinstance(value, np.ndarray):
        yield f"{value.shape} {value.dtype} {hashlib.sha256(value.tobytes()).hexdigest()}"
    else:
        for part in _parts(value):
            yield from _structure(part, seen)
    yield "end"


def _parts(value: object) -> Iterator[object]:
    """Yield the objects that an object refers to, including names of attributes."""
    if isinstance(value, (set, frozenset)):
        yield from sorted(value, key=repr)
        return
    if isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, dict):
        numbered = isinstance(value, OrderedDict)  # torch numbers hooks with a counter of the process
        for place, (key, part) in enumerate(value.items()):
            if key not in IGNORED:
                yield from (place if numbered and isinstance(key, int) else key, part)
    elif not hasattr(value, "__dict__"):
        raise UnknownStructure(f"an attribute is a {type(value).__qualname__}")
    for name, part in getattr(value, "__dict__", {}).items():
        if name not in IGNORED:
            yield from (name, part)


@functools.cache
def _code() -> tuple[str, ...]:
    """Versions of the packages that trace, and a digest of the source of ``ldm_export``."""
    digest = hashlib.sha256()
    for path in sorted(Path(ldm_export.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return (*(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES), digest.hexdigest())


def _parse(data: bytes) -> ir.Model:
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(data))
    return model


def _read(path: Path) -> ir.Model | None:
    """Return a cached trace; None if there is none, or if it cannot be read."""
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except Exception as error:  # protobuf and onnx_ir raise errors of many classes for damaged data
        logger.warning("%s: cannot be read (%s); the module is traced again", path, type(error).__name__)
        return None


def _write(path: Path, data: bytes) -> None:
    """Write a trace to the cache atomically, or log why this is not possible."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        logger.warning("%s: the trace cannot be kept: %s", path, error.strerror or error)
