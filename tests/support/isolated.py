"""Processes of their own for code that may crash or is killed, forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

__all__ = ["context"]

MODULES = ["tests.fuzz.kinds.graphs", "tests.kill.trials"]


def context() -> ForkServerContext:
    """The start method "forkserver"; the server has no threads and has imported MODULES."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(MODULES)
    return found
