"""The models of a Triton repository: what each one's folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_export.serving.config import Serving, component_config, front_config, plan_name, room_config
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BuildError
from ldm_runtime.manifest import COMPONENTS, NAME
from ldm_runtime.triton.parameters import BUNDLE

MODELS = (*COMPONENTS, "ldm_stream", "ldm")
"""In the order in which they are put in place: `ldm` asks `ldm_stream`."""
CODE = '''"""Written by `ldm-export triton`. Triton's python backend needs the package ldm-export for it."""

import triton_python_backend_utils as pb_utils
from ldm_runtime.triton.{module} import {name}


class TritonPythonModel({name}):
    pb = pb_utils
'''


@dataclass(frozen=True)
class Model:
    """One model: its name and config, and what a version of it holds: path → text, or file to link."""

    name: str
    config: Mapping[str, Any]
    files: Mapping[str, str | Path]


def make_model(bundle: Bundle, serving: Serving, name: str) -> Model:
    """The model of that name; the bundle's files have been checked.

    Raises:
        ManifestError: it has no graph of that precision.
        BuildError: the bundle has no engine that Triton itself loads.
    """
    if name == "ldm":
        return Model(name, front_config(serving), {"model.py": CODE.format(module="unary", name="UnaryModel")})
    if name == "ldm_stream":
        code = CODE.format(module="decoupled", name="DecoupledModel")
        return Model(name, room_config(serving), {"model.py": code, **_bundled(bundle)})
    spec, precision = bundle.manifest.components[name].spec, serving.settings.precision
    if serving.target == "onnxruntime":
        graph = bundle.manifest.components[name].graphs.get(precision, "")
        files: dict[str, str | Path] = {"model.onnx": bundle.graph(name, precision)}
        if (weights := f"{graph}.data") in bundle.manifest.files:
            files[Path(weights).name] = bundle.folder / weights  # the name by which the graph knows it
        return Model(name, component_config(spec, serving), files)
    if serving.target == "tensorrt":
        engines = [
            engine
            for engine in bundle.manifest.components[name].engines
            if engine.package == "tensorrt" and engine.precision == precision
        ]
        if not engines:
            raise BuildError(
                f"{bundle.folder}: {name} has no {precision} engine of TensorRT, the only kind that Triton loads "
                f"itself; build one with `ldm-export build --precision {precision} --target tensorrt`, or take "
                "--target python"
            )
        plans = {plan_name(engine): bundle.folder / engine.file for engine in engines}
        return Model(name, component_config(spec, serving, engines), plans)
    code = CODE.format(module="component_model", name="ComponentModel")
    return Model(name, component_config(spec, serving), {"model.py": code, **_bundled(bundle)})


def _bundled(bundle: Bundle) -> dict[str, Path]:
    """All of the bundle: which of its graphs run is decided where they are served."""
    return {f"{BUNDLE}/{name}": bundle.folder / name for name in (*bundle.manifest.files, NAME)}
