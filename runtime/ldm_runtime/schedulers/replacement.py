"""Replaces a model's scheduler by another one with the options of its checkpoint, like diffusers' ``from_config``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import shown
from ldm_runtime.schedulers import SCHEDULERS, Scheduler
from ldm_runtime.schedulers.noise_schedule import COMPVIS_SPACING

__all__ = ["GIVEN", "options_given", "replacement"]

GIVEN = "_given"
"""Key in a bundle's scheduler config: the options in the checkpoint, without the defaults of the class."""
LISTS = ("trained_betas", "disable_corrector")
LONGEST, LARGEST = 64, 2.0**53


def options_given(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a checkpoint's config that are options of some scheduler here, ready for JSON."""
    known = {name for scheduler in SCHEDULERS.values() for name in _options(scheduler)}
    return {name: value for name, value in config.items() if name in known and _plain(name, value)}


def replacement(name: str, config: Mapping[str, Any]) -> Scheduler:
    """Return the scheduler ``name`` for a model whose own scheduler has ``config``.

    It takes those options of the model's checkpoint that it has; others have its own defaults. Without the entry
    ``GIVEN``, options that differ from the defaults of the model's scheduler count as given.

    Args:
        name: Class name of diffusers, one of ``SCHEDULERS``.
        config: The scheduler in a bundle's manifest.

    Raises:
        SpecError: There is no such scheduler, or it does not support a value in the checkpoint.
    """
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise SpecError(f"scheduler: got {shown(name)}, expected one of {', '.join(SCHEDULERS)}")
    given = config.get(GIVEN)
    if not isinstance(given, Mapping):
        own = SCHEDULERS[config["class"]]().to_config()
        given = {option: value for option, value in config.items() if own.get(option) != value}
    if given.get("timestep_spacing") == COMPVIS_SPACING and config["class"] != name:
        given = {option: value for option, value in given.items() if option != "timestep_spacing"}
    options = _options(SCHEDULERS[name])
    return SCHEDULERS[name].from_config({option: value for option, value in given.items() if option in options})


def _options(scheduler: type[Scheduler]) -> set[str]:
    return {field.name for field in dataclasses.fields(scheduler)}  # type: ignore[arg-type]


def _plain(name: str, value: Any) -> bool:
    if isinstance(value, list | tuple):
        return name in LISTS
    if isinstance(value, str):
        return len(value) <= LONGEST
    return value is None or (isinstance(value, int | float) and abs(value) <= LARGEST)  # not NaN
