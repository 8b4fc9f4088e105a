"""``ldm-export bench``: every component on every backend in turns, and refusals. No time is asserted."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ldm_export.bench.bench_results import BenchSettings, Combination
from ldm_export.bench.benchmark import benchmark
from ldm_export.bench.component_feeds import component_rows, feed_at
from ldm_export.bench.figures import Timing, machine, speedup
from ldm_export.bench.worker_pool import Worker, rounds
from ldm_export.cli import main
from ldm_runtime.errors import BackendError
from ldm_runtime.model import Latents, ModelDescription
from tests.support.small_bundle import SPECS, write_small_bundle

PER_BATCH = ("cross_attention_kv", "unet", "shallow_unet", "decoder", "image")
"""Parts whose work depends on the batch size, in the order of the manifest."""
FAST = ("--steps", "2", "--runs", "2", "--threads", "1")


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    assert main([str(argument) for argument in arguments]) == 0
    return capfd.readouterr()


def test_two_backends_in_one_run(tiny_bundle: Path, tmp_path: Path, capfd) -> None:
    chart = tmp_path / "bench.svg"
    options = ("--backend", "onnxruntime", "openvino", "--precision", "fp32", "--batch", "1", "2", *FAST)
    out, err = run(capfd, "bench", tiny_bundle, *options, "--json", "-o", chart)
    facts = json.loads(out)
    assert err == "" and facts["refused"] == {} and facts["machine"] == machine()
    assert {"numpy", "onnxruntime", "openvino"} <= set(facts["tools"])
    names = ["onnxruntime fp32", "openvino fp32"]
    assert list(facts["combinations"]) == names
    assert [part["choice"]["backend"] for part in facts["combinations"].values()] == ["onnxruntime", "openvino"]
    measures = facts["measures"]
    first = ("text_encoder", "cross_attention_kv", "time_embedding", "unet", "shallow_unet", "decoder", "image")
    parts = [*((part, 1) for part in first), *((part, 2) for part in PER_BATCH)]
    assert [(m["part"], m["batch"], m["combination"]) for m in measures] == [
        (*p, name) for p in parts for name in names
    ]
    for measure in measures:
        seconds = measure["seconds"]
        assert len(seconds["runs"]) == 2 and 0 < seconds["least"] <= seconds["median"] <= seconds["most"]
        assert 1e7 < measure["peak_bytes"] < facts["machine"]["memory_bytes"]
        expected = measure["batch"] / seconds["median"] if measure["part"] == "image" else None
        assert measure["images_per_second"] == expected
    assert all(m["ratio"] == 1 for m in measures if m["combination"] == names[0])
    texts = {mark.text for mark in ElementTree.parse(chart).iter("{http://www.w3.org/2000/svg}text")}
    assert {*names, "images a second", "unet × 2", "decoder"} <= texts


def test_an_unconditional_model_is_timed_by_its_number_of_images(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "bundle")
    calls: list[str] = []
    settings = BenchSettings(batches=(1, 3), runs=1, threads=1, height=8, device="cpu")
    combinations = [Combination("onnxruntime", "fp32"), Combination("onnxruntime", "bf16")]
    result = benchmark(tmp_path / "bundle", combinations, settings, lambda what, done, total: calls.append(what))
    assert [(measure.part, measure.batch) for measure in result.measures] == [
        *(("time_embedding", 1), ("unet", 1), ("decoder", 1), ("image", 1)),
        *(("unet", 3), ("decoder", 3), ("image", 3)),
    ]
    assert "does not compute in bf16 on a CPU" in result.refused["onnxruntime bf16"]
    assert (result.settings.steps, result.settings.guidance_scale, result.settings.eta) == (4, 1.0, 0.0)
    assert "unet × 4" in result.chart() and calls[0] == "loading onnxruntime fp32"


def test_rows_and_inputs_of_components() -> None:
    model = ModelDescription("unconditional", SPECS, (), (), Latents(4, 2), {})
    rows = [component_rows(model, name, 3, 2, 50) for name in ("time_embedding", "unet", "decoder")]
    assert rows == [16, 6, 3]  # the graph of the time embedding takes 16 timesteps
    assert component_rows(model, "time_embedding", 3, 2, 5) == 5
    feed = feed_at(SPECS["unet"], {"batch": 6, "height": 5})
    assert {name: array.shape for name, array in feed.items()} == {"sample": (6, 4, 5, 4), "time_embedding": (6, 8)}
    assert set(np.unique(feed_at(SPECS["time_embedding"], {"batch": 16})["timestep"])) == {0, 1}


def test_a_table_and_what_was_left_out(tiny_bundle: Path, capfd) -> None:
    out, err = run(
        capfd, "bench", tiny_bundle, "--backend", "onnxruntime", "--precision", "fp32", "fp16", "--batch", "1", *FAST
    )
    assert err.startswith("left out: onnxruntime fp16: ") and "has no fp16 graph" in err and err.count("\n") == 1
    for text in ("image, 1", "unet, 1", "1.00×", "onnxruntime fp32: onnxruntime, fp32 graphs in fp32; loaded in "):
        assert text in out


REFUSED = {
    "no bundle": (["nowhere"], "nowhere: no such folder, expected a bundle"),
    "no runs": (["bundle", "--runs", "0"], "runs: got 0, expected a whole number from 1 to 1000"),
    "no images": (["bundle", "--batch", "0"], "batch: got 0, expected a whole number from 1 to 1000000"),
    "too many images": (["bundle", "--batch", "33", *FAST], "batch must lie in 1..64"),
    "width": (["bundle", "--width", "63", *FAST], "width: got 63, expected a multiple of 8 from 16 to 1024 pixels"),
    "steps": (["bundle", "--steps", "0", "--batch", "1"], "steps: got 0, expected"),
    "guidance": (["bundle", "--guidance", "nan", "--batch", "1"], "guidance_scale: got nan, expected a finite number"),
    "nothing runs": (["bundle", "--precision", "fp16", "--backend", "onnxruntime"], "has no fp16 graph"),
    "several steps": (["bundle", "--steps", "2", "4"], "--steps: got several numbers without --quality, expected one"),
    "save": (["bundle", "--save"], "--save: got it without --quality; add --quality"),
    "min-psnr": (["bundle", "--min-psnr", "35"], "--min-psnr: got it without --quality; add --quality"),
    "no steps of quality": (["bundle", "--quality", "--steps", "4", "0"], "steps: got 0, expected a whole number from"),
    "no budget": (["bundle", "--quality", "--min-psnr", "nan"], "min-psnr: got nan, expected a finite number"),
    "too many settings": (
        ["bundle", "--quality", "--precision", "fp32", "--steps", *map(str, range(1, 20))],
        "got 160 settings, expected at",
    ),
    "no chart": (["bundle", "-o", "bench.png"], "bench.png: expected the name of a file that ends in .svg"),
    "no place": (["bundle", "-o", "no/bundle.svg", "--batch", "1", *FAST], "no/bundle.svg: cannot be written"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_timed(refused, bundle_copy: Path, case: str) -> None:
    (bundle_copy.parent / "no").write_text("a file")
    arguments, message = REFUSED[case]
    refused("bench", *arguments, message=message)


ECHO = """
from ldm_export.bench.worker_process import serve_commands
def start(settings):
    if settings.get("refuse"): raise ValueError("it will\\nnot")
    print("noise that is no answer")
    def ready(command):
        if command.get("die"): raise SystemExit(3)
        return lambda: {"got": [settings["name"], command["number"]]}
    return ready, {"hello": settings["name"]}
