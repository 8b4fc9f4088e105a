"""Limits and access control of the HTTP server."""

from __future__ import annotations

from dataclasses import dataclass

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import MAX_SECONDS, integer, number, seconds

__all__ = ["LOOPBACK", "ServerOptions"]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
"""Hosts that can only be reached from this machine."""
MIN_KEY, MAX_KEY = 16, 512
MAX = 2**31 - 1


@dataclass(frozen=True)
class ServerOptions:
    """Limits of the HTTP server.

    Attributes:
        host: Address to listen on.
        port: Port; 0 selects a free one.
        api_key: Key that every request must contain. None needs no key, and is refused unless ``host`` is a loopback
            address.
        max_body_bytes: Maximum size of a request body, including images.
        max_prompt_characters: Maximum length of a prompt or negative prompt.
        max_pixels: Maximum pixels of all images of one request together.
        max_images: Maximum number of images of one request.
        max_client_requests: Maximum number of simultaneous requests of one client address.
        timeout: Seconds until a request expires, including time in the queue.
        grace: Seconds that running requests have to end when the server stops.
        watch: Seconds between two checks for new versions of the bundles; 0 turns the checks off.

    Raises:
        SpecError: A limit is not a number in its range, or other machines could use the server without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_body_bytes: int = 32 * 2**20
    max_prompt_characters: int = 4000
    max_pixels: int = 2**23
    max_images: int = 10
    max_client_requests: int = 16
    timeout: float = 300.0
    grace: float = 30.0
    watch: float = 5.0

    def __post_init__(self) -> None:
        integer("port", self.port, 0, 65535)
        for name in ("max_body_bytes", "max_prompt_characters", "max_pixels", "max_images", "max_client_requests"):
            object.__setattr__(self, name, integer(name.replace("_", "-"), getattr(self, name), 1, MAX))
        for name in ("timeout", "grace"):
            object.__setattr__(self, name, seconds(name, getattr(self, name)))
        object.__setattr__(self, "watch", number("watch", self.watch, 0, MAX_SECONDS))
        if self.api_key is None and self.host not in LOOPBACK:
            raise SpecError(
                f"host: got {self.host!r:.60} without a key, expected 127.0.0.1, localhost or ::1; other machines "
                "reach this address, so give a key with --api-key-file"
            )
        if self.api_key is not None and not (
            MIN_KEY <= len(self.api_key) <= MAX_KEY and self.api_key.isascii() and self.api_key.isprintable()
        ):
            raise SpecError(
                f"api key: expected one line of {MIN_KEY} to {MAX_KEY} printable ASCII characters, e.g. from "
                "`openssl rand -hex 24`"
            )
