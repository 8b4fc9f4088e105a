"""Options of a request that only Stable Diffusion XL takes: texts of the second encoder, and micro-conditioning."""

from __future__ import annotations

import argparse
from typing import Any

from ldm_export.verbs.options import whole_number
from ldm_runtime.conditioning.micro_conditioning import MICRO_FIELDS

__all__ = ["add_xl_options", "xl_fields", "xl_inputs"]

_TEXTS = {"prompts_2": "prompt", "negative_prompt_2": "negative prompt"}
_PAIRS = {
    "original_size": ("HEIGHT", "WIDTH", "original size of the image on which the model is conditioned"),
    "crops_coords_top_left": ("TOP", "LEFT", "corner of the crop on which the model is conditioned (default 0 0)"),
    "target_size": ("HEIGHT", "WIDTH", "target size on which the model is conditioned"),
}


def add_xl_options(verb: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = verb.add_argument_group("Stable Diffusion XL")
    for name, what in _TEXTS.items():
        group.add_argument(
            f"--{_flag(name)}", metavar="TEXT", help=f"{what} of the second text encoder (default: the {what})"
        )
    for name, (first, second, text) in _PAIRS.items():
        known = "" if "default" in text else " (default: the image's size)"
        group.add_argument(
            f"--{_flag(name)}", nargs=2, type=whole_number, metavar=(first, second), help=f"{text}{known}, in pixels"
        )
    for name, (first, second, _) in _PAIRS.items():
        group.add_argument(
            f"--negative-{_flag(name)}",
            nargs=2,
            type=whole_number,
            metavar=(first, second),
            help=f"--{_flag(name)} for the unconditional branch (default: that of the image)",
        )


def xl_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of ``Request`` that the command line sets."""
    values = {name: getattr(args, _flag(name).replace("-", "_")) for name in (*_TEXTS, *MICRO_FIELDS)}
    return {
        name: tuple(value) if name in MICRO_FIELDS else value for name, value in values.items() if value is not None
    }


def xl_inputs(args: argparse.Namespace) -> dict[str, Any]:
    """Return the inputs of the Triton models that the command line sets."""
    fields = xl_fields(args)
    names = {name: _flag(name).replace("-", "_").upper() for name in fields}
    return {names[name]: [value] if name in _TEXTS else list(value) for name, value in fields.items()}


def _flag(name: str) -> str:
    return name.replace("prompts_2", "prompt_2").replace("_", "-")
