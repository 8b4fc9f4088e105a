"""Bundles: what is in them, what a second build keeps and redoes, and which places are refused."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ldm_export.bundle.build import build
from ldm_export.families import open_checkpoint
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BuildError
from ldm_runtime.model import Defaults
from tests.support.checkpoints import edit_json, write_json, write_tensors
from tests.support.configs_only import write_configs

TRACED = ("text_encoder", "unet", "decoder", "step", "guided_step")
SPLIT = ("cross_attention_kv", "time_embedding")
SHALLOW = "unet/fp32.shallow.onnx"
VARIANTS = {name: f"{name}/fp32.onnxruntime-cpu.onnx" for name in ("unet", "decoder")}
VARIANTS["shallow_unet"] = "unet/fp32.shallow-onnxruntime-cpu.onnx"
STAGES = {"tokenizer", *(f"{name}.fp32.onnxruntime-cpu" for name in VARIANTS)}
STAGES |= {f"{name}.fp32" for name in (*TRACED, "shallow_unet")}
NOTES = {"manifest.json", "build-log.json"}


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    return write_configs(tmp_path / "small")


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy" / tiny_checkpoint.name))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in (folder, *folder.rglob("*"))}


def rebuilt(checkpoint: Path, target: Path, **options: Any) -> set[str]:
    """Build, check the bundle, and give the stages that were made."""
    built = build(open_checkpoint(checkpoint, **options), target)
    built.bundle.check()
    assert set(built.origins) == STAGES
    assert not list(target.parent.glob(".*"))
    return {name for name, origin in built.origins.items() if origin != "kept"}


def texts(value: Any) -> Iterator[str]:
    """Every key and text within a JSON value."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from texts(entry)
    elif isinstance(value, str):
        yield value


