"""The calibration record: what was run, seen and decided; with the fp32 graphs it gives the int8 ones exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_calibration.choices import Choices
from ldm_calibration.layers import Layer
from ldm_calibration.qdq import Scaling
from ldm_calibration.sessions import files_of
from ldm_calibration.settings import Settings
from ldm_runtime.bundle import sha256
from ldm_runtime.errors import ManifestError
from ldm_runtime.json_fields import each, mapping, text

FORMAT, VERSION = "ldm-export calibration", 2
MAX_BYTES = 256 * 2**20
MAX_CHANNELS = 1_000_000
_SETTINGS = ("trial_steps", "eta", "guidance_scale", "min_psnr", "max_accuracy_loss")
_RANGES = ("timesteps", "tensors")
_PICTURE = ("prompt", "seed", "psnr", "ssim", "correct_fp32", "correct_int8")


@dataclass(frozen=True)
class ComponentRecord:
    """What was decided for one component.

    Attributes:
        graph: SHA-256 of its fp32 graph.
        sources: tensor that layers read → its scaling.
        results: convolution's result → its scaling.
        layers: facts of every layer, JSON-able, as ``report/int8.json`` has them.
        why: why it stays in fp32 as a whole; empty where it does not.
    """

    graph: str
    sources: Mapping[str, Scaling]
    results: Mapping[str, Scaling]
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
        return sum(layer["flops"] for layer in self.layers if layer["int8"]) / max(self.flops, 1)


@dataclass(frozen=True)
class Record:
    """The whole record; ``document`` is its JSON, ``components`` what the graphs are made of."""

    document: Mapping[str, Any]
    components: Mapping[str, ComponentRecord]

    def to_json(self) -> str:
        """Canonical text: equal records give equal bytes."""
        return json.dumps(self.document, sort_keys=True, indent=1, allow_nan=False) + "\n"


def graph_digest(graph: Path) -> str:
    """SHA-256 of a graph and, where its weights lie in a file beside it, of that file behind it."""
    return "-".join(sha256(file) for file in files_of(graph))


def component_facts(graph: str, choices: Choices, layers: list[dict[str, Any]], why: str) -> dict[str, Any]:
    """One component as the record has it."""
    held = choices.facts()
    return {"graph": graph, "sources": held["sources"], "results": held["results"], "layers": layers, "why": why}


def layer_facts(layer: Layer, flops: int, choices: Choices, latent_db: float | None, why: str) -> dict[str, Any]:
    """One layer as record and report have it; it is int8 where ``why`` is empty."""
    choice = choices.sources.get(layer.source)
    return {
        "name": layer.name,
        "op": layer.op,
        "flops": flops,
        "int8": not why,
        "why": why,
        "observer": choice.observer if choice and not layer.float_only else None,
        "migration": choice.exponent if choice and not layer.float_only else 0.0,
        "output_db": choices.output_db.get(layer.name),
        "latent_db": latent_db,
    }


def make_record(
    settings: Settings, components: Mapping[str, Any], pictures: list[dict[str, Any]], ranges: Mapping[str, Any]
) -> Record:
    """A record of what was found."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "settings": asdict(settings),
        "components": dict(components),
        "pictures": pictures,
        "ranges": dict(ranges),
    }
    return read_document(json.loads(json.dumps(document)))


def read_record(file: Path) -> Record:
    """Read a record, which may come from a stranger.

    Raises:
        ManifestError: too large, no record, or a field of it is not what it should be.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ManifestError(f"{file}: {file.stat().st_size} bytes, expected at most {MAX_BYTES}; calibrate anew")
        document = json.loads(file.read_bytes().decode())
        json.dumps(document, allow_nan=False)
    except OSError as error:
        raise ManifestError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{file}: no calibration record ({error}); calibrate anew") from None
    try:
        return read_document(document)
    except ManifestError as error:
        raise ManifestError(f"{file}: {error}") from None


def read_document(document: Any) -> Record:
    """A record from its JSON."""
    top = mapping("record", document)
    if (top.get("format"), top.get("version")) != (FORMAT, VERSION):
        raise ManifestError(
            f"got format {top.get('format')!r:.40} version {top.get('version')!r:.20}, expected {FORMAT!r} {VERSION}; "
            "calibrate anew"
        )
    settings, ranges = mapping("settings", top.get("settings")), mapping("ranges", top.get("ranges"))
    pictures = top.get("pictures")
    whole = isinstance(pictures, list) and pictures and all(_is_picture(picture) for picture in pictures)
    if not whole or not set(_SETTINGS) <= settings.keys() or set(_RANGES) != ranges.keys():
        raise ManifestError("settings, ranges or pictures: not as a calibration writes them; calibrate anew")
    return Record(top, each("components", top.get("components"), _component))


def _is_picture(picture: Any) -> bool:
    if not isinstance(picture, dict) or set(picture) != set(_PICTURE):
        return False
    number, marks = (int, float, type(None)), (picture["correct_fp32"], picture["correct_int8"])
    return (
        isinstance(picture["prompt"], str)
        and isinstance(picture["psnr"], number)
        and isinstance(picture["ssim"], int | float)
        and all(isinstance(mark, bool | type(None)) for mark in marks)
    )


def _component(where: str, value: Any) -> ComponentRecord:
    held = mapping(where, value)
    layers = held.get("layers")
    if not isinstance(layers, list) or not all(_is_layer(layer) for layer in layers):
        raise ManifestError(f"{where}.layers: expected a list of layers; calibrate anew")
    return ComponentRecord(
        text(f"{where}.graph", held.get("graph")),
        each(f"{where}.sources", held.get("sources"), _scaling),
        each(f"{where}.results", held.get("results"), _scaling),
        tuple(layers),
        text(f"{where}.why", held.get("why")),
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
    held = mapping(where, value)
    factors = held.get("factors")
    if factors is None:
        return Scaling(_magnitude(f"{where}.threshold", held.get("threshold")))
    if not isinstance(factors, list) or len(factors) > MAX_CHANNELS:
        raise ManifestError(f"{where}.factors: expected a list of numbers; calibrate anew")
    found = [_magnitude(f"{where}.factors", factor) for factor in factors]
    return Scaling(_magnitude(f"{where}.threshold", held.get("threshold")), np.array(found, np.float32))


def _magnitude(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise ManifestError(f"{where}: got {value!r:.40}, expected a number above 0; calibrate anew")
    return float(value)
