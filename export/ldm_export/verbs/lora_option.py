"""Options for the LoRA adapters of a bundle: which ones a request selects, and how many selections stay loaded."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ldm_export.verbs.options import whole_number
from ldm_runtime.errors import SpecError

__all__ = ["add_lora_option", "add_lora_selections", "lora_fields", "lora_inputs"]


def add_lora_option(verb: argparse.ArgumentParser) -> None:
    """Add the option."""
    verb.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME[:WEIGHT]",
        help="LoRA adapter of the bundle (`ldm-export add-lora`), and the weight of its changes (default 1); may be "
        "repeated",
    )


def add_lora_selections(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the option of servers that bounds the memory of adapters."""
    parser.add_argument(
        "--lora-selections",
        type=whole_number,
        default=2,
        metavar="N",
        help="selections of LoRA adapters that stay loaded; each takes memory (default 2)",
    )


def lora_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The field ``loras`` of ``Request`` that the command line sets.

    Raises:
        SpecError: A weight is not a number, or an adapter is given twice.
    """
    loras: dict[str, float] = {}
    for text in args.lora:
        name, _, weight = text.partition(":")
        try:
            number = float(weight or "1")
        except ValueError:
            raise SpecError(f"lora: got {text!r:.80}, expected NAME or NAME:WEIGHT, e.g. style:0.7") from None
        if name in loras:
            raise SpecError(f"lora: got {name!r:.80} twice, expected each adapter once; add up its weights")
        loras[name] = number
    return {"loras": loras} if loras else {}


def lora_inputs(args: argparse.Namespace) -> dict[str, Any]:
    """The input of the Triton models that the command line sets."""
    return {name.upper(): json.dumps(value) for name, value in lora_fields(args).items()}
