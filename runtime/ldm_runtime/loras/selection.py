"""The adapters that a request selects, and their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import number, shown

__all__ = ["MAX_WEIGHT", "Selection", "no_selection", "selection"]

Selection = tuple[tuple[str, float], ...]
"""Name and weight of each selected adapter, sorted by name."""
MAX_WEIGHT = 1000.0
MAX_SELECTED = 16


def selection(given: Any, known: Sequence[str]) -> Selection:
    """Check the field ``loras`` of a request. Adapters with weight 0 change nothing and are left out.

    Args:
        given: Name -> weight; None selects none.
        known: Names of the bundle's adapters.

    Raises:
        SpecError: It is not a mapping of names to numbers, an adapter is not known, or a weight is out of range.
    """
    if given is None:
        return ()
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise SpecError(f'loras: got {shown(given)}, expected names and weights, e.g. {{"style": 0.7}}')
    for name in given:
        if name not in known:
            names = f"one of {', '.join(known)}" if known else "none, because this bundle has no adapters"
            raise SpecError(f"loras: got {shown(name)}, expected {names}; add one with `ldm-export add-lora`")
    if len(given) > MAX_SELECTED:
        raise SpecError(f"loras: got {len(given)} adapters, expected at most {MAX_SELECTED}; select fewer")
    weights = {name: number(f"loras: {name}", weight, -MAX_WEIGHT, MAX_WEIGHT) for name, weight in given.items()}
    return tuple(sorted((name, weight) for name, weight in weights.items() if weight))


def no_selection(given: Any) -> Selection:
    """Check the field ``loras`` for a pipeline that cannot change weights.

    Raises:
        SpecError: It selects an adapter.
    """
    if given:
        raise SpecError(
            f"loras: got {shown(given)}, but the components of this pipeline run elsewhere or were given to it; open "
            "the bundle with onnxruntime or openvino, or merge the adapter with `ldm-export build --lora`"
        )
    return ()
