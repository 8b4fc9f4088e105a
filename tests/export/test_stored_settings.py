"""``bench --quality --save`` stores its settings in the bundle; ``generate --budget`` and ``--steps auto`` take one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_export.bench.speed_quality import measure_quality
from ldm_export.cli import main
from ldm_export.demo import demo_grader
from ldm_export.report.quality_section import quality_rows
from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime.bundle_layout import QUALITY_REPORT
from ldm_runtime.quality import QualitySetting
from tests.support.markup import Page

ENGINE = ("--backend", "onnxruntime", "--threads", "1")
PROMPT = "a red circle left of the blue square"


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    assert main([str(argument) for argument in arguments]) == 0
    return capfd.readouterr()


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """``tiny_bundle`` with stored settings of 50 and of 4 steps."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("measured") / "bundle")
    options = ("--quality", "--save", "--steps", "4", "--runs", "1", "--guidance", "3", "--quiet")
    assert main(["bench", str(folder), *ENGINE, *options]) == 0
    return Bundle.open(folder)


def test_the_bundle_lists_what_was_measured(measured: Bundle) -> None:
    record = measured.quality()
    settings = [(one.setting.steps, one.setting.cache_every, one.setting.guidance_every) for one in record.results]
    assert settings == [(n, c, g) for n in (50, 4) for c in (1, 2, 3, 5) for g in (1, 3)]
    assert all(one.setting.precision == "fp32" and one.correct is None for one in record.results)
    assert record.reference.worst_psnr is None
    assert sum(one.worst_psnr is not None for one in record.results) > 10
    assert (record.images, record.options) == (1, {"guidance_scale": 3.0})
    assert record.engines == {"fp32": "onnxruntime on cpu"}
    measured.check()
    path = measured.folder / QUALITY_REPORT
    assert measured.manifest.files[QUALITY_REPORT].size == path.stat().st_size


def test_json_names_the_fastest_setting_and_stores_nothing_by_itself(bundle_copy: Path, capfd) -> None:
    before = (bundle_copy / "manifest.json").read_bytes()
    options = ("--quality", "--steps", "4", "--runs", "1", "--min-psnr", "30", "--json")
    out, err = run(capfd, "bench", bundle_copy, *ENGINE, *options)
    facts = json.loads(out)
    allowed = [one for one in facts["settings"] if one["worst_psnr"] is None or one["worst_psnr"] >= 30]
    assert err == "" and not facts["saved"]
    assert facts["best"] == min(allowed, key=lambda one: one["seconds"])
    assert (bundle_copy / "manifest.json").read_bytes() == before


def generated(capfd: pytest.CaptureFixture[str], bundle: Bundle, output: Path, *options: object) -> dict[str, Any]:
    request = (PROMPT, "--seed", "7", "--guidance", "3", *ENGINE)
    facts: dict[str, Any] = json.loads(
        run(capfd, "generate", bundle.folder, *request, *options, "--json", "-o", output)[0]
    )
    return facts


