"""What int8 costs and gains, written into the bundle: the record's figures, sizes, and the speed on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_calibration.quality import mean_psnr
from ldm_calibration.record import ComponentRecord, read_record
from ldm_export.bundle.int8_stages import RECORD
from ldm_runtime.backends.factory import backend_factory
from ldm_runtime.backends.selection import choose
from ldm_runtime.bundle import Bundle
from ldm_runtime.specs import dummy_inputs

REPORT = "report/int8.json"
FORMAT, VERSION = "ldm-export int8 report", 2
ROUNDS = 7
"""Calls of each UNet that are timed, by turns, after one that is not."""


def write_report(bundle: Bundle) -> tuple[Bundle, dict[str, Any]]:
    """Time the bundle's UNets, and write ``report/int8.json`` and its summary into the manifest; gives both.

    A report of this very record is kept as it is.

    Raises:
        ManifestError: a file is not what was built.
        OSError: the disk refuses; the bundle is as before.
    """
    file = bundle.file(RECORD)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    held = bundle.manifest.measured.get("int8")
    if isinstance(held, dict) and held.get("record") == digest and REPORT in bundle.manifest.files:
        return bundle, json.loads(bundle.file(REPORT).read_text())
    record = read_record(file)
    settings, pictures = record.document["settings"], record.document["pictures"]
    components = {
        name: _component(bundle, name, part, record.document["ranges"] if name == "unet" else None)
        for name, part in record.components.items()
    }
    report = {
        "format": FORMAT,
        "version": VERSION,
        "record": {"file": RECORD, "sha256": digest},
        "settings": {
            "prompts": len(pictures),
            "steps": settings["trial_steps"],
            "eta": settings["eta"],
            "guidance_scale": settings["guidance_scale"],
            "backend": "onnxruntime",
        },
        "budget": {
            "min_psnr": settings["min_psnr"],
            "max_accuracy_loss": settings["max_accuracy_loss"],
            "met": True,
        },
        "summary": _summary(pictures, components),
        "pictures": pictures,
        "components": components,
        "speed": _speed(bundle),
    }
    text = (json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    told = {"record": digest, **report["summary"], "speed": report["speed"], "budget": report["budget"]}
    return bundle.with_measured({"int8": told}, {REPORT: text}), report


def _component(bundle: Bundle, name: str, part: ComponentRecord, ranges: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "quantized": bool(part.chosen),
        "why": part.why,
        "flops": part.flops,
        "int8_share": part.int8_share,
        "bytes_fp32": _bytes(bundle, name, "fp32"),
        "bytes_int8": _bytes(bundle, name, "int8"),
        "layers": list(part.layers),
        "ranges": ranges,
    }


def _bytes(bundle: Bundle, component: str, precision: str) -> int:
    graph, files = bundle.manifest.components[component].graphs[precision], bundle.manifest.files
    return sum(files[name].size for name in (graph, f"{graph}.data") if name in files)


def _summary(pictures: list[dict[str, Any]], components: Mapping[str, Any]) -> dict[str, Any]:
    finite = [picture["psnr"] for picture in pictures if picture["psnr"] is not None]
    shares = {}
    for side in ("fp32", "int8"):
        marks = [picture[f"correct_{side}"] for picture in pictures]
        shares[f"correct_{side}"] = None if None in marks else sum(marks) / len(marks)
    return {
        "psnr_mean": mean_psnr([picture["psnr"] for picture in pictures]),
        "psnr_worst": min(finite, default=None),
        "ssim_mean": float(np.mean([picture["ssim"] for picture in pictures])),
        "ssim_worst": min(picture["ssim"] for picture in pictures),
        **shares,
        "bytes_fp32": sum(part["bytes_fp32"] for part in components.values()),
        "bytes_int8": sum(part["bytes_int8"] for part in components.values()),
        "unet_int8_share": components["unet"]["int8_share"],
    }


def _speed(bundle: Bundle) -> dict[str, Any]:
    """Medians of one UNet call of one guided picture, fp32 and int8 by turns, on the engine that is chosen here."""
    chosen = choose(bundle, "auto", "int8", "cpu")
    float_choice = choose(bundle, chosen.backend, "fp32", "cpu")
    spec = bundle.manifest.components["unet"].spec
    feed = dummy_inputs(spec)
    feed = {name: np.resize(array, (2, *array.shape[1:])) for name, array in feed.items()}
    units = {
        given: backend_factory(bundle, "unet", choice)() for given, choice in (("fp32", float_choice), ("int8", chosen))
    }
    times: dict[str, list[float]] = {given: [] for given in units}
    for unit in units.values():
        unit.run(feed)
    for _ in range(ROUNDS):
        for given, unit in units.items():
            begun = time.perf_counter()
            unit.run(feed)
            times[given].append(1000 * (time.perf_counter() - begun))
    for unit in units.values():
        unit.close()
    medians = {given: statistics.median(taken) for given, taken in times.items()}
    return {
        "backend": chosen.backend,
        "threads": len(os.sched_getaffinity(0)),
        "batch": 2,
        "unet_ms": medians,
        "ratio": medians["fp32"] / medians["int8"],
    }
