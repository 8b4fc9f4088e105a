"""Selects the engine that runs a bundle: the one that the caller names, or the fastest that this machine can run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ldm_runtime.backends.engine import Choice, Engine, Wish
from ldm_runtime.backends.registry import AUTO, BACKEND_NAMES, BACKENDS
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BackendError, UnsupportedError
from ldm_runtime.installation import install_command

__all__ = ["DEVICES", "Choice", "Failure", "Selected", "Wish", "select_backend"]

DEVICES = ("auto", "cpu", "cuda")
"""Valid values of ``device``."""


@dataclass(frozen=True)
class Failure:
    """A choice that was tried and did not work."""

    choice: Choice
    error: str

    def __str__(self) -> str:
        return f"{self.choice.backend} cannot be used: {self.error}"


@dataclass(frozen=True)
class Selected:
    """The selected engine, how it runs the bundle, and one line for each faster engine that could not be used."""

    engine: Engine
    choice: Choice
    refusals: tuple[str, ...] = ()


def select_backend(
    bundle: Bundle, backend: str | Engine = AUTO, wish: Wish | None = None, failures: Sequence[Failure] = ()
) -> Selected:
    """Decide which engine runs a bundle, on which graphs and in which precision. Nothing is loaded.

    Args:
        bundle: The bundle.
        backend: Name of an engine, "auto" for the choice of the lowest rank, or an engine of the caller's own.
        wish: Options of the caller; None for the defaults.
        failures: Choices that "auto" leaves out, because they were tried and did not work.

    Raises:
        BackendError: The backend or the device is unknown, the engine cannot run the bundle as wished, or no engine
            is available.
    """
    wish = wish or Wish()
    if wish.device not in DEVICES:
        raise BackendError(f"device: got {wish.device!r:.40}, expected one of {', '.join(DEVICES)}")
    if backend == AUTO:
        return _auto(bundle, wish, failures)
    engine = BACKENDS.get(backend) if isinstance(backend, str) else backend
    if not isinstance(engine, Engine):
        raise BackendError(
            f"backend: got {backend!r:.40}, expected one of {', '.join(BACKEND_NAMES)}, or an object with the "
            "interface of ldm_runtime.backends.engine.Engine"
        )
    for choice in engine.choices(bundle, wish):
        return Selected(engine, replace(choice, reason="as asked"))
    raise BackendError(f"{engine.name}: cannot run {bundle.folder}; choose another backend")


def _auto(bundle: Bundle, wish: Wish, failures: Sequence[Failure]) -> Selected:
    best: tuple[Engine, Choice] | None = None
    unsupported, refusals = list[str](), [str(failure) for failure in failures]
    missing = 0
    for engine in BACKENDS.values():
        if reason := engine.available():
            unsupported.append(f"{engine.name}: {reason}")
            missing += 1
            continue
        limited = wish if best is None else replace(wish, below_rank=best[1].rank)
        try:
            for choice in engine.choices(bundle, limited):
                failed = any(failure.choice.same_way(choice) for failure in failures)
                if not failed and (best is None or choice.rank < best[1].rank):
                    best = engine, choice
        except UnsupportedError as error:
            unsupported.append(f"{engine.name}: {error}")
        except BackendError as error:
            refusals.append(f"{engine.name} cannot be used: {error}")
    if best is not None:
        engine, choice = best
        return Selected(engine, replace(choice, reason="; ".join((choice.reason, *refusals))), tuple(refusals))
    if missing == len(BACKENDS):
        raise BackendError(f"no engine is installed; `{install_command('openvino')}` (or [onnxruntime], [gpu])")
    raise BackendError(f"no engine can run {bundle.folder} as asked: {'; '.join((*refusals, *unsupported))}")
