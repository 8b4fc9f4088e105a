"""Describes the content of a bundle as plain values: components, shapes, sizes, operators and measurements."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import QUALITY_REPORT, files_of_graph, precision_report
from ldm_runtime.errors import ManifestError
from ldm_runtime.json_fields import read_object, require_integer, require_object
from ldm_runtime.manifest import Component, LoraFact

__all__ = ["inspect_bundle"]

MAX_REPORT = 64 * 2**20
"""Maximum size of a report in bytes, and largest count in it."""


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """Return the facts of a bundle as JSON values. Operators are counted if onnx is installed.

    Raises:
        ManifestError: A graph or a report is damaged.
    """
    manifest = bundle.manifest
    return {
        "family": manifest.family,
        "conditioning": [entry.kind for entry in manifest.conditioning],
        "guidance": list(manifest.guidance),
        "components": {name: _component(bundle, name, part) for name, part in manifest.components.items()},
        "scheduler": dict(manifest.scheduler),
        "request": dict(manifest.request),
        "measured": dict(manifest.measured),
        **({"quality": bundle.quality().to_json()} if QUALITY_REPORT in manifest.files else {}),
        **({"loras": {name: _lora(bundle, lora) for name, lora in manifest.loras.items()}} if manifest.loras else {}),
        "tools": dict(manifest.tools),
        "files": {name: fact.size for name, fact in manifest.files.items()},
    }


def _component(bundle: Bundle, name: str, component: Component) -> dict[str, Any]:
    graphs = {precision: _graph(bundle, name, precision) for precision in component.graphs}
    variants = {
        engine: {precision: _graph(bundle, name, precision, engine) for precision in precisions}
        for engine, precisions in component.variants.items()
    }
    engines = [{**engine.to_json(), "bytes": bundle.manifest.files[engine.file].size} for engine in component.engines]
    return {
        "runs": component.spec.runs,
        "inputs": [str(tensor) for tensor in component.spec.inputs],
        "outputs": [str(tensor) for tensor in component.spec.outputs],
        "graphs": graphs,
        **({"variants": variants} if variants else {}),
        **({"engines": engines} if engines else {}),
    }


def _lora(bundle: Bundle, lora: LoraFact) -> dict[str, Any]:
    return {**asdict(lora), "layers": dict(lora.layers), "bytes": bundle.manifest.files[lora.file].size}


def _graph(bundle: Bundle, name: str, precision: str, variant: str = "") -> dict[str, Any]:
    files = bundle.manifest.files
    file = str(bundle.manifest.components[name].graph(precision, variant))
    facts: dict[str, Any] = {"file": file, "bytes": sum(files[part].size for part in files_of_graph(file, files))}
    if operators := _operators(bundle.graph(name, precision, variant)):
        facts["operators"] = operators
    if not variant and (report := precision_report(name, precision)) in files:
        facts["islands"] = _islands(bundle.file(report))
    return facts


def _islands(report: Path) -> dict[str, int]:
    """Count the nodes in lower precision, and the nodes in fp32 by reason."""
    facts = read_object(report, MAX_REPORT)
    islands = require_object(f"{report}: islands", facts.get("islands"))
    reasons = Counter(str(reason).partition(":")[0] for reason in islands.values())
    counts: dict[str, int] = {
        kind: require_integer(f"{report}: {kind}", facts[kind], 0, MAX_REPORT)
        for kind in ("half", "int8")
        if kind in facts
    }
    return {**counts, **reasons}


def _operators(graph: Path) -> dict[str, int] | None:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError:
        return None
    try:
        model = onnx.load(str(graph), load_external_data=False)
        return dict(Counter(node.op_type for node in model.graph.node).most_common())
    except (DecodeError, ValueError) as error:  # ValueError: a text that is not UTF-8
        raise ManifestError(f"{graph}: no ONNX graph ({error}); rebuild the bundle") from None
