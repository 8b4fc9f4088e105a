"""Reads JSON files of a checkpoint, and shortens names for error messages."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldm_runtime.backends.host import first_line
from ldm_runtime.errors import CheckpointError
from ldm_runtime.regular_files import read_regular

__all__ = ["MAX_JSON", "read_json", "shortened"]

MAX_JSON = 16 * 2**20
"""Maximum size of a JSON file in bytes. The index of a checkpoint with ten thousand tensors has one MiB."""


def read_json(file: Path, where: str) -> dict[str, Any]:
    """Read a JSON object from ``file``; error messages start with ``where``.

    Raises:
        CheckpointError: The file is missing, larger than MAX_JSON, not valid JSON, or not a JSON object.
    """
    if not file.is_file():
        raise CheckpointError(f"{where}: {file} is missing; download the checkpoint whole")
    try:
        size = file.stat().st_size
        if size > MAX_JSON:
            raise CheckpointError(
                f"{where}: {file} is {size} bytes long, expected at most {MAX_JSON}; is it JSON at all?"
            )
        content = json.loads(read_regular(file, MAX_JSON, CheckpointError).decode())
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise CheckpointError(f"{where}: {file}: {place}: not JSON: {error.msg}; download the file again") from error
    except (ValueError, RecursionError, OSError) as error:  # not UTF-8, a number with thousands of digits, …
        reason = first_line(error, 100)
        raise CheckpointError(f"{where}: {file} is not JSON: {reason}; download the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: {file} holds a JSON {type(content).__name__}, expected an object {{…}}")
    return content


def shortened(names: Iterable[str], limit: int = 3) -> str:
    """Return the first names and the number of all names, for a message."""
    listed = sorted(names)
    more = f", … ({len(listed)} in all)" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
