"""Which layers stay in int8 within a budget."""

from __future__ import annotations

from ldm_calibration.budget import Budget, costly, ranked, select
from ldm_calibration.trials import Comparison


def test_the_selection_releases_the_worst_for_its_work_first() -> None:
    flops = {"a": 100, "b": 100, "c": 10, "float": 40}
    order = ranked({"a": 40.0, "b": 20.0, "c": 30.0}, flops)
    assert order == ["c", "b", "a"] or order == ["b", "c", "a"]
    quality = {0: 30.0, 1: 38.0, 2: 44.0}

    def trial(layers: list[str]) -> Comparison:
        return Comparison((quality[3 - len(layers)],), (1.0,))

    assert select(order, flops, Budget(37, None), trial).layers == tuple(sorted(order[1:]))
    assert select(order, flops, Budget(30, None), trial).layers == ("a", "b", "c")
    assert select(order, flops, Budget(44, None), trial).layers == ("a",)
    failed = select(order, flops, Budget(50, None), trial)
    assert failed.layers == () and failed.attempts[-1] == (0.4, 44.0)


def test_layers_of_much_error_and_little_work_stay_in_float_whatever_the_budget() -> None:
    flops = {"a": 900, "b": 60, "c": 20, "float": 20}
    decibels = {"a": 40.0, "b": 30.0, "c": 34.0}
    assert costly(decibels, flops) == ["c", "b"]  # 0.2 and 0.6 of the error, 0.02 and 0.06 of the work
    assert costly(decibels, flops | {"float": 40}) == ["b"]  # room for one of them; b causes more error
    assert costly(dict.fromkeys("abc", 30.0), flops) == ["c", "b"]
    assert costly({"a": 30.0}, flops) == [] and costly({}, flops) == []

    order = ["c", "b", "a"]
    quality = {1: 44.0, 2: 40.0, 3: 30.0}

    def trial(layers: list[str]) -> Comparison:
        return Comparison((quality[len(layers)],), (1.0,))

    assert select(order, flops, Budget(30, None), trial).layers == ("a", "b", "c")
    assert select(order, flops, Budget(30, None), trial, 1).layers == ("a", "b")
    assert select(order, flops, Budget(42, None), trial, 1).layers == ("a",)
