"""Every error a user can cause. A message says what, where, got, expected, and what to try next."""

from __future__ import annotations


class LdmError(Exception):
    """Root of all errors of ldm-export; the command line prints its message as one line."""


def interrupted(error: BaseException | None) -> bool:
    """True if a ``KeyboardInterrupt`` is behind an error: a compiled module makes an ``ImportError`` of one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class SpecError(LdmError, ValueError):
    """A value, shape or option is outside what the model or the scheduler takes."""


class CheckpointError(LdmError):
    """A checkpoint is missing, damaged, or not of a supported kind."""


class BuildError(LdmError):
    """A graph or an engine cannot be built, or a built one is not what was asked for."""


class ManifestError(LdmError):
    """A bundle is damaged, incomplete, unsafe, or made for another version."""


class BackendError(LdmError):
    """An engine cannot be loaded or run on this machine."""


class UnsupportedError(BackendError):
    """An engine does not offer what is asked for on any machine, e.g. because the bundle has nothing built for it."""


class DisplacedError(BackendError):
    """Another request has started on the device since; this one cannot continue."""


class QueueFullError(LdmError):
    """A request was refused, because the queue is full or the engine fails; try again later."""


class CancelledError(LdmError):
    """A request was cancelled by its caller, or by a shutdown."""


class DeadlineError(LdmError):
    """A request has passed its deadline."""


class ServerError(LdmError):
    """A server cannot be reached, is not ready, or has answered with an error."""


class AnsweredError(LdmError):
    """The model `ldm_stream` has answered a request of `ldm` with an error, whose message this is.

    Attributes:
        code: Triton's code of that error, as ``TritonError.code``.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code
