"""Traces a torch module into an ONNX graph file with dynamic shapes and readable names."""

from __future__ import annotations

import copy
import gc
import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.external_data import load_to_model
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tensor_adapters import TorchTensor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from ldm_export.graph.simplify import simplify
from ldm_export.graph.trace_cache import cached_trace
from ldm_runtime.backends.host import first_line
from ldm_runtime.bundle_layout import weights_beside
from ldm_runtime.errors import BuildError
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec, dummy_inputs

__all__ = ["INLINE_BYTES", "OPSET", "export_graph", "load_graph", "save_graph", "trace_graph"]

OPSET = 20
INLINE_BYTES = 1_000_000
"""Bytes of weights above which they are stored in one external file, ``.onnx.data``. Engines map it and other graphs
can refer to it. A protobuf file cannot exceed 2 GB, and is copied in memory when it is written and read."""
TRACED_MIN = 17
"""Smallest size that a trace uses for an axis whose minimum is above one. The tracer treats a size of one as fixed, so
no level of a UNet with up to five levels may be one pixel wide."""


def export_graph(module: nn.Module, spec: ComponentSpec, target: Path) -> list[Path]:
    """Trace ``module`` and write ``target``; more than INLINE_BYTES of weights go to a second file, ``target``.data.

    Args:
        module: See ``trace_graph``.
        spec: See ``trace_graph``.
        target: Path of the graph, in an existing folder.

    Returns:
        The files written.

    Raises:
        BuildError: The module cannot be traced, or the graph does not pass ``onnx.checker``.
    """
    return save_graph(trace_graph(module, spec), target)


def trace_graph(module: nn.Module, spec: ComponentSpec) -> ir.Model:
    """Trace ``module`` into a graph that shares its weights.

    The trace runs on fake tensors, so it needs no memory for activations or a second copy of the weights.

    Args:
        module: A module in eval mode, float32 on the CPU, that takes the tensors of ``spec.inputs`` in this order and
            returns one tensor for each of ``spec.outputs``.
        spec: Names, dtypes and dynamic axes of its inputs and outputs.

    Raises:
        BuildError: The module cannot be traced.
    """
    with _uncollected():
        try:
            model = cached_trace(module, spec, _trace)
        except (torch.onnx.OnnxExporterError, RuntimeError) as error:
            raise BuildError(
                f"{spec.name}: cannot be traced: {_reason(error)}; report it with the model's config"
            ) from error
        _give_weights(model, _weights_of(module), inputs=len(spec.inputs))
        named = (*spec.inputs, *spec.outputs)
        for value, tensor in zip((*model.graph.inputs, *model.graph.outputs), named, strict=True):
            value.name = tensor.name
        with _quiet():
            simplify(model)
        _name(model, spec)
        _share_equal_weights(model.graph)
        RemoveUnusedNodesPass()(model)
    return model


def load_graph(path: Path) -> ir.Model:
    """Read a graph of a bundle or a build. External weights are mapped into memory, not read.

    onnx_ir itself refuses files with several hard links, such as those kept from an earlier build.
    """
    model = ir.load(path)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            file = path.with_name(Path(tensor.location).name)
            shape = tuple(tensor.shape.numpy())
            mapped = np.memmap(file, tensor.dtype.numpy(), "r", tensor.offset or 0, shape)
            value.const_value = ir.Tensor(mapped, dtype=tensor.dtype, name=tensor.name)
    return model


