"""The socket of the HTTP server."""

from __future__ import annotations

import socket

from ldm_runtime.http.server import listening_socket
from ldm_runtime.http.server_options import ServerOptions


def test_connections_send_small_packets_at_once() -> None:
    with (
        listening_socket(ServerOptions(port=0)) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
