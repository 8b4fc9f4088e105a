"""Response files: written only for those who wait for them."""

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
def shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(response_files, "SHARED", tmp_path)
    return tmp_path


def test_a_response_is_read_as_it_was_written(shared_folder: Path) -> None:
    waiting, answering = ResponseFiles(), ResponseFiles()
    waiting.create("one")
    assert answering.expects("one") and waiting.read("one") == {}
    answering.write("one", ANSWER)
    result = waiting.read("one")
    assert result.keys() == ANSWER.keys()
    for name, array in ANSWER.items():
        assert result[name].dtype == array.dtype and result[name].tolist() == array.tolist()
    waiting.remove("one")
    assert not answering.expects("one")
    waiting.remove("one")
    waiting.close()
    assert list(shared_folder.iterdir()) == []


@pytest.mark.parametrize("name", ["", "unknown", "..", ".", "a/b", "/etc/passwd"])
def test_responses_that_nobody_waits_for_are_not_expected(shared_folder: Path, name: str) -> None:
    waiting = ResponseFiles()
    waiting.create("one")
    assert not waiting.expects(name)


def test_the_folder_is_private_and_names_are_unique(shared_folder: Path) -> None:
    waiting = ResponseFiles()
    waiting.create("one")
    (folder,) = shared_folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700 and (folder / "one").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        waiting.create("one")
    waiting.close()
    assert folder.is_dir()  # a file is left
