"""Selects the engine that runs a bundle: the one that the caller names, or the fastest available one."""

from __future__ import annotations

from dataclasses import replace

from ldm_runtime.backends.engine import Choice, Engine, Wish
from ldm_runtime.backends.registry import AUTO, BACKEND_NAMES, BACKENDS
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BackendError

__all__ = ["DEVICES", "Choice", "Wish", "select_backend"]

DEVICES = ("auto", "cpu", "cuda")
"""What callers may give as ``device``."""


def select_backend(bundle: Bundle, backend: str | Engine = AUTO, wish: Wish | None = None) -> tuple[Engine, Choice]:
    """Decide which engine runs a bundle, on which graphs and in which precision. Nothing is loaded.

    Args:
        bundle: The bundle.
        backend: Name of an engine, "auto" for the choice of the lowest rank, or an engine of the caller's own.
        wish: What the caller asks for. None asks for nothing in particular.

    Raises:
        BackendError: The backend or the device is unknown, the engine cannot run the bundle as wished, or no engine
            is available.
    """
    wish = wish or Wish()
    if wish.device not in DEVICES:
        raise BackendError(f"device: got {wish.device!r:.40}, expected one of {', '.join(DEVICES)}")
    if backend == AUTO:
        return _auto(bundle, wish)
    engine = BACKENDS.get(backend) if isinstance(backend, str) else backend
    if not isinstance(engine, Engine):
        raise BackendError(
            f"backend: got {backend!r:.40}, expected one of {', '.join(BACKEND_NAMES)}, or an object with the "
            "interface of ldm_runtime.backends.engine.Engine"
        )
    for choice in engine.choices(bundle, wish):
        return engine, replace(choice, reason="as asked")
    raise BackendError(f"{engine.name}: cannot run {bundle.folder}; choose another backend")


def _auto(bundle: Bundle, wish: Wish) -> tuple[Engine, Choice]:
    best: tuple[Engine, Choice] | None = None
    refused: list[str] = []
    missing = 0
    for engine in BACKENDS.values():
        if reason := engine.available():
            refused.append(f"{engine.name}: {reason}")
            missing += 1
            continue
        limited = wish if best is None else replace(wish, below_rank=best[1].rank)
        try:
            for choice in engine.choices(bundle, limited):
                if best is None or choice.rank < best[1].rank:
                    best = engine, choice
        except BackendError as error:
            refused.append(f"{engine.name}: {error}")
    if best is not None:
        return best
    if missing == len(BACKENDS):
        raise BackendError('no engine is installed; `pip install "ldm-export[openvino]"` (or [onnxruntime], [gpu])')
    raise BackendError(f"no engine can run {bundle.folder} as asked: {'; '.join(refused)}")
