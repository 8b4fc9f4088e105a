"""What is in a bundle, as plain values: components, shapes, sizes, operators, and what was measured."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import ManifestError
from ldm_runtime.manifest import COMPONENTS


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """JSON-able facts of a bundle. Operators are counted where onnx is installed.

    Raises:
        ManifestError: a graph is not the one that was built.
    """
    manifest = bundle.manifest
    components: dict[str, dict[str, Any]] = {}
    for name in COMPONENTS:
        component, graphs = manifest.components[name], {}
        for precision, graph in component.graphs.items():
            files = [file for file in manifest.files if file in (graph, f"{graph}.data")]
            size = sum(manifest.files[file].size for file in files)
            operators = _operators(bundle.graph(name, precision))
            graphs[precision] = {"file": graph, "bytes": size} | ({"operators": operators} if operators else {})
            if (report := f"report/{name}.{precision}.json") in manifest.files:
                graphs[precision]["islands"] = _islands(bundle.file(report))
        components[name] = {
            "inputs": [str(tensor) for tensor in component.spec.inputs],
            "outputs": [str(tensor) for tensor in component.spec.outputs],
            "graphs": graphs,
        }
        if component.engines:
            components[name]["engines"] = [
                {**engine.to_json(), "bytes": manifest.files[engine.file].size} for engine in component.engines
            ]
    return {
        "components": components,
        "scheduler": dict(manifest.scheduler),
        "asked": dict(manifest.asked),
        "measured": dict(manifest.measured),
        "tools": dict(manifest.tools),
        "files": {name: fact.size for name, fact in manifest.files.items()},
    }


def _islands(report: Path) -> dict[str, int]:
    """How many nodes compute in lower precision, and how many stay in fp32 for which reason."""
    facts = json.loads(report.read_text())
    reasons = Counter(str(reason).partition(":")[0] for reason in facts["islands"].values())
    return {**{kind: facts[kind] for kind in ("half", "int8") if kind in facts}, **reasons}


def _operators(graph: Path) -> dict[str, int] | None:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError:
        return None
    try:
        model = onnx.load(str(graph), load_external_data=False)
    except DecodeError as error:
        raise ManifestError(f"{graph}: no ONNX graph ({error}); rebuild the bundle") from None
    return dict(Counter(node.op_type for node in model.graph.node).most_common())
