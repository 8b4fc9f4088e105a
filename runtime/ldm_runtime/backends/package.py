"""An engine's package: an optional dependency, loaded when a backend is made."""

from __future__ import annotations

import importlib
from types import ModuleType

from ldm_runtime.errors import BackendError, interrupted


def load(module: str, install: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: its name, as imported.
        install: what to type where it is missing, e.g. ``pip install "ldm-export[onnxruntime]"``.

    Raises:
        BackendError: not installed, or its libraries cannot be loaded on this machine.
        KeyboardInterrupt: came while it was loaded; compiled modules turn one into an ``ImportError``.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        if interrupted(error):
            raise KeyboardInterrupt from None
        if isinstance(error, ModuleNotFoundError) and module.startswith(error.name or " "):
            raise BackendError(f"{module} is not installed; `{install}`") from None
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BackendError(f"{module} cannot be loaded: {reason:.300}; install it again: `{install}`") from None
