"""Converts errors of tritonclient and its transports to a ``ServerError`` of one line."""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ldm_export.serving.address import Address
from ldm_runtime.errors import LdmError, ServerError

__all__ = ["one_line_errors"]

START = "start the server, or check --url and --protocol"
LONGER = "use a longer --timeout, fewer steps or fewer images"
REJECTED = ("requests are waiting already", "Exceeds maximum queue size", "try again later")
OVERDUE = ("deadline", "timed out", "timeout expired", "still waiting after its", "still running after its")


@contextmanager
def one_line_errors(address: Address, timeout: float) -> Iterator[None]:
    """Context manager that converts errors of requests to a server to a ``ServerError`` of one line.

    Args:
        address: Address of the server, for messages.
        timeout: Seconds that a request may take, for messages.

    Raises:
        ServerError: Any error in the block that is not an LdmError already.
    """
    from tritonclient.utils import InferenceServerException

    try:
        yield
    except InferenceServerException as error:
        raise _server_error(address, timeout, str(error.status()), str(error.message() or error)) from None
    except (ConnectionError, socket.gaierror) as error:
        raise ServerError(f"{address}: cannot be reached ({error.strerror or error}); {START}") from None
    except (TimeoutError, queue.Empty):
        raise ServerError(f"{address}: no answer in {timeout:g} s; {LONGER}") from None
    except LdmError:
        raise
    except Exception as error:  # tritonclient and its transports raise many classes if a response violates the protocol
        cause = " ".join(str(error).split()) or type(error).__name__
        other = "grpc" if address.protocol == "http" else "http"
        raise ServerError(f"{address}: no Triton server answers ({cause}); is the port for {other}?") from None


def _server_error(address: Address, timeout: float, status: str, message: str) -> ServerError:
    text = " ".join(message.split())
    if any(mark in text for mark in REJECTED):
        return ServerError(f"{address}: rejected, too many requests are waiting ({text}); try again later")
    if "DEADLINE_EXCEEDED" in status or any(mark in text.lower() for mark in OVERDUE):
        return ServerError(f"{address}: not done in {timeout:g} s ({text}); {LONGER}")
    if "UNAVAILABLE" in status:
        return ServerError(f"{address}: cannot be reached ({text}); {START}")
    return ServerError(f"{address}: {text}")
