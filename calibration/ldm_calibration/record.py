"""The calibration record: settings, ranges and decisions. With the fp32 graphs it determines the int8 graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_calibration.layers import Layer
from ldm_calibration.qdq import QuantizedTensors, Scaling
from ldm_calibration.scalings import GraphScalings
from ldm_runtime.errors import ManifestError
from ldm_runtime.json_fields import require_map, require_object, require_str
from ldm_runtime.number_checks import shown
from ldm_runtime.regular_files import read_regular

__all__ = ["ComponentRecord", "Record", "component_json", "layer_json", "make_record", "read_record"]

FORMAT, VERSION = "ldm-export calibration", 2
MAX_BYTES = 256 * 2**20
MAX_CHANNELS = 1_000_000
MIN_MAGNITUDE, MAX_MAGNITUDE = 1e-30, 1e30
"""Bounds of thresholds and factors, so that scales and their products with weights are normal float32 numbers."""
_SETTINGS = ("trial_steps", "eta", "guidance_scale", "min_psnr", "max_accuracy_loss")
_RANGES = ("component", "timesteps", "tensors")
_IMAGE = ("request", "seed", "psnr", "ssim", "correct_fp32", "correct_int8")


@dataclass(frozen=True)
class ComponentRecord:
    """Decisions for one component.

    Attributes:
        graph: Digest of its fp32 graph, as ``graph_files.graph_digest`` returns it.
        tensors: Scalings of its tensors.
        layers: Facts of every layer as JSON values, as in the int8 report.
        why: Reason why the whole component stays in fp32; empty if it is quantized.
    """

    graph: str
    tensors: QuantizedTensors
    layers: tuple[Mapping[str, Any], ...]
    why: str

    @property
    def chosen(self) -> list[str]:
        """Names of the layers that are int8."""
        return [layer["name"] for layer in self.layers if layer["int8"]]

    @property
    def flops(self) -> int:
        """Operations of one row."""
        return sum(layer["flops"] for layer in self.layers)

    @property
    def int8_share(self) -> float:
        """Share of the operations that are int8."""
        return float(sum(layer["flops"] for layer in self.layers if layer["int8"]) / max(self.flops, 1))


@dataclass(frozen=True)
class Record:
    """A calibration record.

    Attributes:
        document: The whole record as JSON.
        components: Decisions for each component that has candidate layers.
    """

    document: Mapping[str, Any]
    components: Mapping[str, ComponentRecord]

    @property
    def denoiser(self) -> str:
        """Name of the component whose ranges are recorded."""
        return str(self.document["ranges"]["component"])

    def to_json(self) -> str:
        """Return canonical text: equal records give equal bytes."""
        return json.dumps(self.document, sort_keys=True, indent=1, allow_nan=False) + "\n"


def component_json(graph: str, scalings: GraphScalings, layers: list[dict[str, Any]], why: str) -> dict[str, Any]:
    """Return the entry of one component in the record."""
    facts = scalings.to_json()
    return {"graph": graph, "sources": facts["sources"], "results": facts["results"], "layers": layers, "why": why}


def layer_json(layer: Layer, scalings: GraphScalings, latent_db: float | None, why: str) -> dict[str, Any]:
    """Return the entry of one layer in record and report. The layer is int8 if ``why`` is empty."""
    source = None if layer.float_only else scalings.sources.get(layer.source)
    return {
        "name": layer.name,
        "op": layer.op,
        "flops": scalings.flops[layer.name],
        "int8": not why,
        "why": why,
        "smoothing": source.exponent if source else 0.0,
        "output_db": scalings.output_db.get(layer.name),
        "latent_db": latent_db,
    }


def make_record(
    settings: Mapping[str, Any],
    components: Mapping[str, Any],
    images: list[dict[str, Any]],
    ranges: Mapping[str, Any],
) -> Record:
    """Create a record from the JSON forms of its parts."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "settings": dict(settings),
        "components": dict(components),
        "images": images,
        "ranges": dict(ranges),
    }
    return _parse(json.loads(json.dumps(document)))


