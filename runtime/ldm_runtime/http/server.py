"""Runs the web application with uvicorn until the process receives a signal to stop."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import uvicorn

from ldm_runtime.errors import BackendError
from ldm_runtime.http.app import make_app
from ldm_runtime.http.bundle_watch import BundleWatch
from ldm_runtime.http.served_models import ServedModels
from ldm_runtime.http.server_options import ServerOptions

__all__ = ["listening_socket", "serve"]

BACKLOG = 256


def serve(
    models: ServedModels,
    options: ServerOptions,
    *,
    log: Callable[[str], None],
    on_ready: Callable[[str], None],
    note: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve models until SIGINT or SIGTERM; then running requests have ``options.grace`` seconds to end.

    Args:
        models: The bundles. They are closed at the end.
        options: Address, limits and access control.
        log: Called with each line of the access log.
        on_ready: Called with the server's URL once it accepts connections.
        note: Called with a line of text for each bundle that was replaced by a new version.

    Raises:
        BackendError: The address cannot be used.
    """
    try:
        with listening_socket(options) as listener:
            host, port = listener.getsockname()[:2]
            config = uvicorn.Config(
                make_app(models, options, log),
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=max(1, round(options.grace)),
            )
            on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            watch = BundleWatch(models, options.watch, note) if options.watch else nullcontext()
            with watch:
                _Server(config).run([listener])
    finally:
        models.close()


class _Server(uvicorn.Server):
    """Ends normally after SIGINT or SIGTERM. uvicorn's own server raises the signal again before models are closed."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop gracefully at a signal while the block runs; at a second SIGINT, at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listening_socket(options: ServerOptions) -> socket.socket:
    """Listen on an address. Connections send each event at once, while TCP would hold small packets back for 40 ms.

    asyncio sets this option only for sockets whose protocol number is set, which those of ``create_server`` lack.

    Raises:
        BackendError: The address cannot be used.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise BackendError(
            f"{options.host}:{options.port}: cannot listen ({error.strerror or error}); use another --host or --port"
        ) from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
