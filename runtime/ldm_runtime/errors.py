"""All errors that a user can cause. A message says what is wrong and where, got, expected, and what to do next."""

from __future__ import annotations

__all__ = [
    "MAX_BACKEND_MESSAGE",
    "MAX_MESSAGE",
    "AnsweredError",
    "BackendError",
    "BuildError",
    "CancelledError",
    "CheckpointError",
    "DeadlineError",
    "LdmError",
    "ManifestError",
    "QueueFullError",
    "ServerError",
    "SpecError",
    "UnsupportedError",
    "interrupted",
]

MAX_MESSAGE, MAX_BACKEND_MESSAGE = 300, 1200
"""Maximum length of an error message in characters, because values and names in it may come from untrusted input.
Messages about engines may be longer, because they give a reason for each engine."""
_MIN_WORD = 24


class LdmError(Exception):
    """Root of all errors of ldm-export. Its message is one line of at most ``max_message`` characters.

    Args:
        message: Line breaks become spaces. If the message is too long, its longest words are shortened in the middle.
    """

    max_message = MAX_MESSAGE

    def __init__(self, message: str = "") -> None:
        super().__init__(_one_line(message, self.max_message))


def _one_line(message: str, most: int) -> str:
    words = message.split()
    while (excess := len(" ".join(words)) - most) > 0:
        longest = max(range(len(words)), key=lambda index: len(words[index]))
        word = words[longest]
        if len(word) <= _MIN_WORD:  # many short words
            text = " ".join(words)
            return f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}"
        kept = max(_MIN_WORD, len(word) - excess) - 1
        words[longest] = f"{word[: kept - kept // 2]}…{word[-(kept // 2) :]}"
    return " ".join(words)


def interrupted(error: BaseException | None) -> bool:
    """True if a ``KeyboardInterrupt`` caused the error; compiled modules may turn it into an ``ImportError``."""
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

    max_message = MAX_BACKEND_MESSAGE


class UnsupportedError(BackendError):
    """An engine does not support a request on any machine, e.g. because the bundle has no graph for it."""


class DisplacedError(BackendError):
    """Another request was started on the device, so this one cannot continue."""


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
