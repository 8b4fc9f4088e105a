"""The record and the report of a calibrated bundle: what they say is so, and a damaged one is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ldm_calibration.layers import find_layers
from ldm_calibration.quality import psnr
from ldm_calibration.record import read_record
from ldm_calibration.sessions import load_graph
from ldm_export.bundle.int8_stages import RECORD
from ldm_export.families import open_checkpoint
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import LdmError, ManifestError
from ldm_runtime.specs import dummy_inputs
from tests.support.tiny_int8 import part


def test_the_report_says_what_the_record_says(calibrated: Bundle) -> None:
    report = json.loads(calibrated.file("report/int8.json").read_text())
    assert report["record"]["sha256"] == calibrated.manifest.files[RECORD].sha256
    for name, held in report["components"].items():
        facts = part(calibrated, name)
        work = {layer["name"]: layer["flops"] for layer in held["layers"]}
        assert list(work) == [layer.name for layer in find_layers(load_graph(calibrated.graph(name, "fp32")).graph)]
        assert held["int8_share"] == pytest.approx(sum(work[layer] for layer in facts.chosen) / sum(work.values()))
        assert held["bytes_int8"] < held["bytes_fp32"]
    unet = report["components"]["unet"]
    assert unet["int8_share"] > 0.8 and unet["bytes_int8"] < 0.7 * unet["bytes_fp32"]
    assert report["summary"]["psnr_mean"] >= 15 and report["speed"]["unet_ms"]["int8"] > 0
    assert calibrated.manifest.measured["int8"]["unet_int8_share"] == report["components"]["unet"]["int8_share"]


def test_the_pictures_are_those_the_pipeline_draws(calibrated: Bundle) -> None:
    """The figures come of trials; drawn again from the finished bundle, the first picture has the same PSNR."""
    told = json.loads(calibrated.file("report/int8.json").read_text())["pictures"][0]
    options = {"seed": [told["seed"]], "eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 3}
    pictures = []
    for precision in ("fp32", "int8"):
        with LatentDiffusionPipeline.from_bundle(calibrated, precision=precision, backend="onnxruntime") as pipeline:
            pictures.append(np.asarray(pipeline([told["prompt"]], **options).images[0]))
    assert psnr(*pictures) == pytest.approx(told["psnr"], abs=1.5)


def test_flops_are_those_of_torch(tiny_checkpoint: Path, calibrated: Bundle) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from ldm_export.checkpoint.modules import load_module
    from ldm_export.graph.wrappers import UNet

    spec = calibrated.manifest.components["unet"].spec
    module = UNet(load_module(open_checkpoint(tiny_checkpoint), "unet")).eval()
    feed = {name: array[:1] for name, array in dummy_inputs(spec).items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(*(torch.from_numpy(array) for array in feed.values()))
    assert part(calibrated, "unet").flops == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(format="other"),
        lambda d: d.update(version=2),
        lambda d: d["components"]["unet"].update(layers=[{"name": 1}]),
        lambda d: next(iter(d["components"]["unet"]["sources"].values())).update(threshold=-1),
        lambda d: next(iter(d["components"]["unet"]["sources"].values())).update(factors=["x"]),
        lambda d: d["components"]["unet"].update(results=[]),
        lambda d: d.update(components=None),
        lambda d: d.update(pictures=[{"prompt": 1}]),
        lambda d: d.update(settings={}),
    ],
)
def test_a_damaged_record_is_told_in_one_line(
    calibrated: Bundle, tmp_path: Path, damage: Callable[[dict], None]
) -> None:
    document = json.loads(calibrated.file(RECORD).read_text())
    damage(document)
    (tmp_path / "record.json").write_text(json.dumps(document))
    with pytest.raises(ManifestError, match=r"record\.json: ") as caught:
        read_record(tmp_path / "record.json")
    assert "\n" not in str(caught.value) and isinstance(caught.value, LdmError)