def test_holds_what_the_manifest_says_and_nothing_else(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    bundle.check()
    graphs = {f"{name}/fp32.onnx" for name in (*TRACED, *SPLIT)} | {SHALLOW, *VARIANTS.values()}
    assert set(bundle.manifest.files) == graphs | {"decoder/fp32.onnx.data", "tokenizer.json"}
    assert set(contents(tiny_bundle)) == set(bundle.manifest.files) | NOTES
    folders = {path.name for path in tiny_bundle.iterdir() if path.is_dir()}
    assert folders == {str(Path(graph).parent) for graph in graphs}
    assert not list(tiny_bundle.parent.glob(f".{tiny_bundle.name}*"))  # other processes build beside it
    files = [name for stage in bundle.manifest.stages.values() for name in stage.files]
    assert set(bundle.manifest.stages) == STAGES and sorted(files) == sorted(bundle.manifest.files)
    digest = bundle.manifest.request["checkpoint_sha256"]
    assert bundle.manifest.request == {
        "checkpoint": "tiny",
        "precision": "fp32",
        "quantize": ["unet", "decoder", "text_encoder"],
        "feature_cache": 1,
        "checkpoint_sha256": digest,
    }
    assert re.fullmatch("[0-9a-f]{64}", digest)


def test_the_manifest_describes_the_model(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert manifest.family == "text_to_image"
    assert list(manifest.components) == [
        *("text_encoder", "cross_attention_kv", "time_embedding", "unet", "shallow_unet", "decoder"),
        *("step", "guided_step"),
    ]
    runs = {name: component.spec.runs for name, component in manifest.components.items()}
    assert runs == dict.fromkeys(runs, "step") | {
        "text_encoder": "request",
        "cross_attention_kv": "request",
        "time_embedding": "schedule",
        "decoder": "image",
    }
    assert manifest.scheduler["class"] == "DDIMScheduler"
    for name, component in manifest.components.items():
        assert component.variants == ({"onnxruntime-cpu": {"fp32": VARIANTS[name]}} if name in VARIANTS else {})
    assert (manifest.latents.channels, manifest.latents.factor) == (4, 8)
    assert manifest.guidance == ("unconditional", "conditional")
    assert manifest.defaults == Defaults(50, 0.3, 6.0)


def test_manifest_tells_neither_when_nor_where(tiny_bundle: Path) -> None:
    manifest = (tiny_bundle / "manifest.json").read_text()
    assert not re.search(r"\d{4}-\d\d-\d\d|\d\d:\d\d", manifest)
    assert platform.node() not in manifest and str(tiny_bundle.parent) not in manifest
    assert not [text for text in texts(json.loads(manifest)) if text.startswith(("/", "~")) or "\\" in text]
    log = json.loads((tiny_bundle / "build-log.json").read_text())
    assert set(log["stages"]) == STAGES and log["finished"] and log["host"]


def test_a_second_build_redoes_nothing(tiny_checkpoint: Path, bundle_copy: Path) -> None:
    before = stamps(bundle_copy), contents(bundle_copy)
    assert rebuilt(tiny_checkpoint, bundle_copy) == set()
    assert (stamps(bundle_copy), contents(bundle_copy)) == before


def change_weight(file: Path, name: str) -> None:
    state = load_file(file)
    write_tensors(file, state | {name: state[name] + 0.25})


def change_word(tokenizer: Path, old: str, new: str) -> None:
    for file in tokenizer.iterdir():
        file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("part", "change", "what", "stages", "files"),
    [
        ("tokenizer", change_word, ("circle", "disc"), {"tokenizer"}, {"tokenizer.json"}),
        (
            "bert/model.safetensors",
            change_weight,
            ("model.layer_norm.bias",),
            {"text_encoder.fp32"},
            {"text_encoder/fp32.onnx"},
        ),
        (
            "unet/diffusion_pytorch_model.safetensors",
            change_weight,
            ("conv_in.bias",),
            {f"{name}.fp32{variant}" for name in ("unet", "shallow_unet") for variant in ("", ".onnxruntime-cpu")},
            {"unet/fp32.onnx", SHALLOW, VARIANTS["unet"], VARIANTS["shallow_unet"]},
        ),
    ],
    ids=["tokenizer", "text_encoder", "unet"],
)
def test_a_change_redoes_what_depends_on_it_only(
    checkpoint_copy: Path,
    bundle_copy: Path,
    part: str,
    change: Callable[..., None],
    what: Any,
    stages: set[str],
    files: set[str],
) -> None:
    before = contents(bundle_copy)
    change(checkpoint_copy / part, *what)
    assert rebuilt(checkpoint_copy, bundle_copy) == stages
    after = contents(bundle_copy)
    assert set(after) == set(before)
    changed = {name for name in after if after[name] != before[name]} - NOTES
    assert changed == files
    assert rebuilt(checkpoint_copy, bundle_copy) == set()


def test_a_change_of_the_scheduler_changes_the_manifest_alone(checkpoint_copy: Path, bundle_copy: Path) -> None:
    before = contents(bundle_copy)
    edit_json(checkpoint_copy / "scheduler/scheduler_config.json", beta_end=0.02)
    assert rebuilt(checkpoint_copy, bundle_copy) == set()
    assert {name for name, content in contents(bundle_copy).items() if content != before[name]} <= NOTES
    assert Bundle.open(bundle_copy).manifest.scheduler["beta_end"] == 0.02


def test_another_process_and_folder_give_the_same_bytes(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "new" / "elsewhere"
    build(open_checkpoint(write_configs(tmp_path / "first" / "small"), random_weights=True), ours)
    configs = write_configs(tmp_path / "second" / "small")
    command = [sys.executable, "-m", "ldm_export.cli", "build", str(configs), "--random-weights", "-o", str(theirs)]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    del environment["LDM_EXPORT_TRACE_CACHE"]  # traced there
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    assert set(json.loads(done.stdout)["made"]) == STAGES
    files = [contents(ours), contents(theirs)]
    logs = [content.pop("build-log.json") for content in files]
    assert logs[0] != logs[1] and files[0] == files[1]


def test_measurements_stay_until_they_are_damaged(tiny_checkpoint: Path, bundle_copy: Path) -> None:
    before = contents(bundle_copy)
    Bundle.open(bundle_copy).with_measured({"speed": 1}, {"report/speed.txt": b"fast"})
    assert rebuilt(tiny_checkpoint, bundle_copy) == set()
    assert Bundle.open(bundle_copy).manifest.measured == {"speed": 1}
    (bundle_copy / "report/speed.txt").write_text("slow")
    assert rebuilt(tiny_checkpoint, bundle_copy) == set()
    after = contents(bundle_copy)
    assert set(after) == set(before) and after["manifest.json"] == before["manifest.json"]


def test_damaged_and_missing_files_are_rebuilt(tiny_checkpoint: Path, bundle_copy: Path) -> None:
    before = contents(bundle_copy)
    content = bytearray(before["text_encoder/fp32.onnx"])
    content[len(content) // 2] ^= 1
    (bundle_copy / "text_encoder/fp32.onnx").write_bytes(content)
    (bundle_copy / "tokenizer.json").unlink()
    assert rebuilt(tiny_checkpoint, bundle_copy) == {"tokenizer", "text_encoder.fp32"}
    after = contents(bundle_copy)
    assert {name for name in after if after[name] != before[name]} == {"build-log.json"}


@pytest.mark.parametrize("files", [["holiday.jpg"], ["manifest.json"], ["manifest.json", "icon.png"]], ids=str)
def test_a_folder_that_is_no_bundle_is_refused_and_left_alone(configs: Path, tmp_path: Path, files: list[str]) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    for name in files:
        write_json(target / name, {"manifest_version": 3, "name": "somebody's browser extension"})
    before = stamps(tmp_path)
    with pytest.raises(BuildError, match=r"mine: exists and is not a bundle; .*nothing was changed"):
        build(open_checkpoint(configs, random_weights=True), target)
    assert stamps(tmp_path) == before


def test_places_that_cannot_be_built_in_are_refused(configs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "bundle"):
        with pytest.raises(BuildError, match=r"file.*(is not a bundle|cannot be written).*choose another -o"):
            build(open_checkpoint(configs, random_weights=True), target)
    assert (tmp_path / "file").read_text() == "mine" and {path.name for path in tmp_path.iterdir()} == {"file", "small"}


def test_a_link_to_a_bundle_stays_a_link(checkpoint_copy: Path, bundle_copy: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(bundle_copy, target_is_directory=True)
    edit_json(checkpoint_copy / "scheduler/scheduler_config.json", beta_end=0.02)
    assert rebuilt(checkpoint_copy, link) == set()
    assert link.is_symlink() and Bundle.open(bundle_copy).manifest.scheduler["beta_end"] == 0.02


def test_progress_is_of_one_stage_at_a_time(tiny_checkpoint: Path, bundle_copy: Path) -> None:
    reported: list[tuple[str, int, int]] = []
    build(open_checkpoint(tiny_checkpoint), bundle_copy, on_progress=lambda *progress: reported.append(progress))
    assert [stage for stage, done, _ in reported if done == 0][-1] == "bundle"
    assert {stage for stage, _, _ in reported} == {*STAGES, "bundle"}
    for stage in {*STAGES, "bundle"}:
        assert [(done, total) for name, done, total in reported if name == stage] == [(0, 1), (1, 1)]


def test_of_two_builds_at_once_the_second_is_refused(tiny_checkpoint: Path, bundle_copy: Path) -> None:
    before, refused = contents(bundle_copy), []

    def meanwhile(stage: str, done: int, total: int) -> None:
        if done:
            return
        with pytest.raises(BuildError, match="another build is writing it") as raised:
            build(open_checkpoint(tiny_checkpoint), bundle_copy)
        refused.append((stage, str(raised.value)))

    built = build(open_checkpoint(tiny_checkpoint), bundle_copy, on_progress=meanwhile)
    assert set(built.origins.values()) == {"kept"}
    assert {stage for stage, _ in refused} == {*STAGES, "bundle"} and len(refused) == len(STAGES) + 1
    assert contents(bundle_copy) == before
