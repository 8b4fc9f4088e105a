"""ASGI middleware in front of all endpoints: access control, limits per client, and the access log."""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections import Counter
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm_runtime.http.api_error import ApiError
from ldm_runtime.http.server_options import LOOPBACK, ServerOptions
from ldm_runtime.tracing import remote_context

__all__ = ["Access"]

OPEN = frozenset({"/", "/healthz", "/readyz"})
"""Paths that need no key: the page, which asks for the key, and the health checks, which reveal nothing else."""


class Access:
    """Refuses requests that are not allowed, and logs each request as a line of JSON.

    1. Without a key, the header ``Host`` must name this machine, so that DNS rebinding by a web page fails.
    2. The header ``Origin``, which browsers send, must be the server's, so that other web pages cannot use it.
    3. With a key, ``Authorization`` must contain it, except for the page and health checks: as ``Bearer KEY``, or as
       the password of basic authentication with any user name.
    4. A body has at most ``max_body_bytes``, and a client address at most ``max_client_requests`` requests at a time.

    Args:
        app: The application.
        options: Limits.
        log: Takes the lines of the access log.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions, log: Callable[[str], None]):
        self._app, self._options, self._log = app, options, log
        self._running = Counter[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = (scope.get("client") or ("", 0))[0]
        begun, status, sent = time.monotonic(), 500, 0

        async def counted(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        scope.setdefault("state", {})
        self._running[client] += 1
        try:
            self._check(scope, client)
            with remote_context(Headers(scope=scope)):
                await self._app(scope, _Limited(receive, self._options.max_body_bytes), counted)
        except ApiError as error:
            await error.response()(scope, receive, counted)
        finally:
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]
            facts = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "client": client,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(time.monotonic() - begun, 3),
                "bytes": sent,
                **{name: scope["state"][name] for name in ("model", "images") if name in scope["state"]},
            }
            self._log(json.dumps(facts))

    def _check(self, scope: Scope, client: str) -> None:
        headers, options = Headers(scope=scope), self._options
        host = headers.get("host", "")
        if options.api_key is None and urlsplit(f"//{host}").hostname not in LOOPBACK:
            raise ApiError(403, f"host: got {host!r:.60}, expected 127.0.0.1 or localhost", code="forbidden")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, f"origin: got {origin!r:.60}, expected this server's own page", code="forbidden")
        if options.api_key is not None and scope["path"] not in OPEN:
            given = _key(headers.get("authorization", ""))
            if not hmac.compare_digest(given, options.api_key.encode()):
                raise ApiError(401, "authorization: expected `Authorization: Bearer KEY`", code="invalid_api_key")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > options.max_body_bytes:
            raise _too_large(options.max_body_bytes)
        if self._running[client] > options.max_client_requests:
            raise ApiError(
                429,
                f"client: got more than {options.max_client_requests} requests at a time from one address",
                kind="rate_limit_error",
                code="too_many_requests",
            )


def _key(authorization: str) -> bytes:
    """The key in the header ``Authorization``; empty if it cannot be decoded, which matches no key."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() != "basic":
        return authorization.removeprefix("Bearer ").encode()
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except ValueError:
        return b""


class _Limited:
    """Limits the size of a body while it is received, because its length may not be known before."""

    def __init__(self, receive: Receive, most: int):
        self._receive, self._most, self._read = receive, most, 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        if self._read > self._most:
            raise _too_large(self._most)
        return message


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"body: expected at most {most} bytes", code="too_large")
