"""Contexts of OpenTelemetry traces. Without the package opentelemetry-api, the functions do nothing.

The package alone records nothing: a program, or `opentelemetry-instrument`, configures where spans are sent.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

__all__ = ["current_context", "opentelemetry", "remote_context"]


@cache
def opentelemetry() -> ModuleType | None:
    """Return the package with its modules context, propagate and trace, or None if it is not installed."""
    if importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec("opentelemetry.trace") is None:
        return None
    import opentelemetry.context
    import opentelemetry.propagate
    import opentelemetry.trace

    module: ModuleType = opentelemetry
    return module


def current_context() -> Any:
    """Return the context of this thread or task, so that other threads can add spans to its trace; None without one."""
    package = opentelemetry()
    return None if package is None else package.context.get_current()


@contextmanager
def remote_context(headers: Mapping[str, str]) -> Iterator[None]:
    """While the block runs, spans belong to the trace that the headers of a request name (``traceparent``).

    An existing context, e.g. of an instrumentation of the web server, is kept.
    """
    package = opentelemetry()
    if package is None or package.trace.get_current_span().get_span_context().is_valid:
        yield
        return
    token = package.context.attach(package.propagate.extract(headers))
    try:
        yield
    finally:
        package.context.detach(token)
