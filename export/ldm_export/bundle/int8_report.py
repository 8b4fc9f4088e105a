"""Writes the int8 report of a bundle: quality of the trial images, sizes, and speed of the UNet on this machine."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_calibration.quality import mean_psnr
from ldm_calibration.record import ComponentRecord, Record, read_record
from ldm_runtime.backends.host import usable_cores
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import CALIBRATION_RECORD, INT8_REPORT, files_of_graph
from ldm_runtime.json_fields import read_object
from ldm_runtime.model import SAMPLE, UNET
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.request import Request

__all__ = ["FEW_IMAGES", "write_report"]

FORMAT, VERSION = "ldm-export int8 report", 2
MAX_REPORT = 64 * 2**20
"""Maximum size of a report in bytes."""
ROUNDS = 7
"""Number of timed calls of each UNet. Calls of both precisions alternate, after an untimed call of each."""
FEW_IMAGES = 8
"""Number of trial images below which a warning is printed."""


def write_report(bundle: Bundle) -> tuple[Bundle, dict[str, Any]]:
    """Time the bundle's UNets, write the int8 report and a summary of it in the manifest, and return both.

    An existing report for the same calibration record is kept.

    Raises:
        ManifestError: A file of the bundle is damaged.
        OSError: A file cannot be written; the bundle is unchanged.
    """
    file = bundle.file(CALIBRATION_RECORD)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    before = bundle.manifest.measured.get("int8")
    if isinstance(before, dict) and before.get("record") == digest and INT8_REPORT in bundle.manifest.files:
        return bundle, read_object(bundle.file(INT8_REPORT), MAX_REPORT)
    record = read_record(file)
    settings, images = record.document["settings"], record.document["images"]
    components = {name: _component(bundle, name, part, record) for name, part in record.components.items()}
    defaults = bundle.manifest.defaults
    summary = _summary(bundle, record, components)
    report = {
        "format": FORMAT,
        "version": VERSION,
        "record": {"file": CALIBRATION_RECORD, "sha256": digest},
        "settings": {
            "images": len(images),
            "steps": _or(settings["trial_steps"], defaults.num_inference_steps),
            "eta": _or(settings["eta"], defaults.eta),
            "guidance_scale": _or(settings["guidance_scale"], defaults.guidance_scale),
            "backend": "onnxruntime",
        },
        "budget": _budget(settings, summary, len(images)),
        "warnings": _warnings(len(images)),
        "summary": summary,
        "images": images,
        "components": components,
        "speed": _speed(bundle, images[0]["request"]),
    }
    text = (json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    facts = {"record": digest, **summary, "speed": report["speed"], "budget": report["budget"]}
    return bundle.with_measured({"int8": facts}, {INT8_REPORT: text}), report


def _component(bundle: Bundle, name: str, part: ComponentRecord, record: Record) -> dict[str, Any]:
    return {
        "quantized": bool(part.chosen),
        "why": part.why,
        "flops": part.flops,
        "int8_share": part.int8_share,
        "bytes_fp32": _bytes(bundle, [name], "fp32"),
        "bytes_int8": _bytes(bundle, [name], "int8"),
        "layers": list(part.layers),
        "ranges": record.document["ranges"] if name == record.denoiser else None,
    }


def _bytes(bundle: Bundle, components: Sequence[str], precision: str) -> int:
    """Size of the graphs of components. Components that share weights, as the UNet and its shallow part, count once."""
    files = bundle.manifest.files
    graphs = (bundle.manifest.components[component].graphs[precision] for component in components)
    return sum(files[name].size for name in {name for graph in graphs for name in files_of_graph(graph, files)})


def _summary(bundle: Bundle, record: Record, components: Mapping[str, Any]) -> dict[str, Any]:
    images = record.document["images"]
    finite = [image["psnr"] for image in images if image["psnr"] is not None]
    shares = {}
    for name in ("correct_fp32", "correct_int8"):
        marks = [image[name] for image in images]
        shares[name] = None if None in marks else sum(marks) / len(marks)
    served = [name for name, part in bundle.manifest.components.items() if {"fp32", "int8"} <= part.graphs.keys()]
    return {
        "psnr_mean": mean_psnr([image["psnr"] for image in images]),
        "psnr_worst": min(finite, default=None),
        "ssim_mean": float(np.mean([image["ssim"] for image in images])),
        "ssim_worst": min(image["ssim"] for image in images),
        **shares,
        "bytes_fp32": _bytes(bundle, served, "fp32"),
        "bytes_int8": _bytes(bundle, served, "int8"),
        "unet_int8_share": components[record.denoiser]["int8_share"],
    }


def _budget(settings: Mapping[str, Any], summary: Mapping[str, Any], images: int) -> dict[str, Any]:
    """Return the bounds, whether the trial images satisfy them, and a sentence with the verdict."""
    sample = f"{images} image{'' if images == 1 else 's'}"
    least, loss = settings["min_psnr"], settings["max_accuracy_loss"]
    met, verdicts = True, []
    if least is not None:
        met = summary["psnr_mean"] >= least
        verdicts.append(f"at least {least:g} dB on {sample}, mean {summary['psnr_mean']:.1f}")
    if loss is not None:
        graded = None not in (summary["correct_fp32"], summary["correct_int8"])
        lost = summary["correct_fp32"] - summary["correct_int8"] if graded else None
        met = met and lost is not None and lost <= loss
        measured = "not graded" if lost is None else f"lost {max(lost, 0):.1%}"
        verdicts.append(f"at most {loss:.1%} of prompt accuracy lost on {sample}, {measured}")
    verdict = "; ".join(verdicts) or f"no bound; mean {summary['psnr_mean']:.1f} dB on {sample}"
    return {"min_psnr": least, "max_accuracy_loss": loss, "met": met, "verdict": verdict}


def _warnings(images: int) -> list[str]:
    if images >= FEW_IMAGES:
        return []
    return [
        f"the budget was checked on only {images} trial image{'' if images == 1 else 's'}; "
        f"give at least {FEW_IMAGES} prompts or --trials {FEW_IMAGES} for a reliable mean"
    ]


def _speed(bundle: Bundle, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the median milliseconds of one UNet call for one image: fp32 and int8 alternate on the selected engine.

    The inputs are those of the first denoising step of a trial request, with example values instead of input files.
    """
    with LatentDiffusionPipeline.from_bundle(bundle, precision="int8", device="cpu") as int8:
        engine = "onnxruntime" if int8.choice is None else int8.choice.backend
        with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend=engine, device="cpu") as fp32:
            plain = {name: value for name, value in fields.items() if not isinstance(value, dict)}  # no input files
            feed = _first_feed(fp32, Request(**{**fp32.example(plain), **plain, "seed": 0}))
            medians = _alternating({"fp32": fp32, "int8": int8}, feed)
    return {
        "backend": engine,
        "threads": usable_cores(),
        "batch": len(feed[SAMPLE]),
        "unet_ms": medians,
        "ratio": medians["fp32"] / medians["int8"],
    }


