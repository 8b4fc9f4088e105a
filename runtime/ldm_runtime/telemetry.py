"""Turns off usage reports that engines send to their vendors, and the files they create in the home folder for them.

ONNX Runtime reads an environment variable, which is set when ``ldm_runtime`` is imported; processes that are started
from this one inherit it. OpenVINO's Python package sends a report while it is imported, through the package
openvino_telemetry; without that package it sends nothing, so it is hidden during the import.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

__all__ = ["VARIABLE", "disable_reports", "hidden_reporter", "quieten_engine"]

VARIABLE = "ORT_DISABLE_TELEMETRY"
"""Environment variable that turns off ONNX Runtime's reports. A value that the user has set is kept."""
_REPORTER = "openvino_telemetry"
_HIDING = threading.RLock()
"""Held while the reporter is hidden, so that no thread restores it during another thread's import."""


def disable_reports() -> None:
    """Turn off ONNX Runtime's reports in this process and those it starts, unless the user has set the variable."""
    os.environ.setdefault(VARIABLE, "1")


@contextmanager
def hidden_reporter() -> Iterator[None]:
    """While the block runs, importing openvino_telemetry fails as if it were not installed. One thread at a time."""
    with _HIDING:
        loaded = list(sys.modules)  # a copy in one operation: other threads import modules meanwhile
        before = {name: sys.modules.pop(name) for name in loaded if name.partition(".")[0] == _REPORTER}
        blocked: dict[str, Any] = {_REPORTER: None}  # None makes the import system raise ModuleNotFoundError
        sys.modules.update(blocked)
        try:
            yield
        finally:
            sys.modules.pop(_REPORTER, None)
            sys.modules.update(before)


def quieten_engine(module: ModuleType) -> None:
    """Turn off the reports of an engine that has been imported, if it has a function for that."""
    if os.environ.get(VARIABLE) == "1" and hasattr(module, "disable_telemetry_events"):
        module.disable_telemetry_events()