def save_graph(model: ir.Model, target: Path) -> list[Path]:
    """Write a graph, and ``target``.data if the weights exceed INLINE_BYTES; return the files written.

    Raises:
        BuildError: the graph does not pass ``onnx.checker``.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    data = weights_beside(target) if size > INLINE_BYTES else None
    if data is None:
        load_to_model(model)  # the new file must not refer to weights of another graph's file
    ir.save(model, target, external_data=data.name if data else None)
    try:
        onnx.checker.check_model(str(target))
    except onnx.checker.ValidationError as error:
        raise BuildError(f"{model.graph.name}: {target} fails onnx.checker: {first_line(error)}") from error
    return [target, data] if data else [target]


def _weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name; tied ones appear under each name."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _trace(module: nn.Module, spec: ComponentSpec) -> bytes:
    """Return the serialized traced model.

    Its inputs have the names of the module's arguments, and its weights are additional inputs after them.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    weights = _weights_of(module)
    fakes = {id(tensor): mode.from_tensor(tensor, static_shapes=True) for tensor in weights.values()}
    axes = {dim.name: dim for tensor in spec.inputs for dim in tensor.shape if isinstance(dim, Axis)}
    dims = {name: Dim(name, min=1 if axis.min == 1 else TRACED_MIN, max=2**20) for name, axis in axes.items()}
    shapes = {
        tensor.name: {
            i: dims[dim.name] if dim.scale == 1 else dim.scale * dims[dim.name]
            for i, dim in enumerate(tensor.shape)
            if isinstance(dim, Axis)
        }
        for tensor in spec.inputs
    }
    feed = dummy_inputs(_traced_sizes(spec))
    with _quiet(), mode, torch.no_grad():
        program = torch.onnx.export(
            copy.deepcopy(module, fakes),
            tuple(torch.empty(array.shape, dtype=getattr(torch, str(array.dtype))) for array in feed.values()),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=tuple(shapes[tensor.name] for tensor in spec.inputs),
            optimize=False,
            verbose=False,
        )
    assert program is not None
    graph = program.model.graph
    for name in [name for name in graph.initializers if name in weights]:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    data: bytes = ir.to_proto(program.model).SerializeToString()
    return data


def _give_weights(model: ir.Model, weights: dict[str, torch.Tensor], inputs: int) -> None:
    """Convert all inputs after the first ``inputs`` to initializers."""
    graph = model.graph
    values = [graph.inputs.pop(inputs) for _ in range(len(graph.inputs) - inputs)]
    for value in values:
        value.const_value = TorchTensor(weights[value.name or ""], value.name)
        graph.register_initializer(value)


def _traced_sizes(spec: ComponentSpec) -> ComponentSpec:
    """Return the spec with usual sizes that differ from all fixed dimensions, so that the tracer tells them apart."""
    axes = {dim.name: dim for tensor in spec.inputs for dim in tensor.shape if isinstance(dim, Axis)}
    fresh = {
        name: (3 if axis.min == 1 else TRACED_MIN + 2) + 4 * index for index, (name, axis) in enumerate(axes.items())
    }

    def traced(tensor: TensorSpec) -> TensorSpec:
        shape = (
            dim if isinstance(dim, int) else Axis(dim.name, 1, fresh[dim.name], 2**20, dim.scale)
            for dim in tensor.shape
        )
        return replace(tensor, shape=tuple(shape))

    return replace(spec, inputs=tuple(map(traced, spec.inputs)))


def _name(model: ir.Model, spec: ComponentSpec) -> None:
    """Name graph and nodes after their modules, set the dimensions of the spec, and remove the tracer's metadata."""
    graph = model.graph
    graph.name = spec.name
    model.producer_name, model.producer_version, model.doc_string = "ldm-export", None, None
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            value.shape = ir.Shape([dim.symbol if isinstance(dim, Axis) else dim for dim in tensor.shape])
    counts: Counter[str] = Counter()
    for node in graph:
        # "…/…: some.Class/unet.down_blocks.0.conv: torch…Conv2d/conv2d_3: aten.conv2d.default"
        scopes = [scope.split(":")[0] for scope in node.metadata_props.get("namespace", "").split("/")]
        path = scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_") else ""
        stem = f"{path}/{node.op_type}".lstrip("/")
        counts[stem] += 1
        node.name = stem if counts[stem] == 1 else f"{stem}_{counts[stem]}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()


def _share_equal_weights(graph: ir.Graph) -> None:
    """Merge equal initializers; onnx_ir's own passes skip large ones and fail on transposed views."""
    first: dict[object, ir.Value] = {}
    for value in tuple(graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None:
            key = (tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest())
            if (shared := first.setdefault(key, value)) is not value:
                value.replace_all_uses_with(shared)
                graph.initializers.pop(value.name or "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's own warnings and log messages (missing torchvision, dropped axis names)."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(max(before, logging.ERROR))
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Suspend garbage collection of cycles, because the millions of objects of a trace stay alive until its end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cause(error: BaseException) -> BaseException:
    """Return the original error: the exporter wraps it in further errors with advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """Return the first line of the original error, and the second if the first ends with a colon."""
    lines = [line.strip() for line in str(_cause(error)).strip().splitlines() if line.strip()]
    last = next((index for index, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: last + 1])[:300] or type(_cause(error)).__name__
