"""A calibration of small models: parts resume, components without candidates are skipped, the budget decides."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm_calibration.calibration import Calibration, run_calibration
from ldm_calibration.graph_files import load_graph
from ldm_calibration.layers import find_layers
from ldm_calibration.model import CalibrationModel
from ldm_calibration.qdq import QuantizedTensors, Scaling, insert_qdq
from ldm_calibration.record import Record, read_record
from ldm_calibration.sensitivity import measure_sensitivity
from ldm_calibration.settings import CalibrationSettings
from ldm_runtime.errors import BuildError, ManifestError, SpecError

REQUESTS = ({"prompts": "a red circle"}, {"prompts": "a blue square"})
SETTINGS = CalibrationSettings(
    REQUESTS, REQUESTS, steps=4, samples=2, trial_steps=4, sensitivity="results", min_psnr=20.0
)
PLAIN = replace(SETTINGS, requests=({}, {}), trial_requests=({}, {}))
QUANTIZE = ("unet", "decoder", "text_encoder")


class Parts:
    """Files of finished parts, by name and dependencies."""

    def __init__(self, folder: Path):
        self.folder, self.stages = folder, list[str]()
        folder.mkdir()

    def __call__(self, name: str, depends: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        key = self.folder / f"{name}.json"
        text = json.dumps(depends, sort_keys=True)
        if not key.exists() or key.read_text() != text:
            make(self.folder / name)
            self.stages.append(name)
            key.write_text(text)
        return self.folder / name


def calibrated(calibration: Calibration, folder: Path) -> Record:
    return run_calibration(calibration, Parts(folder))


def test_every_component_is_calibrated_and_reported(text: CalibrationModel, tmp_path: Path) -> None:
    parts, progress = Parts(tmp_path / "parts"), list[str]()
    settings = replace(SETTINGS, sensitivity="latents")
    record = run_calibration(Calibration(text, settings, QUANTIZE), parts, lambda *count: progress.append(count[0]))
    names = ("trajectories", *QUANTIZE, "sensitivity.0")
    assert parts.stages == [f"calibration.{name}" for name in names]
    assert {"calibration.unet.ranges", "calibration.decoder.scalings", "calibration.budget"} <= set(progress)
    assert set(record.components) == set(QUANTIZE) and record.denoiser == "unet"
    for name, part in record.components.items():
        layers = find_layers(load_graph(text.graphs[name]).graph)
        assert [layer["name"] for layer in part.layers] == [layer.name for layer in layers]
        assert all(layer["latent_db"] is None for layer in part.layers) is (name != "unet")
        assert insert_qdq(load_graph(text.graphs[name]), part.tensors, part.chosen) == part.chosen
    assert record.components["unet"].int8_share > 0.7
    images = record.document["images"]
    assert [image["request"] for image in images] == list(REQUESTS) and images[0]["seed"] == 1000
    (tmp_path / "record.json").write_text(record.to_json())
    assert read_record(tmp_path / "record.json").to_json() == record.to_json()


def test_another_budget_reuses_the_parts(text: CalibrationModel, tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts")
    first = run_calibration(Calibration(text, SETTINGS, QUANTIZE), parts)
    stages = list(parts.stages)
    again = run_calibration(Calibration(text, SETTINGS, QUANTIZE), parts)
    assert again.to_json() == first.to_json()
    run_calibration(Calibration(text, replace(SETTINGS, min_psnr=10.0), QUANTIZE), parts)
    assert parts.stages == stages
    run_calibration(Calibration(text, replace(SETTINGS, steps=5), QUANTIZE), parts)
    assert parts.stages == stages * 2


def test_a_model_without_conditioning_and_without_a_text_encoder(
    unconditional: CalibrationModel, tmp_path: Path
) -> None:
    record = calibrated(Calibration(unconditional, PLAIN, ("unet", "decoder")), tmp_path / "parts")
    assert set(record.components) == {"unet", "decoder"}
    assert [image["request"] for image in record.document["images"]] == [{}, {}]


def test_components_without_candidates_are_skipped(unconditional: CalibrationModel, tmp_path: Path) -> None:
    record = calibrated(Calibration(unconditional, PLAIN, ("unet", "time_embedding")), tmp_path / "parts")
    assert set(record.components) == {"unet"}
    with pytest.raises(BuildError, match=r"^time_embedding: no layer of it can be int8"):
        calibrated(Calibration(unconditional, PLAIN, ("time_embedding",)), tmp_path / "other")
    with pytest.raises(BuildError, match=r"^int8: got component 'text_encoder' to quantize"):
        Calibration(unconditional, PLAIN, ("unet", "text_encoder"))


def test_a_budget_that_cannot_be_met_says_what_can_be(text: CalibrationModel, tmp_path: Path) -> None:
    with pytest.raises(
        BuildError, match=r"^unet: the budget \(90 dB\) cannot be met .*What can be: [\d.]+ dB with \d+%.*--min-psnr"
    ) as caught:
        calibrated(Calibration(text, replace(SETTINGS, min_psnr=90.0), QUANTIZE), tmp_path / "parts")
    assert "\n" not in str(caught.value)


def test_prompt_accuracy_is_a_bound_of_its_own(text: CalibrationModel, tmp_path: Path) -> None:
    settings = replace(SETTINGS, min_psnr=None, max_accuracy_loss=0.0)
    with pytest.raises(SpecError, match=r"^max accuracy loss: got 0, but no grader"):
        Calibration(text, settings, QUANTIZE)
    record = calibrated(
        Calibration(text, settings, QUANTIZE, lambda images, requests: [True] * len(images)), tmp_path / "parts"
    )
    assert all(image["correct_int8"] for image in record.document["images"])
    with pytest.raises(BuildError, match=r"^max accuracy loss: the grader cannot grade"):
        calibrated(Calibration(text, settings, QUANTIZE, lambda images, requests: None), tmp_path / "other")


def test_a_layer_with_a_worse_scaling_is_more_sensitive(text: CalibrationModel, tmp_path: Path) -> None:
    calm = replace(SETTINGS, eta=0.0, guidance_scale=1.0)
    tensors = calibrated(Calibration(text, calm, ("unet",)), tmp_path / "parts").components["unet"].tensors
    layer = next(one for one in find_layers(load_graph(text.graphs["unet"]).graph) if not one.float_only)
    good = tensors.sources[layer.source]
    coarse = {**tensors.sources, layer.source: Scaling(good.threshold * 10, good.factors)}
    fine = measure_sensitivity(text, calm, "unet", tensors, [layer.name])
    rough = measure_sensitivity(text, calm, "unet", QuantizedTensors(coarse, tensors.results), [layer.name])
    assert rough[layer.name] < fine[layer.name] - 6


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(format="other"),
        lambda d: d.update(version=1),
        lambda d: d["components"]["unet"].update(layers=[{"name": 1}]),
        lambda d: next(iter(d["components"]["unet"]["sources"].values())).update(threshold=-1),
        lambda d: next(iter(d["components"]["unet"]["sources"].values())).update(factors=["x"]),
        lambda d: d["components"]["unet"].update(results=[]),
        lambda d: d.update(components=None),
        lambda d: d["components"].pop("unet"),
        lambda d: d.update(images=[{"request": 1}]),
        lambda d: d.update(settings={}),
        lambda d: d["settings"].update(eta="x"),
        lambda d: d.update(ranges={}),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(
    damage: Callable[[dict[str, Any]], None], record_text: str, tmp_path: Path
) -> None:
    document = json.loads(record_text)
    damage(document)
    (tmp_path / "record.json").write_text(json.dumps(document))
    with pytest.raises(ManifestError, match=r"record\.json: ") as caught:
        read_record(tmp_path / "record.json")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def record_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The record of a small model without conditioning."""
    from tests.support.small_models import unconditional_model

    folder = tmp_path_factory.mktemp("record")
    model = unconditional_model(folder)
    return calibrated(Calibration(model, PLAIN, ("unet",)), folder / "parts").to_json()
