"""Entry point of the command `ldm-export`: Control-C ends it with one line and exit code 130 at any moment.

Importing the command line takes a while, and an interrupt during imports would end in a traceback, or would be lost,
because the import system ignores exceptions in some of its callbacks. This module imports nothing heavy at its top.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

__all__ = ["main"]

INTERRUPTED = 130
"""Exit code after an interrupt: 128 plus the number of the signal."""
DELAY = 0.01
"""Seconds after which an ignored interrupt is raised again."""
MESSAGE = b"ldm-export: interrupted\n"


def main() -> int:
    """Run the command line and return its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # e.g. started by nohup
        from ldm_export.cli import main as run

        return run()
    signal.signal(signal.SIGINT, _leave)
    from ldm_export.cli import main as run

    sys.unraisablehook = _again
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return run()
    except KeyboardInterrupt:
        os.write(2, MESSAGE)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command is done; the interpreter resets other handlers


def _leave(number: int, frame: FrameType | None) -> None:
    """End the process at once: nothing has been written yet."""
    os.write(2, MESSAGE)
    os._exit(INTERRUPTED)


def _again(unraisable: Any) -> None:
    """Raise an interrupt again that Python ignored, because it came in a callback such as a destructor."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, DELAY)  # raised at once, it would be ignored as well
    else:
        sys.__unraisablehook__(unraisable)
