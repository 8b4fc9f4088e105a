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
