"""``bench --split-levels`` measures where to split the UNet; ``build --feature-cache auto`` splits it there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_export.bench.split_levels import SplitLevel, best_level
from ldm_export.bundle.build import BuildOptions, build
from ldm_export.bundle.split_bundle import split_bundle
from ldm_export.cli import main
from ldm_export.families import open_checkpoint
from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime.bundle_layout import MANIFEST
from ldm_runtime.errors import BuildError, SpecError
from ldm_runtime.quality import QualityRecord, QualityResult, QualitySetting
from tests.support.snapshot import contents

ENGINE = ("--backend", "onnxruntime", "--threads", "1")
MEASURE = ("--quality", "--split-levels")


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """``tiny_bundle`` with measured layers."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("split") / "bundle")
    options = (*MEASURE, "--save", "--runs", "1", "--guidance", "1", "--min-psnr", "1", "--quiet")
    assert main(["bench", str(folder), *ENGINE, *options]) == 0
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]  # the copies are gone
    return Bundle.open(folder)


def facts_of(bundle: Bundle) -> dict[str, Any]:
    facts: dict[str, Any] = bundle.manifest.measured["feature_cache"]
    return facts


def test_every_level_is_measured_and_the_graphs_stay(measured: Bundle, tiny_bundle: Path) -> None:
    facts, levels = facts_of(measured), facts_of(measured)["levels"]
    assert [(one["layers"], one["cache_every"]) for one in levels] == [(n, c) for n in (1, 2) for c in (1, 2, 3, 5)]
    assert all((one["worst_psnr"] is None) == (one["cache_every"] == 1) for one in levels)
    caching = [one for one in levels if one["cache_every"] > 1]
    assert facts["layers"] == max(caching, key=lambda one: one["faster"])["layers"]
    assert (facts["images"], facts["engine"], facts["options"]) == (1, "onnxruntime on cpu", {"guidance_scale": 1.0})
    before, after = contents(tiny_bundle), contents(measured.folder)
    assert {name for name in before | after if before.get(name) != after.get(name)} == {MANIFEST}


def test_inspect_shows_the_figures(measured: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(measured.folder)]) == 0
    out = capfd.readouterr().out
    assert f"layers of the shallow UNet, measured with 1 images; chosen: {facts_of(measured)['layers']}" in out
    assert main(["inspect", str(measured.folder), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["measured"]["feature_cache"] == facts_of(measured)


def image(bundle: Bundle) -> np.ndarray:
    options: dict[str, Any] = {"num_inference_steps": 6, "cache_every": 3, "full_steps": 0, "seed": 1}
    with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime", threads=1) as pipeline:
        return pipeline("a red circle", **options).arrays


def test_a_build_splits_where_the_measurement_says(
    measured: Bundle, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(measured.folder, tmp_path / "bundle")
    chosen = Bundle.open(folder).with_measured({"feature_cache": facts_of(measured) | {"layers": 2}}, {})
    options = BuildOptions(feature_cache="auto")
    built = build(open_checkpoint(tiny_checkpoint), folder, options=options)
    assert built.bundle.manifest.request["feature_cache"] == 2
    assert facts_of(built.bundle) == facts_of(chosen)
    assert {name for name, origin in built.origins.items() if origin == "made"} == {
        *("unet.fp32", "unet.fp32.onnxruntime-cpu"),
        *("shallow_unet.fp32", "shallow_unet.fp32.onnxruntime-cpu"),
    }
    again = build(open_checkpoint(tiny_checkpoint), folder, options=options)
    assert set(again.origins.values()) == {"kept"}
    (tmp_path / "split").mkdir()
    split = split_bundle(measured, 2, tmp_path / "split")  # links to files: not those of the shared bundle
    split.check()
    assert np.array_equal(image(split), image(built.bundle))
    assert not np.array_equal(image(split), image(Bundle.open(tiny_bundle)))


def test_nothing_was_measured(tiny_checkpoint: Path, bundle_copy: Path) -> None:
    with pytest.raises(
        BuildError, match=r"^feature cache: got auto, but .* --quality --split-levels --save`, and build"
    ):
        build(open_checkpoint(tiny_checkpoint), bundle_copy, options=BuildOptions(feature_cache="auto"))


def level(layers: int, *results: tuple[int, float, float | None]) -> SplitLevel:
    rows = [QualityResult(QualitySetting("fp32", 50, every), time, worst, worst) for every, time, worst in results]
    return SplitLevel(layers, QualityRecord(tuple(rows), 16, {"fp32": "onnxruntime on cpu"}))


def test_the_fastest_level_that_is_close_enough_is_chosen() -> None:
    one = level(1, (1, 10.0, None), (2, 6.0, 40.0), (3, 4.0, 30.0))
    two = level(2, (1, 12.0, None), (2, 9.0, 50.0), (3, 6.0, 42.0))
    chosen = {least: best_level([one, two], least)[0].layers for least in (20, 30, 35, 41, 45)}
    assert chosen == {20: 1, 30: 1, 35: 2, 41: 2, 45: 2}
    with pytest.raises(
        SpecError, match=r"^min-psnr: got 60 dB, but caching has at most 50.0 dB .* 2 layers and cache_e"
    ):
        best_level([one, two], 60)


REFUSED = {
    "steps": ((*MEASURE, "--steps", "5"), "--split-levels: got --steps or --precision"),
    "precision": ((*MEASURE, "--precision", "int8"), "--split-levels: got --steps or --precision"),
    "alone": (("--split-levels",), "--split-levels: got it without --quality; add --quality"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(refused, tiny_bundle: Path, case: str) -> None:
    options, message = REFUSED[case]
    refused("bench", tiny_bundle, *ENGINE, *options, message=message)