def read_record(file: Path) -> Record:
    """Read a record. Its content is untrusted, so every used field is checked.

    Raises:
        ManifestError: The file is too large or is not a record, or a field has another type.
    """
    try:
        document = json.loads(read_regular(file, MAX_BYTES, ManifestError).decode())
        json.dumps(document, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{file}: not a calibration record ({error}); calibrate again") from None
    try:
        return _parse(document)
    except ManifestError as error:
        raise ManifestError(f"{file}: {error}") from None


def _parse(document: Any) -> Record:
    top = require_object("record", document)
    if (top.get("format"), top.get("version")) != (FORMAT, VERSION):
        raise ManifestError(
            f"got format {top.get('format')!r:.40} version {top.get('version')!r:.20}, expected {FORMAT!r} {VERSION}; "
            "calibrate again"
        )
    settings, ranges = require_object("settings", top.get("settings")), require_object("ranges", top.get("ranges"))
    images = top.get("images")
    if not isinstance(images, list) or not images or not all(_is_image(image) for image in images):
        raise ManifestError("images: expected a list of trial images; calibrate again")
    if not all(_is_number(settings.get(name)) for name in _SETTINGS) or not set(_SETTINGS) <= settings.keys():
        raise ManifestError(f"settings: expected numbers for {', '.join(_SETTINGS)}; calibrate again")
    if set(_RANGES) != ranges.keys() or not isinstance(ranges["component"], str):
        raise ManifestError(f"ranges: expected {', '.join(_RANGES)}; calibrate again")
    components = require_map("components", top.get("components"), _component)
    if ranges["component"] not in components:
        raise ManifestError(f"components: {ranges['component']!r:.60} is missing; calibrate again")
    return Record(top, components)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_image(image: Any) -> bool:
    if not isinstance(image, dict) or set(image) != set(_IMAGE):
        return False
    return (
        isinstance(image["request"], dict)
        and type(image["seed"]) is int
        and _is_number(image["psnr"])
        and image["ssim"] is not None
        and _is_number(image["ssim"])
        and all(isinstance(image[name], bool | type(None)) for name in ("correct_fp32", "correct_int8"))
    )


def _component(where: str, value: Any) -> ComponentRecord:
    entry = require_object(where, value)
    layers = entry.get("layers")
    if not isinstance(layers, list) or not all(_is_layer(layer) for layer in layers):
        raise ManifestError(f"{where}.layers: expected a list of layers; calibrate again")
    return ComponentRecord(
        require_str(f"{where}.graph", entry.get("graph")),
        QuantizedTensors(
            require_map(f"{where}.sources", entry.get("sources"), _scaling),
            require_map(f"{where}.results", entry.get("results"), _scaling),
        ),
        tuple(layers),
        require_str(f"{where}.why", entry.get("why")),
    )


def _is_layer(layer: Any) -> bool:
    return (
        isinstance(layer, dict)
        and isinstance(layer.get("name"), str)
        and type(layer.get("flops")) is int
        and type(layer.get("int8")) is bool
        and isinstance(layer.get("why"), str)
    )


def _scaling(where: str, value: Any) -> Scaling:
    entry = require_object(where, value)
    threshold, factors = _magnitude(f"{where}.threshold", entry.get("threshold")), entry.get("factors")
    if factors is None:
        return Scaling(threshold)
    if not isinstance(factors, list) or len(factors) > MAX_CHANNELS:
        raise ManifestError(f"{where}.factors: expected a list of numbers; calibrate again")
    return Scaling(threshold, np.array([_magnitude(f"{where}.factors", factor) for factor in factors], np.float32))


def _magnitude(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not MIN_MAGNITUDE <= value <= MAX_MAGNITUDE:
        expected = f"a number from {MIN_MAGNITUDE:g} to {MAX_MAGNITUDE:g}"
        raise ManifestError(f"{where}: got {shown(value)}, expected {expected}; calibrate again")
    return float(value)
