"""Mapped weights are given back and come back; nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ldm_runtime.backends.page_release import mapped_ranges, release_mapped_files, release_mapped_pages

PAGES = 2000


def resident() -> int:
    """Bytes of mapped files in this process's memory."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return int(line.split()[1]) * 1024


def test_read_only_maps_of_a_file_are_dropped_and_read_again(tmp_path: Path) -> None:
    content = np.arange(PAGES * 4096 // 8, dtype=np.int64)
    content.tofile(tmp_path / "weights")
    weights = np.memmap(tmp_path / "weights", np.int64, "r")[3:]
    assert weights.sum() == content[3:].sum()
    before = resident()
    with release_mapped_pages([weights]):
        pass
    assert before - resident() > 0.9 * PAGES * 4096  # code may be read in meanwhile
    assert np.array_equal(weights, content[3:])


def test_the_mapped_files_of_a_folder_are_dropped_and_no_others(tmp_path: Path) -> None:
    content = np.arange(PAGES * 4096 // 8, dtype=np.int64)
    maps = {}
    for folder in ("a cache", "else"):
        (tmp_path / folder).mkdir()
        content.tofile(tmp_path / folder / "weights")
        maps[folder] = np.memmap(tmp_path / folder / "weights", np.int64, "r")
        assert maps[folder].sum() == content.sum()
    before = resident()
    release_mapped_files(tmp_path / "a cache")
    assert 0.9 * PAGES * 4096 < before - resident() < 1.1 * PAGES * 4096
    assert np.array_equal(maps["a cache"], content)


def test_what_can_be_written_or_is_no_file_is_left_alone(tmp_path: Path) -> None:
    np.zeros(PAGES * 512, np.int64).tofile(tmp_path / "weights")
    private = np.memmap(tmp_path / "weights", np.int64, "c")
    private[:] = 7
    plain, small = np.full(PAGES * 512, 5), np.memmap(tmp_path / "weights", np.int8, "r")[5:3000]
    assert mapped_ranges([private, plain, small]) == []
    with release_mapped_pages([private, plain]):
        pass
    assert (private == 7).all() and (plain == 5).all()
