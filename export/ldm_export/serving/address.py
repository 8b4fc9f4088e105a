"""Addresses of servers: parses host, port and protocol from a URL."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from ldm_runtime.errors import SpecError

__all__ = ["PROTOCOLS", "Address", "parse_url"]

PROTOCOLS = {"http": 8000, "grpc": 8001}
"""Protocol -> Triton's default port."""
SCHEMES = {"http": ("http", False), "https": ("http", True), "grpc": ("grpc", False), "grpcs": ("grpc", True)}


@dataclass(frozen=True)
class Address:
    """Host and port of a server, its protocol ("http" or "grpc"), and whether the connection is encrypted."""

    host: str
    port: int
    protocol: str
    secure: bool = False

    def __str__(self) -> str:
        return f"{self.protocol}{'s' if self.secure else ''}://{self.target}"

    @property
    def target(self) -> str:
        """host:port, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_url(text: str, protocol: str | None = None) -> Address:
    """Parse ``[http|https|grpc|grpcs://]host[:port]``.

    Args:
        text: The URL.
        protocol: "http" or "grpc", for a URL without a scheme; None means http.

    Raises:
        SpecError: The text is not such a URL, or its scheme is of another protocol.
    """
    expected = "expected host, host:port, or one of " + ", ".join(f"{scheme}://host:port" for scheme in SCHEMES)
    try:
        parts = urlsplit(text if "://" in text else f"{protocol or 'http'}://{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        detail = "" if "@" in text else f" ({error})"
        raise SpecError(f"url: got {_shown(text)!r}{detail}, {expected}") from None
    plain = not (parts.path.strip("/") or parts.query or parts.fragment or parts.username or parts.password)
    if parts.scheme not in SCHEMES or not host or not plain or any(char.isspace() for char in text):
        raise SpecError(f"url: got {_shown(text)!r}, {expected}")
    spoken, secure = SCHEMES[parts.scheme]
    if protocol not in (None, spoken):
        raise SpecError(f"url: {text!r} is for {spoken}, but --protocol is {protocol}; leave one of them out")
    return Address(host, PROTOCOLS[spoken] if port is None else port, spoken, secure)


def _shown(text: str) -> str:
    """A URL for messages, without the user name and the password that it may have."""
    scheme, separator, rest = text.rpartition("://") if "://" in text else ("", "", text)
    return f"{scheme.rpartition('@')[2]}{separator}…@{rest.rpartition('@')[2]}" if "@" in text else text
