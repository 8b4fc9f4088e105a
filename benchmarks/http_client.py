"""A small HTTP/1.1 client for load tests. It uses little CPU time, because it shares the cores with the server."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Connection"]

PATH = "/v1/images/generations"


class Connection:
    """A connection that is kept open, for one request at a time.

    Args:
        url: Address of the server.

    Attributes:
        until_admission: Seconds between sending the last request and its admission, by the header ``Server-Timing``; 0
            if it was not admitted. The server must run on the same machine, because both clocks are compared.
    """

    def __init__(self, url: str):
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._host, self._port = parts.hostname, parts.port
        self.until_admission = 0.0

    async def __aenter__(self) -> Connection:
        await self._open()
        return self

    async def _open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=2**20)

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    async def post(self, fields: dict[str, Any]) -> tuple[int, bytes]:
        """Send a request; returns the status and the body of the answer."""
        status, headers = await self._send(fields)
        return status, await self._reader.readexactly(int(headers[b"content-length"]))

    async def stream(self, fields: dict[str, Any]) -> AsyncIterator[bytes]:
        """Send a request; yields the events of the answer. A caller that ends early calls ``reconnect``."""
        status, headers = await self._send(fields)
        assert status == 200 and headers[b"transfer-encoding"] == b"chunked", (status, headers)
        while size := int(await self._reader.readline(), 16):
            yield await self._reader.readexactly(size)
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)

    async def reconnect(self) -> None:
        """Close the connection, which cancels the request that runs, and open another."""
        self._writer.close()
        await self._open()

    async def _send(self, fields: dict[str, Any]) -> tuple[int, dict[bytes, bytes]]:
        body = json.dumps(fields)
        head = f"POST {PATH} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: application/json\r\n"
        head += f"X-Request-Start: t={time.time():.6f}\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).rstrip().split(b"\r\n")
        pairs = (line.partition(b":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        durations = re.findall(rb"(?:wait|admission);dur=([\d.]+)", headers.get(b"server-timing", b""))
        self.until_admission = sum(map(float, durations)) / 1000
        return int(first.split()[1]), headers
