"""Commands that are killed leave what was there or what they write, never a mixture; `make kill` tries every change."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.kill.killer import kill_at
from tests.kill.scenarios import SCENARIOS
from tests.kill.trials import prepare
from tests.support.isolated import context

POINTS = 3
"""Changes of each command at which it is killed here: the first, the last, and those between at equal distances."""
SLOW = ("build",)
"""Commands whose folder takes long to prepare; tests/export/test_killed_build.py kills them."""


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in SLOW])
def test_a_killed_command_leaves_a_sound_folder(tmp_path: Path, name: str) -> None:
    prepared = prepare(name, tmp_path / "scenario")
    assert prepared.changes > POINTS
    for point in range(POINTS):
        prepared.kill(point * (prepared.changes - 1) // (POINTS - 1))


def _change(folder: Path) -> None:
    (folder / "a").write_text("whole")
    (folder / "a").rename(folder / "b")


def _killed(folder: Path, number: int) -> None:
    kill_at(number, folder, lambda: _change(folder))


@pytest.mark.parametrize(("number", "left"), [(0, {}), (1, {"a": b"half"}), (2, {"a": b"whole"}), (3, {"b": b"whole"})])
def test_a_process_is_killed_at_each_change(tmp_path: Path, number: int, left: dict[str, bytes]) -> None:
    process = context().Process(target=_killed, args=(tmp_path, number))
    process.start()
    process.join(60)
    assert process.exitcode == (-signal.SIGKILL if number < 3 else os.EX_OK)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == left