def _first_feed(pipeline: LatentDiffusionPipeline, request: Request) -> dict[str, NDArray[Any]]:
    """Return the UNet's inputs at the first step of a request for all guidance branches, and free the encoders."""
    plan = pipeline.plan(request)
    start = pipeline.begin(plan)
    conditioning = pipeline.condition(plan, start)
    for conditioner in pipeline.conditioners:
        conditioner.close()
    schedule = pipeline.denoiser.embed(plan.trajectory.timesteps)
    sample = start.latents * plan.trajectory.input_scale[0]
    rows = np.concatenate([sample.astype(np.float32)] * len(plan.branches))
    return {
        SAMPLE: rows,
        **{name: np.repeat(array[:1], len(rows), 0) for name, array in schedule.items()},
        **conditioning,
    }


def _alternating(pipelines: Mapping[str, LatentDiffusionPipeline], feed: dict[str, NDArray[Any]]) -> dict[str, float]:
    units = {precision: pipeline.backends[UNET] for precision, pipeline in pipelines.items()}
    times: dict[str, list[float]] = {precision: [] for precision in units}
    for unit in units.values():
        unit.run(feed)
    for _ in range(ROUNDS):
        for precision, unit in units.items():
            begun = time.perf_counter()
            unit.run(feed)
            times[precision].append(1000 * (time.perf_counter() - begun))
    return {precision: statistics.median(seconds) for precision, seconds in times.items()}


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
