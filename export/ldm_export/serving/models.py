"""The models of a Triton repository: the config and files of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm_export.serving.config import Serving, component_config, plan_name, stream_config, unary_config
from ldm_runtime.backends.engine import pipeline_components
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import CUDA_VARIANT, MANIFEST
from ldm_runtime.errors import BuildError
from ldm_runtime.specs import ComponentSpec
from ldm_runtime.triton.parameters import BUNDLE

__all__ = ["STREAM", "UNARY", "Model", "make_model", "model_names"]

UNARY, STREAM = "ldm", "ldm_stream"
CODE = '''"""Written by `ldm-export triton`. Triton's Python backend needs the package ldm-export to run it."""

import triton_python_backend_utils as pb_utils
from ldm_runtime.triton.{module} import {name}


class TritonPythonModel({name}):
    pb = pb_utils
'''


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        name: Its name on the server.
        config: Content of its config.pbtxt.
        files: Files of a version: path -> text to write, or file to link.
    """

    name: str
    config: Mapping[str, Any]
    files: Mapping[str, str | Path]


def model_names(bundle: Bundle) -> tuple[str, ...]:
    """Names of all models of a bundle, in the order in which they are written. `ldm`, which calls others, is last."""
    return (*pipeline_components(bundle.manifest.model), STREAM, UNARY)


def make_model(bundle: Bundle, serving: Serving, name: str) -> Model:
    """Create one of the bundle's models. The caller has checked the bundle's files.

    Raises:
        ManifestError: A component has no graph of the precision.
        BuildError: A component has no engine that Triton itself can load.
        SpecError: The model has a kind of conditioning that cannot be served.
    """
    model = bundle.manifest.model
    if name == UNARY:
        return Model(name, unary_config(model, serving), {"model.py": CODE.format(module="unary", name="UnaryModel")})
    if name == STREAM:
        code = CODE.format(module="decoupled", name="DecoupledModel")
        return Model(name, stream_config(model, serving), {"model.py": code, **_bundle_files(bundle)})
    component, precision = bundle.manifest.components[name], serving.parameters.precision
    if serving.target == "onnxruntime":
        graph = bundle.verified_graph(name, precision, CUDA_VARIANT if serving.gpu else "")
        spec = (
            _spec_of_graph(component.spec, graph.path)
            if serving.gpu and CUDA_VARIANT in component.variants
            else component.spec
        )
        files: dict[str, str | Path] = {"model.onnx": graph.path}
        folder = graph.path.parent  # the graph refers to its weights by paths from here
        files |= {str(weights.path.relative_to(folder)): weights.path for weights in graph.beside}
        return Model(name, component_config(spec, serving), files)
    if serving.target == "tensorrt":
        engines = [
            engine for engine in component.engines if engine.package == "tensorrt" and engine.precision == precision
        ]
        if not engines:
            raise BuildError(
                f"{bundle.folder}: {name} has no {precision} engine of TensorRT, the only kind that Triton loads "
                f"itself; build one with `ldm-export build --precision {precision} --target tensorrt`, or use "
                "--target python"
            )
        plans = {plan_name(engine): bundle.folder / engine.file for engine in engines}
        return Model(name, component_config(component.spec, serving, engines), plans)
    code = CODE.format(module="component_model", name="ComponentModel")
    return Model(name, component_config(component.spec, serving), {"model.py": code, **_bundle_files(bundle)})


def _spec_of_graph(spec: ComponentSpec, graph: Path) -> ComponentSpec:
    """Return the spec with float16 where the graph has it, because graphs for CUDA exchange some tensors in float16."""
    import onnx  # only graphs for CUDA need it

    model = onnx.load(graph, load_external_data=False)
    half = {
        value.name
        for value in (*model.graph.input, *model.graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    }
    inputs, outputs = (
        tuple(replace(tensor, dtype="float16") if tensor.name in half else tensor for tensor in tensors)
        for tensors in (spec.inputs, spec.outputs)
    )
    return replace(spec, inputs=inputs, outputs=outputs)


def _bundle_files(bundle: Bundle) -> dict[str, Path]:
    """Return all files of the bundle, because only the serving machine decides which of its graphs run."""
    return {f"{BUNDLE}/{name}": bundle.folder / name for name in (*bundle.manifest.files, MANIFEST)}
