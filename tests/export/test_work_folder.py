"""The work folder of a build is of this user alone, and what lies in it is not trusted."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from pathlib import Path

import pytest

from ldm_export.bundle.abandoned import abandoned_work, remove_abandoned
from ldm_export.bundle.publish import work_folder
from ldm_export.bundle.stages import Stage, run_stage
from ldm_export.cli import main
from ldm_runtime.errors import BuildError, CheckpointError
from tests.support.snapshot import contents


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "victim").write_text("precious")
    return tmp_path / "b"


@pytest.fixture
def work(target: Path) -> Path:
    folder = target.with_name(".b.part")
    folder.mkdir(mode=0o777)
    return folder


def test_it_is_of_this_user_alone(target: Path) -> None:
    with work_folder(target) as work:
        assert work.stat().st_mode & 0o777 == 0o700 and (work / "lock").stat().st_mode & 0o777 == 0o600


def test_finished_stages_stay_after_an_error_of_a_later_one(target: Path) -> None:
    origins = []

    def write(folder: Path) -> list[str]:
        (folder / "graph").write_text("traced")
        return ["graph"]

    def fail(error: Exception, *stages: Stage) -> None:
        with work_folder(target) as work:
            origins.extend(run_stage(stage, work, None).origin for stage in stages)
            raise error

    stage, work = Stage("graph", {}, write), target.with_name(".b.part")
    with pytest.raises(BuildError, match=r"^no engine; finished stages are kept, run the command again to continue$"):
        fail(BuildError("no engine"), stage)
    with pytest.raises(CheckpointError, match=r"^damaged weights$"):
        fail(CheckpointError("damaged weights"), stage)
    assert origins == ["made", "resumed"] and not work.exists()
    with pytest.raises(BuildError, match=r"^no stage$"):
        fail(BuildError("no stage"))
    assert not work.exists()


def test_one_that_others_may_write_to_is_closed_and_links_in_it_are_removed(target: Path, work: Path) -> None:
    for name in ("link", "finished"):
        (work / name).symlink_to(target.parent)
    (work / "unet").mkdir()
    (work / "unet" / "fp32.onnx").symlink_to(target.with_name("victim"))
    (work / "unet" / "whole").write_text("kept")
    os.mkfifo(work / "unet" / "pipe")
    with work_folder(target):
        assert contents(work) == {"lock": b"", "unet": None, "unet/whole": b"kept"}
        assert work.stat().st_mode & 0o777 == 0o700
    assert target.with_name("victim").read_text() == "precious"


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_regular_file_is_refused(target: Path, work: Path, kind: str) -> None:
    lock = work / "lock"
    if kind == "link":
        lock.symlink_to(target.with_name("victim"))
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with (
        pytest.raises(BuildError, match=r"\.b\.part/lock: is not a regular file, .*; remove .*\.b\.part"),
        work_folder(target),
    ):
        pass
    assert target.with_name("victim").read_text() == "precious"


def test_a_link_in_its_place_is_refused(target: Path) -> None:
    (target.parent / "elsewhere").mkdir()
    target.with_name(".b.part").symlink_to("elsewhere")
    with (
        pytest.raises(BuildError, match=r"\.b\.part: is not a folder of this user, .*; remove it"),
        work_folder(target),
    ):
        pass
    assert contents(target.parent / "elsewhere") == {}


def test_a_folder_of_another_user_is_refused(target: Path, work: Path) -> None:
    if os.geteuid():
        pytest.skip("only root may give a folder away")
    os.chown(work, 65534, -1)
    with pytest.raises(BuildError, match="is not a folder of this user"), work_folder(target):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning(target: Path, monkeypatch, caplog, number: int) -> None:
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), work_folder(target) as work:
        assert work.is_dir()
    assert f"{work}: the file system has no locks" in caplog.text
    with pytest.raises(BuildError, match="stop"), work_folder(target):
        raise BuildError("stop")
    assert contents(target.parent) == {"victim": b"precious"}


RECORDS = {
    "not JSON": b"{nope",
    "not text": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "no fields": b"{}",
    "files of another kind": b'{"key": "KEY", "files": [1]}',
    "facts of another kind": b'{"key": "KEY", "files": {"made": {"size": []}}}',
    "a path outside": b'{"key": "KEY", "files": {"../victim": {"sha256": "SHA", "size": 8}}}',
    "a missing file": b'{"key": "KEY", "files": {"gone": {"sha256": "SHA", "size": 8}}}',
    "other bytes": b'{"key": "KEY", "files": {"made": {"sha256": "SHA", "size": 3}}}',
}


@pytest.mark.parametrize("record", RECORDS)
def test_a_stage_with_a_damaged_record_is_made_again(tmp_path: Path, record: str) -> None:
    def run(folder: Path) -> list[str]:
        (folder / "made").write_text("new")
        return ["made"]

    stage = Stage("s", {}, run)
    (tmp_path / "made").write_text("old")
    content = RECORDS[record].replace(b"KEY", stage.key.encode()).replace(b"SHA", b"0" * 64)
    (tmp_path / "s.stage").write_bytes(content)
    assert run_stage(stage, tmp_path, None).origin == "made"
    assert (tmp_path / "made").read_text() == "new"
    assert run_stage(stage, tmp_path, None).origin == "resumed"


def test_one_of_a_killed_build_is_reported_and_removed(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = bundle_copy.with_name(f".{bundle_copy.name}.part")
    work.mkdir()
    (work / "tokenizer.stage").write_text("{}")
    assert main(["inspect", str(bundle_copy)]) == 0
    assert f"{work}: left by a build that was killed; `build` continues it" in capsys.readouterr().err
    assert main(["inspect", "--json", str(bundle_copy)]) == 0
    assert json.loads(capsys.readouterr().out)["abandoned"] == str(work)
    link = bundle_copy.with_name("link")
    link.symlink_to(bundle_copy)
    assert main(["triton", str(link), "-o", str(bundle_copy.parent / "repository")]) == 0
    assert f"removed {work}, which a build that was killed had left" in capsys.readouterr().err
    assert not work.exists() and main(["inspect", "--json", str(bundle_copy)]) == 0
    assert json.loads(capsys.readouterr().out)["abandoned"] is None


def test_one_that_a_build_uses_stays(tmp_path: Path) -> None:
    with work_folder(tmp_path / "b") as work:
        assert abandoned_work(tmp_path / "b") is None and remove_abandoned(tmp_path / "b") is None
        assert work.is_dir()
    assert abandoned_work(tmp_path / "b") == remove_abandoned(tmp_path / "b") == work
    assert not work.exists()


def test_one_that_is_a_link_stays(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / ".b.part").symlink_to("victim")
    assert remove_abandoned(tmp_path / "b") is None
    assert contents(tmp_path) == {"victim": None, ".b.part": Path("victim")}
