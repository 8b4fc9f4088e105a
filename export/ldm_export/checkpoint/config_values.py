"""Reads configs of a checkpoint's parts: renames old keys, fills in defaults, and checks every value."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

from ldm_export.checkpoint.layout import Part
from ldm_runtime.errors import CheckpointError

__all__ = ["full_config", "with_current_names"]

_COUNTS = {  # key -> maximum
    "encoder_layers": 512,
    "num_hidden_layers": 512,
    "layers_per_block": 32,
    "transformer_layers_per_block": 32,
    "reverse_transformer_layers_per_block": 32,
}
_SIZES = (
    *("sample_size", "in_channels", "out_channels", "block_out_channels", "norm_num_groups", "latent_channels"),
    *("cross_attention_dim", "attention_head_dim", "num_attention_heads", "num_vq_embeddings", "vq_embed_dim"),
    *("vocab_size", "max_position_embeddings", "d_model", "encoder_ffn_dim", "encoder_attention_heads", "head_dim"),
    *("hidden_size", "intermediate_size", "num_train_timesteps"),
)
_LARGEST, _LONGEST, _MOST_STEPS = 2**24, 32, 2**16  # maximum of a number; lengths of a list, of trained_betas
_LISTS = {*_COUNTS, *_SIZES, "only_cross_attention"}  # one value, or a list with one per level
_INDICES = ("disable_corrector",)  # lists of any length, also empty
_NULLABLE = ("pad_token_id",)  # numbers without an annotation that may be null


def with_current_names(part: Part, config: dict[str, Any]) -> dict[str, Any]:
    """Rename the keys of earlier releases; current keys stay as they are.

    Raises:
        CheckpointError: A value of an earlier release cannot be converted.
    """
    older = part.older_keys
    renamed = {older.get(key, key): value for key, value in config.items()} | {
        key: value for key, value in config.items() if key not in older
    }
    return renamed if part.current_config is None else part.current_config(renamed, config)


def full_config(where: str, part: Part, class_name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return every argument of a class, with checked values of the config or defaults. Unknown keys are ignored.

    Args:
        where: Part and file, for error messages.
        part: The part that the config describes.
        class_name: A key of ``part.classes``.
        config: Config with current names.

    Raises:
        CheckpointError: A value has a wrong type or is far too large; the message names the key.
    """
    parameters = inspect.signature(part.classes[class_name].__init__).parameters.values()
    known = {p.name: p for p in parameters if p.default is not inspect.Parameter.empty}
    full = {name: parameter.default for name, parameter in known.items()}
    for key, value in config.items():
        if key in known:
            stated = type(value) is type(full[key]) and value == full[key]  # a default may be infinite
            if not stated and (value is not None or not _may_be_null(key, known[key])):
                _check_value(f"{where}: {key}", key, value, full[key])
            full[key] = _converted(value, full[key])
    return full


def _may_be_null(key: str, parameter: inspect.Parameter) -> bool:
    """True if diffusers accepts null: if the class allows it, for booleans (as false), and for names it compares."""
    default = parameter.default
    return type(None) in get_args(parameter.annotation) or isinstance(default, bool | str) or key in _NULLABLE


def _converted(value: Any, default: Any) -> Any:
    """Convert lists to tuples, and 0 and 1 to booleans where the default is a boolean."""
    if isinstance(value, list):
        return tuple(_converted(each, default) for each in value)
    return bool(value) if isinstance(default, bool) and isinstance(value, int | float) else value


def _check_value(where: str, key: str, value: Any, default: Any) -> None:
    """Check a value against the type of its default, and sizes and counts against plausible bounds."""
    if key == "trained_betas" and value is not None:
        default = (0.0,)
    like = default[0] if isinstance(default, tuple) else default
    fits: Callable[[Any], bool]
    if key in _COUNTS or key in _SIZES:
        most = _COUNTS.get(key, _LARGEST)
        fits, expected = (lambda one: type(one) is int and 1 <= one <= most), f"a whole number from 1 to {most}"
    elif isinstance(like, bool):
        fits, expected = (lambda number: number in (0, 1)), "true or false"
    elif isinstance(like, str):
        fits, expected = (lambda one: isinstance(one, str)), "a string"
    elif like is None:
        fits, expected = (lambda one: isinstance(one, bool | str) or _is_number(one)), "a string or a number"
    else:
        fits, expected = _is_number, f"a number from -{_LARGEST} to {_LARGEST}"
    if isinstance(value, list):
        longest = _MOST_STEPS if key == "trained_betas" else _LONGEST
        fine = default is None or isinstance(default, tuple) or key in (*_LISTS, *_INDICES)
        flat = [each for one in value for each in (one if key in _COUNTS and isinstance(one, list) else [one])]
        shortest = 0 if key in _INDICES else 1
        fine = fine and shortest <= len(value) <= longest and len(flat) <= longest**2 and all(map(fits, flat))
    else:
        fine = (value is None and default is None) or (not isinstance(default, tuple) and fits(value))
    if not fine:
        expected = f"a list in which each value is {expected}" if isinstance(default, tuple) else expected
        got = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}…"
        raise CheckpointError(f"{where}: got {got}, expected {expected}; correct the config or download it again")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST  # False for NaN
