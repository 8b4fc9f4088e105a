"""Shared parts of the verbs: choices, prompt files, and errors of writing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_runtime.errors import BuildError, SpecError

if TYPE_CHECKING:
    from ldm_export.demo import Model

PRECISIONS = ("fp32", "fp16", "bf16", "int8")


def lines(path: Path) -> list[str]:
    """Read the prompts of a text file, one per line.

    Raises:
        SpecError: The file cannot be read or has no prompts.
    """
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read as a text file of prompts ({error})") from None
    if not any(prompts):
        raise SpecError(f"{path}: got no prompts, expected one a line")
    return [line for line in prompts if line]


def chosen_prompts(file: Path | None, model: Model) -> Sequence[str] | None:
    """Prompts to measure a model with: those of a file, or the demo model's own; None for the family's defaults.

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
    what = f"{error.filename} is no folder" if isinstance(error, FileExistsError) else error.strerror or error
    return BuildError(f"{path}: cannot be written ({what}); {advice}")


def quieten(verbose: bool) -> None:
    """Silence the log handlers of diffusers and transformers."""
    import diffusers
    import transformers

    if not verbose:
        diffusers.utils.logging.set_verbosity_error()
        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
