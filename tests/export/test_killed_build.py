"""Builds that are killed: the bundle's place holds a whole one or none, and the next build goes on where they ended."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm_export.bundle import publish as publishing
from ldm_export.bundle.build import build
from ldm_export.families import open_checkpoint
from ldm_runtime.bundle import Bundle
from tests.support.checkpoints import edit_json
from tests.support.configs_only import write_configs
from tests.support.forked import start_command

VARIANTS = ("unet.fp32.onnxruntime-cpu", "decoder.fp32.onnxruntime-cpu")
SHALLOW = ("shallow_unet.fp32", "shallow_unet.fp32.onnxruntime-cpu")
DEADLINE = 600  # seconds
KILLED_IN_PUBLISH = """
import os, signal, sys
from pathlib import Path
from ldm_export.bundle import publish

def killed(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "before":
    publish._exchange = killed
else:
    publish.shutil.rmtree = killed
publish.publish(Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    return write_configs(tmp_path / "small")


def work_of(target: Path) -> Path:
    return target.parent / f".{target.name}.part"


def since(path: Path, begun: int) -> bool:
    try:
        return path.stat().st_mtime_ns > begun
    except FileNotFoundError:
        return False


def kill_build(configs: Path, target: Path, moment: str) -> None:
    """Build in a process of its own, and kill it as soon as it has made ``moment`` in the work folder."""
    begun = time.time_ns()
    process = start_command("build", configs, "--random-weights", "-o", target)
    try:
        while not since(work_of(target) / moment, begun):
            assert process.is_alive(), f"the build ended before it made {moment}"
            assert time.time_ns() - begun < DEADLINE * 1e9, f"the build has not come to {moment}"
            time.sleep(0.002)
    finally:
        process.kill()
        process.join()


def finish(configs: Path, target: Path) -> dict[str, bool]:
    built = build(open_checkpoint(configs, random_weights=True), target)
    built.bundle.check()
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    return built.origins


def test_killed_before_and_within_its_stages(configs: Path, tmp_path: Path) -> None:
    target = tmp_path / "place" / "bundle"
    for moment in (".", "unet.fp32.stage"):
        kill_build(configs, target, moment)
        assert not target.exists()
        assert work_of(target).is_dir()
    origins = finish(configs, target)
    done = dict.fromkeys(("tokenizer", "text_encoder.fp32", "unet.fp32"), "resumed")
    assert origins == done | dict.fromkeys(
        ("decoder.fp32", "step.fp32", "guided_step.fp32", *VARIANTS, *SHALLOW), "made"
    )

    old = (target / "manifest.json").read_bytes()
    edit_json(configs / "unet" / "config.json", norm_eps=1e-4)
    kill_build(configs, target, ".unet.fp32.making")
    Bundle.open(target).check()
    assert (target / "manifest.json").read_bytes() == old
    kill_build(configs, target, "unet.fp32.stage")  # the rest is kept: killed shortly before it is published, or after
    Bundle.open(target).check()
    origins = finish(configs, target)
    assert origins.pop("unet.fp32") in ("resumed", "kept")
    assert {origins.pop(name) for name in (VARIANTS[0], *SHALLOW)} <= {"made", "kept"}
    assert set(origins.values()) == {"kept"}
    assert (target / "manifest.json").read_bytes() != old


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_it_is_published(tiny_checkpoint: Path, bundle_copy: Path, tmp_path: Path, moment: str) -> None:
    whole = (bundle_copy / "manifest.json").read_bytes()
    finished = work_of(bundle_copy) / "finished"
    shutil.copytree(bundle_copy, finished)
    Bundle.open(finished).with_measured({"new": 1}, {"report.txt": b"new"})
    command = [sys.executable, "-c", KILLED_IN_PUBLISH, moment, str(finished), str(bundle_copy)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    bundle = Bundle.open(bundle_copy)
    bundle.check()
    assert bundle.manifest.measured == ({} if moment == "before" else {"new": 1})
    built = build(open_checkpoint(tiny_checkpoint), bundle_copy)
    assert set(built.origins.values()) == {"kept"} and not work_of(bundle_copy).exists()
    built.bundle.check()
    assert moment == "after" or (bundle_copy / "manifest.json").read_bytes() == whole


def test_a_file_system_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_exchange", lambda one, other: False)
    for name in ("finished", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    publishing.publish(tmp_path / "finished", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["finished"]
