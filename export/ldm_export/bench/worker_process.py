"""The inner side of a worker: a process that reads one JSON command a line and answers each with one line of JSON.

Standard library only, so that a process of another environment can use it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = dict[str, Any]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def obey(start: Callable[[Command], tuple[Callable[[Command], Callable[[], object]], Command]]) -> None:
    """Serve standard input until it ends.

    The first line is given to ``start``, which loads and returns (what to do with a command, facts to tell). The former
    makes ready what a command asks for and returns the call to be timed: ``command["times"]`` calls in a row, of which
    the answer has the mean ``seconds``, the process' ``peak_bytes`` meanwhile, and what the last one returned, if a
    dict. An exception becomes ``{"error": its line}``; after one of ``start`` the process ends.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers

    def answer(facts: Command) -> None:
        channel.write(json.dumps(facts) + "\n")
        channel.flush()

    begun = time.perf_counter()
    try:
        ready, facts = start(json.loads(sys.stdin.readline()))
    except Exception as error:
        return answer({"error": _line(error)})
    answer({"seconds": time.perf_counter() - begun, "peak_bytes": peak(), "resident_bytes": resident(), **facts})
    for line in sys.stdin:
        try:
            answer(_timed(ready, json.loads(line)))
        except Exception as error:
            answer({"error": _line(error)})
    return None


def _timed(ready: Callable[[Command], Callable[[], object]], command: Command) -> Command:
    call, times = ready(command), int(command.get("times", 1))
    forget_peak()
    begun, result = time.perf_counter(), None
    for _ in range(times):
        result = call()
    seconds = (time.perf_counter() - begun) / times
    return {"seconds": seconds, "peak_bytes": peak(), **(result if isinstance(result, dict) else {})}


def forget_peak() -> None:
    """Count the peak of resident memory from now on, where the kernel lets us; see proc_pid_clear_refs(5)."""
    try:
        _CLEAR.write_text("5")
    except OSError:  # some sandboxes refuse: the peak is then that of the whole life
        return


def peak() -> int:
    """The most resident memory, in bytes, mapped files included; see proc_pid_status(5)."""
    return _kilobytes("VmHWM") * 1024


def resident() -> int:
    """Resident memory now, in bytes."""
    return _kilobytes("VmRSS") * 1024


def _kilobytes(name: str) -> int:
    return int(_STATUS.read_text().partition(f"{name}:")[2].split()[0])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
