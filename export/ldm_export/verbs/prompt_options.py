"""Options about how a model reads prompts."""

from __future__ import annotations

import argparse
from typing import Any

from ldm_export.verbs.options import whole_number

__all__ = ["add_prompt_options", "prompt_fields", "prompt_inputs"]

_FIELDS = ("negative_prompt", "clip_skip", "prompt_chunks", "prompt_weights")


def add_prompt_options(verb: argparse.ArgumentParser) -> None:
    """Add the options."""
    verb.add_argument("--negative-prompt", metavar="TEXT", help="text that describes what the image must not show")
    verb.add_argument(
        "--clip-skip",
        type=whole_number,
        metavar="N",
        help="number of last layers of a CLIP text encoder to skip for prompts (default 0)",
    )
    verb.add_argument(
        "--prompt-chunks",
        type=whole_number,
        metavar="N",
        help="maximum number of chunks of 75 tokens into which a long prompt is split, for Stable Diffusion (default "
        "1, which cuts long prompts off)",
    )
    verb.add_argument(
        "--prompt-weights",
        action="store_const",
        const=True,
        help="read weights in prompts, e.g. (word:1.3), (two words)1.3, (two words)+ and word-, for Stable Diffusion",
    )


def prompt_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of ``Request`` that the command line sets."""
    return {name: value for name in _FIELDS if (value := getattr(args, name)) is not None}


def prompt_inputs(args: argparse.Namespace) -> dict[str, Any]:
    """Return the inputs of the Triton models that the command line sets."""
    return {name.upper(): value for name, value in prompt_fields(args).items()}
