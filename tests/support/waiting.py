"""Waiting for what another thread or process does soon."""

from __future__ import annotations

import time
from collections.abc import Callable


def settled(check: Callable[[], bool], seconds: float = 20) -> bool:
    """True as soon as ``check`` is, False where it is not in time."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
