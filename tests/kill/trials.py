"""Kills a command at one of its changes, checks what it leaves, and runs it again: each in a process of its own."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from tests.kill.killer import count_changes, kill_at
from tests.kill.scenarios import SCENARIOS
from tests.support.isolated import context

__all__ = ["Prepared", "prepare"]

SECONDS = 120.0


@dataclass(frozen=True)
class Prepared:
    """A scenario that has run once without a kill.

    Attributes:
        name: Key in ``SCENARIOS``.
        folder: Holds its inputs, its folder as it starts ("before"), and as it ends ("after").
        changes: Number of changes that the command makes.
    """

    name: str
    folder: Path
    changes: int

    def kill(self, number: int) -> None:
        """Kill the command at a change; raises what a check raises."""
        place, scenario = self.folder / "place", SCENARIOS[self.name]
        before, after = self.folder / "before", self.folder / "after"
        _copy(before, place)
        code, _ = _isolated(self.name, self.folder, place, number)
        assert code == -signal.SIGKILL, f"the command ended with {code} before change {number}"
        scenario.check(place, before, after)
        code, _ = _isolated(self.name, self.folder, place, None)
        assert code == 0, f"the command that ran again ended with {code}"
        scenario.check_finished(place, after)


def prepare(name: str, folder: Path) -> Prepared:
    """Prepare a scenario in a new folder, and run its command once."""
    for part in ("inputs", "before"):
        (folder / part).mkdir(parents=True)
    SCENARIOS[name].prepare(folder / "inputs", folder / "before")
    _copy(folder / "before", folder / "after")
    code, changes = _isolated(name, folder, folder / "after", None)
    assert code == 0
    return Prepared(name, folder, changes)


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def _isolated(name: str, folder: Path, place: Path, number: int | None) -> tuple[int | None, int]:
    """Run a command in a process, killed at a change or not; returns its exit code and the number of its changes."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = context().Process(target=_run, args=(name, folder, place, number, sender))
    process.start()
    sender.close()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"the command was still running after {SECONDS:g} s")
    try:
        return process.exitcode, receiver.recv()
    except EOFError:
        return process.exitcode, 0


def _run(name: str, folder: Path, place: Path, number: int | None, sender: Connection) -> None:
    scenario = SCENARIOS[name]

    def run() -> None:
        scenario.run(folder / "inputs", place)

    if number is None:
        sender.send(count_changes(place, run))
    else:
        kill_at(number, place, run)