@pytest.mark.parametrize("auto", [(), ("--steps", "auto")])
def test_the_image_is_that_of_the_stored_setting(measured: Bundle, tmp_path: Path, capfd, auto: tuple[str]) -> None:
    results = measured.quality().results
    budget = sorted(one.worst_psnr for one in results if one.worst_psnr is not None)[len(results) // 2]
    allowed = [one for one in results if one.worst_psnr is None or one.worst_psnr >= budget]
    fewest = min(one.setting.steps for one in allowed)
    expected = min((one for one in allowed if not auto or one.setting.steps == fewest), key=lambda one: one.seconds)
    facts = generated(capfd, measured, tmp_path / "taken.png", "--budget", repr(budget), *auto)
    assert facts["setting"] == expected.facts() and facts["choice"]["arithmetic"] == "fp32"
    setting = expected.setting
    options = (
        "--steps",
        setting.steps,
        "--cache-every",
        setting.cache_every,
        "--guidance-every",
        setting.guidance_every,
    )
    generated(capfd, measured, tmp_path / "given.png", "--precision", "fp32", *options)
    assert (tmp_path / "taken.png").read_bytes() == (tmp_path / "given.png").read_bytes()


def test_the_log_says_what_was_taken(measured: Bundle, tmp_path: Path, capfd) -> None:
    record, output = measured.quality(), tmp_path / "out.png"
    _, err = run(capfd, "generate", measured.folder, PROMPT, *ENGINE, "--budget", "-100", "-o", output)
    taken = record.fastest(-100)
    assert err.startswith(f"--budget -100: takes {taken.setting}; {record.measured(taken)}\n")
    _, err = run(capfd, "generate", measured.folder, PROMPT, *ENGINE, "--budget", "900", "-o", output)
    assert err.startswith(
        "--budget 900: no other measured setting is good enough; takes the reference, fp32, 50 steps\n"
    )


def test_inspect_lists_the_stored_settings(measured: Bundle, tiny_bundle: Path, capfd) -> None:
    out, _ = run(capfd, "inspect", measured.folder)
    assert "stored settings for `generate --budget`, measured with 1 images" in out
    facts = json.loads(run(capfd, "inspect", measured.folder, "--json")[0])
    assert facts["quality"] == measured.quality().to_json()
    assert "quality" not in json.loads(run(capfd, "inspect", tiny_bundle, "--json")[0])


def test_the_report_shows_the_stored_settings(measured: Bundle, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPT)
    page = tmp_path / "report.html"
    options = ("--prompts", str(tmp_path / "prompts.txt"), "--steps", "1", "--backend", "onnxruntime", "--quiet")
    assert main(["report", str(measured.folder), *options, "-o", str(page)]) == 0
    record = measured.quality()
    _, *rows = Page.read(page).table("graph")
    assert rows == quality_rows(record) and len(rows) == 16
    assert "1 images for each setting, guidance_scale 3; fp32 by onnxruntime on cpu." in page.read_text()


REFUSED = {
    "cache": (
        ["--budget", "30", "--cache-every", "3"],
        "budget: got 30 dB and cache_every too, but a measured setting decides",
    ),
    "precision": (
        ["--budget", "30", "--precision", "int8"],
        "budget: got 30 dB, but the settings of this bundle were measured in fp32, not in int8; measure",
    ),
    "scheduler": (["--steps", "auto", "--scheduler", "DDIMScheduler"], "steps: got auto and scheduler too"),
    "steps": (["--budget", "30", "--steps", "5"], "budget: got 30 dB and steps too"),
    "no number": (["--budget", "nan"], "budget: got nan, expected a finite number"),
    "not graded": (["--steps", "auto"], "steps: got auto without a budget, but no grader decides"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_a_measured_setting(refused, measured: Bundle, case: str) -> None:
    options, message = REFUSED[case]
    refused("generate", measured.folder, PROMPT, *options, message=message)


def test_a_bundle_without_a_usable_record(refused, bundle_copy: Path, measured: Bundle, tmp_path: Path) -> None:
    message = (
        f"{bundle_copy}: has no measured settings; measure them with `ldm-export bench {bundle_copy} --quality --save`"
    )
    refused("generate", bundle_copy, PROMPT, "--budget", "35", message=message)
    damaged = shutil.copytree(measured.folder, tmp_path / "damaged")
    (damaged / QUALITY_REPORT).write_text((damaged / QUALITY_REPORT).read_text().replace("fp32", "int8"))
    refused("generate", damaged, PROMPT, "--budget", "35", message=f"{damaged / QUALITY_REPORT}: got sha256")


def test_images_of_the_demo_model_are_graded(shapes_bundle: Path) -> None:
    bundle = Bundle.open(shapes_bundle)
    grade = demo_grader(bundle)
    assert grade is not None
    prompts = ["a large red circle in the center on a white background", "a small blue square on a black background"]
    requests = [{"prompts": prompt} for prompt in prompts]
    settings = [QualitySetting("fp32", steps) for steps in (10, 1)]

    def opened(precision: str) -> LatentDiffusionPipeline:
        return LatentDiffusionPipeline.from_bundle(bundle, precision=precision, backend="onnxruntime", threads=1)

    record = measure_quality(settings, requests, opened, grade)
    with opened("fp32") as pipeline:
        images = [pipeline(prompt, seed=seed, num_inference_steps=10).images[0] for seed, prompt in enumerate(prompts)]
    right = grade([np.asarray(image) for image in images], requests)
    assert right is not None and any(right)
    assert [one.correct for one in record.results] == [np.mean(right), 0.0]
