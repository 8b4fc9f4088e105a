"""The report of a calibrated bundle agrees with its record, its images and torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ldm_calibration.graph_files import load_graph
from ldm_calibration.layers import find_layers
from ldm_calibration.observation import graph_flops
from ldm_calibration.quality import image_psnr
from ldm_export.families import open_checkpoint
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import CALIBRATION_RECORD
from ldm_runtime.specs import dummy_inputs
from tests.support.tiny_int8 import part


def test_the_report_says_what_the_record_says(calibrated: Bundle) -> None:
    report = json.loads(calibrated.file("report/int8.json").read_text())
    assert report["record"]["sha256"] == calibrated.manifest.files[CALIBRATION_RECORD].sha256
    for name, reported in report["components"].items():
        facts = part(calibrated, name)
        work = {layer["name"]: layer["flops"] for layer in reported["layers"]}
        assert list(work) == [layer.name for layer in find_layers(load_graph(calibrated.graph(name, "fp32")).graph)]
        assert reported["int8_share"] == pytest.approx(sum(work[layer] for layer in facts.chosen) / sum(work.values()))
        assert reported["bytes_int8"] < reported["bytes_fp32"]
    unet = report["components"]["unet"]
    assert unet["int8_share"] > 0.8 and unet["bytes_int8"] < 0.7 * unet["bytes_fp32"]
    assert report["summary"]["psnr_mean"] >= 15 and report["speed"]["unet_ms"]["int8"] > 0
    both = [one.graphs for one in calibrated.manifest.components.values() if {"fp32", "int8"} <= one.graphs.keys()]
    for precision in ("fp32", "int8"):  # components that share weights count once
        files = {calibrated.folder / f"{one[precision]}{end}" for one in both for end in ("", ".data")}
        sizes = sum(file.stat().st_size for file in files if file.exists())
        assert report["summary"][f"bytes_{precision}"] == sizes
    assert calibrated.manifest.measured["int8"]["unet_int8_share"] == report["components"]["unet"]["int8_share"]


def test_the_images_are_those_of_the_pipeline(calibrated: Bundle) -> None:
    """The figures come from trials; generated again from the finished bundle, the first image has the same PSNR."""
    output = json.loads(calibrated.file("report/int8.json").read_text())["images"][0]
    options = {"seed": [output["seed"]], "eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 3}
    all_images = []
    for precision in ("fp32", "int8"):
        with LatentDiffusionPipeline.from_bundle(calibrated, precision=precision, backend="onnxruntime") as pipeline:
            all_images.append(np.asarray(pipeline([output["request"]["prompts"]], **options).images[0]))
    assert image_psnr(*all_images) == pytest.approx(output["psnr"], abs=1.5)


def test_flops_are_those_of_torch(tiny_checkpoint: Path, calibrated: Bundle) -> None:
    """The components of the split UNet together have the operations of the whole one."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from ldm_export.checkpoint.modules import load_module

    ours, feeds = 0, {}
    for name in ("cross_attention_kv", "time_embedding", "unet"):
        spec = calibrated.manifest.components[name].spec
        feeds[name] = {tensor: array[:1] for tensor, array in dummy_inputs(spec).items()}
        ours += sum(graph_flops(calibrated.graph(name, "fp32"), feeds[name]).values())
    assert part(calibrated, "unet").flops < ours
    module = load_module(open_checkpoint(tiny_checkpoint), "unet")
    inputs = [feeds["unet"]["sample"], feeds["time_embedding"]["timestep"], feeds["cross_attention_kv"]["context"]]
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(*map(torch.from_numpy, inputs))
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)
