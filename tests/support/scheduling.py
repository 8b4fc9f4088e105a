"""Which tests run in one process: those of a module, and all that share a Triton server or exported graphs."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

__all__ = ["SERVING", "ModuleScheduling"]

SERVING, GRAPHS = "tests/serving/", "tests/export/graph/"
"""Folders of the tests that share a Triton server, and whole graphs that take long to export."""
SHORT = ("tests/calibration/", "tests/demo/", "tests/docs/", "tests/fuzz/", "tests/http/", "tests/kill/")
"""Folders of short modules, which come last, so that no worker waits long for the last module of another."""


class ModuleScheduling(LoadScopeScheduling):
    """Gives each worker of pytest-xdist a module at a time: the first worker from the start, the second from the end.

    Neighbouring modules often use the same bundles. On two workers at once, one would wait while the other builds them.
    Modules of SHORT are given when there are no others.

    xdist's own ``loadgroup`` has no effect with pytest 9.2, and ``loadfile`` would start a Triton server per worker.
    """

    def _assign_work_unit(self, node: WorkerController) -> None:
        waiting = [scope for scope in self.workqueue if not scope.startswith(SHORT)] or [*self.workqueue]
        self.workqueue.move_to_end(waiting[-(self.nodes.index(node) % 2)], last=False)
        super()._assign_work_unit(node)

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return next((folder for folder in (SERVING, GRAPHS) if module.startswith(folder)), module)
