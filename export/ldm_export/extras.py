"""Optional dependencies: if one is missing, the error names the command that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ldm_runtime.errors import BuildError
from ldm_runtime.installation import install_command

__all__ = ["needs"]


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Wrap imports of packages that come with ``extra``.

    Raises:
        BuildError: One of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise BuildError(f"{error.name} is not installed; `{install_command(extra)}`") from None
