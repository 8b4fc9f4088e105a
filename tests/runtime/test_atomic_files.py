"""Output files: written whole, through links, and never in the place of a device, a pipe, a socket or a folder."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from ldm_runtime.atomic_files import destination, write_together, write_whole
from ldm_runtime.errors import BuildError
from tests.support.snapshot import contents


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


SPECIAL = {
    "a pipe": os.mkfifo,
    "a socket": _socket,
    "a device": lambda path: path.symlink_to("/dev/null"),
    "a link that leads to itself": lambda path: path.symlink_to(path),
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_is_refused_and_stays(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    SPECIAL[kind](path)
    before = path.lstat()
    for write in (destination, lambda path: write_whole(path, b"new")):
        with pytest.raises(BuildError, match=rf"out.png: is {kind}, expected .*; choose another name"):
            write(path)
    assert os.path.samestat(path.lstat(), before) and [*contents(tmp_path)] == ["out.png"]
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_nothing_is_written_if_one_of_several_files_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BuildError):
        write_together({tmp_path / "new" / "file": b"1", tmp_path / "pipe": b"2"})
    assert [*contents(tmp_path)] == ["pipe"]


def test_a_link_stays_a_link_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/file")
    for content in (b"new", b"newer"):  # at first the link leads to a file that does not exist yet
        write_whole(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_bytes() == content
    assert [*contents(tmp_path / "far")] == ["file"]


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / ".out.part").symlink_to("victim")
    write_whole(tmp_path / "out", b"new")
    assert contents(tmp_path) == {"victim": b"precious", "out": b"new"}


def test_every_command_refuses_it_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ldm_export.cli import main

    os.mkfifo(tmp_path / "o.svg")
    for command in (["generate", "absent", "a"], ["client", "a"], ["report", "absent"], ["bench", "absent"]):
        assert main([*command, "-o", str(tmp_path / "o.svg")]) == 1
        assert "o.svg: is a pipe, expected a regular file; choose another name" in capsys.readouterr().err


def test_old_and_new_files_are_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder before each change: at any time the visible files are all old or all new."""
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths[:2]:
        path.write_bytes(b"old")
    states = []
    rename = Path.replace

    def observed(self: Path, target: Path) -> Path:
        states.append({path.read_bytes() for path in paths if path.exists()})
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", observed)
    write_together(dict.fromkeys(paths, b"new"))
    assert contents(tmp_path) == dict.fromkeys(("a", "b", "c"), b"new")
    assert len(states) == 6 and all(len(state) <= 1 for state in states)


def test_several_files_are_as_before_if_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"old")
    rename = Path.replace

    def refused(self: Path, target: Path) -> Path:
        if self.name == ".b.part":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(OSError, match="no"):
        write_together({tmp_path / name: b"new" for name in ("a", "b", "c")})
    assert contents(tmp_path) == {"a": b"old", "b": b"old"}


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    for name in ("a", ".a.old", ".a.part", ".b.old"):
        (tmp_path / name).write_bytes(b"old")
    write_together({tmp_path / name: b"new" for name in ("a", "b")})
    assert contents(tmp_path) == {"a": b"new", "b": b"new"}
