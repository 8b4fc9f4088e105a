"""The process of a worker. It reads one JSON command per line and answers each with one line of JSON.

It uses the standard library only, so that a process of another Python environment can import it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Command", "peak_bytes", "reset_peak", "resident_bytes", "serve_commands"]

Command = dict[str, Any]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def serve_commands(start: Callable[[Command], tuple[Callable[[Command], Callable[[], object]], Command]]) -> None:
    """Answer commands from standard input until it ends.

    An exception becomes the answer ``{"error": its message in one line}``. If ``start`` fails, the process ends.

    Args:
        start: Called with the first line. It loads a model and returns a function and the facts to report. The function
            prepares a command and returns the call to time, which is called ``command["times"]`` times in a row. The
            answer has the mean ``seconds``, the process's ``peak_bytes`` during the calls, and the result of the last
            call if it is a dict.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that output of libraries does not mix with the answers

    def answer(facts: Command) -> None:
        channel.write(json.dumps(facts) + "\n")
        channel.flush()

    begun = time.perf_counter()
    try:
        prepare, facts = start(json.loads(sys.stdin.readline()))
    except Exception as error:
        return answer({"error": _one_line(error)})
    loading = {
        "seconds": time.perf_counter() - begun,
        "peak_bytes": peak_bytes(),
        "resident_bytes": resident_bytes(),
    }
    answer({**loading, **facts})
    for line in sys.stdin:
        try:
            answer(_timed(prepare, json.loads(line)))
        except Exception as error:
            answer({"error": _one_line(error)})
    return None


def _timed(prepare: Callable[[Command], Callable[[], object]], command: Command) -> Command:
    call, times = prepare(command), int(command.get("times", 1))
    reset_peak()
    begun, result = time.perf_counter(), None
    for _ in range(times):
        result = call()
    seconds = (time.perf_counter() - begun) / times
    return {"seconds": seconds, "peak_bytes": peak_bytes(), **(result if isinstance(result, dict) else {})}


def reset_peak() -> None:
    """Reset the peak of resident memory, if the kernel permits it; see proc_pid_clear_refs(5)."""
    try:
        _CLEAR.write_text("5")
    except OSError:  # some sandboxes refuse; the peak is then that of the whole process
        return


def peak_bytes() -> int:
    """Return the peak of resident memory in bytes, mapped files included; see proc_pid_status(5)."""
    return _kilobytes("VmHWM") * 1024


def resident_bytes() -> int:
    """Return the resident memory in bytes."""
    return _kilobytes("VmRSS") * 1024


def _kilobytes(name: str) -> int:
    return int(_STATUS.read_text().partition(f"{name}:")[2].split()[0])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
