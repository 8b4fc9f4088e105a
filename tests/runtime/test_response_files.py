"""Answers left in files, for those who wait for them and for nobody else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ldm_runtime.triton import response_files
from ldm_runtime.triton.response_files import ResponseFiles

ANSWER = {
    "IMAGE": np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3),
    "SEED_USED": np.array([2**40, -1], np.int64),
    "PNG": np.array([b"\x89PNG\0\0", b""], object),
    "PNG_BASE64": np.array([b"abc", b"defg"], object),
}


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(response_files, "SHARED", tmp_path)
    return tmp_path


def test_an_answer_comes_as_it_was_left(room: Path) -> None:
    waiting, answering = ResponseFiles(), ResponseFiles()
    waiting.open("one")
    assert answering.awaited("one") and waiting.take("one") == {}
    answering.fill("one", ANSWER)
    found = waiting.take("one")
    assert found.keys() == ANSWER.keys()
    for name, array in ANSWER.items():
        assert found[name].dtype == array.dtype and found[name].tolist() == array.tolist()
    waiting.drop("one")
    assert not answering.awaited("one")
    waiting.drop("one")
    waiting.close()
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("name", ["", "unknown", "..", ".", "a/b", "/etc/passwd"])
def test_unexpected_responses_leave_no_file(room: Path, name: str) -> None:
    waiting = ResponseFiles()
    waiting.open("one")
    assert not waiting.awaited(name)


def test_a_folder_has_room_for_its_user_alone(room: Path) -> None:
    waiting = ResponseFiles()
    waiting.open("one")
    (folder,) = room.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700 and (folder / "one").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        waiting.open("one")
    waiting.close()
    assert folder.is_dir()  # one still waits