serve_commands(start)
"""


def echo(name: str, **settings: object) -> Worker:
    return Worker(name, [sys.executable, "-c", ECHO], {"name": name, **settings})


def test_workers_take_turns_and_each_answers_for_itself() -> None:
    with echo("a") as one, echo("b") as other:
        assert (one.facts["hello"], other.facts["hello"]) == ("a", "b")
        calls: list[int] = []
        answers = rounds([one, other], lambda number: {"number": number}, 3, lambda: calls.append(1))
        assert [[answer["got"] for answer in worker] for worker in answers] == [
            [[name, number] for number in range(3)] for name in "ab"
        ]
        assert len(calls) == 8 and all(answer["seconds"] > 0 for worker in answers for answer in worker)


def test_a_worker_that_refuses_or_ends_is_reported_in_one_line() -> None:
    with pytest.raises(BackendError, match=r"^a: it will not$"):
        echo("a", refuse=True)
    with echo("b") as worker, pytest.raises(BackendError, match=r"^b: the process that runs it ended with code 3: "):
        worker.ask({"number": 0, "die": True})
    with pytest.raises(BackendError, match=r"^c: the process that runs it ended with code 1: .*no_such_module"):
        Worker("c", [sys.executable, "-c", "import no_such_module"], {})


def test_timings_and_ratios() -> None:
    timing = Timing.of([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (timing.median, timing.low, timing.high, timing.least, timing.most) == (3.0, 2.0, 4.0, 1.0, 5.0)
    assert timing.spread == pytest.approx(2 / 3) and Timing.of([2.0]).spread == 0
    assert speedup([1.0, 2.0, 4.0], [2.0, 6.0, 4.0]) == statistics.median([2.0, 3.0, 1.0])
