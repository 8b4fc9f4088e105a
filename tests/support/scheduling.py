"""Which tests run in one process: those of a module, and all that share a Triton server or exported graphs."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

__all__ = ["SERVING", "ModuleScheduling"]

SERVING, GRAPHS = "tests/serving/", "tests/export/graph/"
"""Folders of the tests that share a Triton server, and whole graphs that take long to export."""


class ModuleScheduling(LoadScopeScheduling):
    """Gives each worker of pytest-xdist a module at a time, in the order of collection.

    xdist's own ``loadgroup`` has no effect with pytest 9.2, and ``loadfile`` would start a Triton server per worker.
    """

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return next((folder for folder in (SERVING, GRAPHS) if module.startswith(folder)), module)
