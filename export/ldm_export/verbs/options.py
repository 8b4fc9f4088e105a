"""Parts that several verbs share: number options, prompt files, and errors of writing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ldm_runtime.errors import BuildError, SpecError
from ldm_runtime.number_checks import shown
from ldm_runtime.regular_files import read_regular
from ldm_runtime.request import AUTO

if TYPE_CHECKING:
    from ldm_export.demo import Model

__all__ = [
    "PRECISIONS",
    "byte_count",
    "chosen_prompts",
    "lines",
    "number_or_auto",
    "quieten",
    "real_number",
    "unwritten",
    "whole_number",
]

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
MAX_PROMPTS = 16 * 2**20
"""Maximum size of a prompt file in bytes."""
MAX_DIGITS = 40
"""Maximum length of a number on the command line."""
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
"""Letter before the B of a size -> bytes."""


def whole_number(text: str) -> int:
    """Parse a whole number for argparse.

    Raises:
        argparse.ArgumentTypeError: The text is not a whole number, or has more than MAX_DIGITS characters.
    """
    try:
        if len(text) <= MAX_DIGITS:
            return int(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"got {shown(text)}, expected a whole number of at most {MAX_DIGITS} digits")


def number_or_auto(text: str) -> int | Literal["auto"]:
    """Parse a whole number or "auto" for argparse; errors as ``whole_number``."""
    return AUTO if text == AUTO else whole_number(text)


def real_number(text: str) -> float:
    """Parse a number for argparse; errors as ``whole_number``."""
    try:
        if len(text) <= MAX_DIGITS:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"got {shown(text)}, expected a number of at most {MAX_DIGITS} characters")


def byte_count(text: str) -> int:
    """Parse a size such as 8GB, 500MB or a number of bytes for argparse; a GB has 10**9 bytes.

    Raises:
        argparse.ArgumentTypeError: The text is not a size, or is below one byte.
    """
    number, unit = text.upper().removesuffix("B"), 1
    if number[-1:] in _UNITS:
        number, unit = number[:-1], _UNITS[number[-1]]
    try:
        if len(text) <= MAX_DIGITS and (size := int(float(number) * unit)) >= 1:
            return size
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"got {shown(text)}, expected a size, e.g. 8GB or 500MB")


def lines(path: Path) -> list[str]:
    """Read the prompts of a text file, one per line.

    Raises:
        SpecError: The file cannot be read or has no prompts.
    """
    try:
        prompts = [line.strip() for line in read_regular(path, MAX_PROMPTS, SpecError).decode().splitlines()]
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: cannot be read as a text file of prompts ({error})") from None
    if not any(prompts):
        raise SpecError(f"{path}: got no prompts, expected one a line")
    return [line for line in prompts if line]


def chosen_prompts(file: Path | None, model: Model) -> Sequence[str] | None:
    """Return prompts to measure a model with: from a file, or the demo model's own; None for the family's defaults.

    Args:
        file: File of prompts, if the user gave one.
        model: A bundle or a checkpoint folder; None for random weights.

    Raises:
        SpecError: The file cannot be read or has no prompts.
        CheckpointError: A weight file cannot be read.
    """
    from ldm_export.demo import default_prompts, is_demo

    if file is not None:
        return lines(file)
    return default_prompts(model) if is_demo(model) else None


def unwritten(path: Path, error: OSError, advice: str) -> BuildError:
    """Return the error for a result that cannot be written."""
    what = f"{error.filename} is not a folder" if isinstance(error, FileExistsError) else error.strerror or error
    return BuildError(f"{path}: cannot be written ({what}); {advice}")


def quieten(verbose: bool) -> None:
    """Silence the log handlers of diffusers and transformers."""
    import diffusers
    import transformers

    if not verbose:
        diffusers.utils.logging.set_verbosity_error()
        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
