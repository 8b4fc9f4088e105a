"""Numbers that callers give: NumPy's are accepted, absurd ones are refused in one short line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ldm_runtime.batching.limits import Limits
from ldm_runtime.errors import SpecError
from ldm_runtime.images import grid
from ldm_runtime.number_checks import as_float, as_integer, integer, number, seconds, threads
from ldm_runtime.triton.parameters import ModelParameters

ABSURD: tuple[Any, ...] = (10**5000, -(10**400), "5", "x" * 10_000, True, [1], b"1", 1j, float("nan"), {1: 2})


def test_numpy_numbers_become_pythons() -> None:
    for value in (np.int8(5), np.int64(5), np.uint32(5), 5):
        assert type(as_integer(value)) is int and integer("n", value, 1, 5) == 5
        assert type(number("n", value)) is float and threads(value) == 5
    for value in (np.float32(0.5), np.float64(0.5), np.float16(0.5), 0.5):
        assert type(as_float(value)) is float and seconds("t", value) == 0.5
    assert threads(None) is None
    limits = Limits(np.int64(8), row_buckets=np.array([2, 8]), aging_seconds=np.float32(2), max_queue=np.int32(3))
    assert limits == Limits(8, row_buckets=[2, 8], aging_seconds=2.0, max_queue=3)
    assert type(limits.max_rows) is int and type(limits.aging_seconds) is float


CHECKS: dict[str, Callable[[Any], object]] = {
    "integer": lambda value: integer("n", value, 1, 100),
    "number": lambda value: number("n", value, 0.0, 1.0),
    "seconds": lambda value: seconds("timeout", value),
    "threads": threads,
    "columns": lambda value: grid([None], value),  # type: ignore[list-item]
    **{
        name: lambda value, name=name: Limits(**{name: value})  # type: ignore[misc]
        for name in ("max_rows", "max_queue", "max_sizes", "aging_seconds", "self_test_after", "stall_timeout")
    },
    "row_buckets": lambda value: Limits(row_buckets=value if isinstance(value, str) else [value, 32]),
}


@pytest.mark.parametrize("check", CHECKS)
def test_absurd_values_are_refused_in_one_short_line(check: str) -> None:
    for value in (*ABSURD, np.bool_(True), np.array([1, 2]), object()):
        with pytest.raises(SpecError) as caught:
            CHECKS[check](value)
        assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def test_parameters_of_a_model_repository() -> None:
    for field in ("max_rows", "max_queue", "row_buckets"):
        with pytest.raises(SpecError, match=rf"parameter {field}: got '9+") as caught:
            _ = ModelParameters(**{field: "9" * 5000}).limits
        assert len(str(caught.value)) <= 300
