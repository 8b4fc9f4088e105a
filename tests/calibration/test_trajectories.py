"""Recorded feeds are what the components got; ranges are those of a direct run; NaN is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from ldm_calibration.graph_files import load_graph
from ldm_calibration.model import CalibrationModel
from ldm_calibration.probes import add_outputs
from ldm_calibration.ranges import measure_ranges
from ldm_calibration.sampling import feeds_of, split_feeds
from ldm_calibration.sessions import Session
from ldm_calibration.settings import CalibrationSettings
from ldm_calibration.trajectories import Trajectories, run_trajectories
from ldm_runtime.errors import BuildError

REQUESTS = tuple({"prompts": f"a {colour} circle"} for colour in ("red", "blue", "green", "red", "blue"))
SETTINGS = CalibrationSettings(REQUESTS, REQUESTS, steps=5, samples=3)
QUANTIZE = ("unet", "decoder", "text_encoder")


def test_feeds_are_what_each_component_got(text: CalibrationModel, tmp_path: Path) -> None:
    counts: list[tuple[int, int]] = []
    recorded = run_trajectories(text, SETTINGS, QUANTIZE, lambda *count: counts.append(count))
    assert counts == [(done, 10) for done in range(1, 11)]
    assert list(recorded.feeds) == list(QUANTIZE)
    unet, decoder, encoder = (recorded.feeds[name] for name in QUANTIZE)
    assert [len(feed["sample"]) for feed in unet] == [8] * 5 + [2] * 5  # two branches for each image of two batches
    assert {"sample", "time_embedding", "kv_0", "kv_1"} == unet[0].keys()
    assert [len(feed["latents"]) for feed in decoder] == [4, 1]
    assert len(encoder) == len({request["prompts"] for request in REQUESTS}) + 1  # the empty prompt of guidance too
    assert recorded.largest.shape == (5, len(recorded.sources)) and (np.diff(recorded.timesteps) < 0).all()
    sampled = feeds_of(recorded, "unet", 3)
    assert [len(feed["sample"]) for feed in sampled] == [8] * 3 + [2] * 3
    assert sampled[0] is unet[0] and sampled[2] is unet[4] and sampled[5] is unet[9]
    assert feeds_of(recorded, "decoder", 3) == list(decoder)
    assert recorded.held_out == {"unet": 5, "decoder": 1, "text_encoder": 0}  # its prompt is among the observed ones
    observed, held_out = split_feeds(recorded, "unet", 3)
    assert [len(feed["sample"]) for feed in observed] == [8] * 3
    assert [len(feed["sample"]) for feed in held_out] == [2] * 3
    assert split_feeds(recorded, "text_encoder", 3) == (list(encoder), list(encoder)[::4])


def test_saved_and_read_again_they_are_the_same(text: CalibrationModel, tmp_path: Path) -> None:
    recorded = run_trajectories(text, SETTINGS, QUANTIZE)
    recorded.save(tmp_path / "calibration.trajectories")
    again = Trajectories.load(tmp_path / "calibration.trajectories")
    assert (again.sources, again.held_out) == (recorded.sources, recorded.held_out)
    assert list(again.feeds) == list(recorded.feeds)
    assert np.array_equal(again.largest, recorded.largest) and np.array_equal(again.timesteps, recorded.timesteps)
    for name, feeds in recorded.feeds.items():
        for one, other in zip(feeds, again.feeds[name], strict=True):
            assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    first, second = again.feeds["unet"][:2]
    assert first["kv_0"] is second["kv_0"]  # written and read once


@pytest.mark.parametrize("name", ["text", "unconditional"])
def test_ranges_are_those_of_every_tensor_of_every_component(name: str, request: pytest.FixtureRequest) -> None:
    model: CalibrationModel = request.getfixturevalue(name)
    requests = REQUESTS[:2] if model.model.conditioning else ({}, {})
    result = measure_ranges(model, requests, 3)
    assert list(result) == list(model.graphs)
    for component, ranges in result.items():
        graph = load_graph(model.graphs[component]).graph
        tensors = [value.name for node in graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
        assert list(ranges) == tensors and all(value > 0 for value in ranges.values())
    components = ("unet", *(name for name in ("decoder", "text_encoder") if name in model.graphs))
    for number, one in enumerate(requests):
        settings = replace(SETTINGS, requests=(one,), steps=3)
        if number == 0:  # seed 0 in both
            for component, feeds in run_trajectories(model, settings, components).feeds.items():
                _within(model.graphs[component], feeds, result[component])


def _within(graph: Path, feeds: object, ranges: dict[str, float]) -> None:
    model = load_graph(graph)
    add_outputs(model, list(ranges))
    session = Session(model, graph.parent)
    for feed in feeds:  # type: ignore[attr-defined]
        for tensor, values in session.run(feed, list(ranges)).items():
            assert np.abs(values).max() <= ranges[tensor] * 1.0001


def test_a_model_that_computes_nan_is_refused(text: CalibrationModel, tmp_path: Path) -> None:
    damaged = ir.load(text.graphs["unet"])
    weight = damaged.graph.initializers["conv_in"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1e38), name=weight.name)
    ir.save(damaged, tmp_path / "damaged.onnx")
    broken = replace(text, graphs={**text.graphs, "unet": tmp_path / "damaged.onnx"})
    with pytest.raises(BuildError, match=r"^unet: got NaN or infinity in fp32"):
        run_trajectories(broken, SETTINGS, QUANTIZE)
    with pytest.raises(BuildError, match=r"^unet: tensor '.*' is not finite in fp32"):
        measure_ranges(broken, REQUESTS[:1], 3)
