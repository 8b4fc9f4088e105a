"""Errors of TensorRT's C++ code, collected instead of printed, so that one line can be reported."""

from __future__ import annotations

from types import ModuleType
from typing import Any

__all__ = ["error_log", "one_line"]


def error_log(package: ModuleType) -> Any:
    """Return an ``ILogger`` that collects errors in ``errors``; ``first()`` returns the first one or a phrase."""

    class Log(package.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            package.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (package.ILogger.ERROR, package.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def first(self) -> str:
            return self.errors[0] if self.errors else "it gives no reason"

    return Log()


def one_line(message: str) -> str:
    """Return at most 300 characters of a message, without line breaks."""
    return " ".join(message.split())[:300]
