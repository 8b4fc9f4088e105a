"""Threads: what the affinity allows and the container pays for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ldm_runtime.backends.host import usable_cores

ALL = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", ALL), ("100000 100000", 1), ("20000 100000", 1), ("900000 100000", min(ALL, 9))]
)
def test_a_containers_quota(tmp_path: Path, text: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(f"{text}\n")
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", ALL), ("50000", 1), ("nonsense", ALL)])
def test_a_quota_of_the_first_version(tmp_path: Path, quota: str, cores: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(tmp_path) == cores


def test_without_control_groups_and_with_fewer_cores(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none") == ALL
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
