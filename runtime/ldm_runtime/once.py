"""Objects that a process creates once, although several threads may ask for them at the same time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from threading import RLock
from typing import ParamSpec, TypeVar

__all__ = ["once"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def once(create: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function so that it runs once for the same arguments, whose result all later calls return.

    A call waits while another thread is in the function. ``functools.cache`` does not wait: threads that make the first
    call at the same time would each create an object. After an error, the next call runs the function again.
    """
    lock, cached = RLock(), cache(create)

    @wraps(create)
    def created(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with lock:
            return cached(*args, **kwargs)  # type: ignore[arg-type]  # cache checks that they are hashable

    return created
