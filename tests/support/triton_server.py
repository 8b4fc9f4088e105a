"""A real Triton server on free loopback ports, from the environment that `make test` makes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ldm_export.cli import main

ENVIRONMENT = Path(__file__).parents[2] / ".venv-triton"
STARTED, STOPPED = 120, 60
"""Seconds that it may take."""
OPTIONS = (
    "--model-control-mode=explicit",
    "--load-model=*",
    "--disable-auto-complete-config",
    "--metrics-interval-ms=200",
    "--exit-timeout-secs=10",
)


@dataclass
class TritonServer:
    """``http``, ``grpc`` and ``metrics`` are host:port; models are loaded and unloaded when a client says so.

    Its python backend runs in ``python``, an environment's folder, with what is installed there.
    """

    repository: Path
    log: Path
    options: Sequence[str] = OPTIONS
    python: Path = ENVIRONMENT
    http: str = ""
    grpc: str = ""
    metrics: str = ""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start it, and wait until its models are ready."""
        assert (ENVIRONMENT / ".triton").exists(), f"{ENVIRONMENT} is missing: `make test` makes it"
        (home,) = ENVIRONMENT.glob("lib/python3*/site-packages/pytriton/tritonserver")
        ports = free_ports(3)
        self.http, self.grpc, self.metrics = (f"127.0.0.1:{port}" for port in ports)
        command = [
            home / "bin" / "tritonserver",
            f"--model-repository={self.repository}",
            f"--backend-directory={home / 'backends'}",
            "--allow-gpu-metrics=false",
            *self.options,
        ]
        for name, port in zip(("http", "grpc", "metrics"), ports, strict=True):
            command += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
        path = f"{self.python / 'bin'}:{os.environ['PATH']}"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PATH": path},
                start_new_session=True,
            )
        end = time.monotonic() + STARTED
        while not self.ready():
            running = self.process.poll() is None
            if not running or time.monotonic() > end:
                self.stop()
                raise AssertionError(f"tritonserver is not ready:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.1)

    def ready(self) -> bool:
        """What `/v2/health/ready` says."""
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def figures(self) -> dict[str, float]:
        """Metrics of the batch scheduler: name{labels}, without the labels of the model, -> value."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        result: dict[str, float] = {}
        for line in lines:
            if line.startswith("ldm_"):
                name, _, value = line.rpartition(" ")
                family, _, labels = name.rstrip("}").partition("{")
                own = [label for label in labels.split(",") if not label.startswith(("model=", "version="))]
                result[f"{family}{{{','.join(own)}}}" if own else family] = float(value)
        return result

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        """Stop it as an operator does, and give its exit code; kill it where it does not listen."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(STOPPED)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"tritonserver did not stop in {STOPPED} s, see {self.log}") from None


@contextmanager
def served(bundle: Path, folder: Path) -> Iterator[TritonServer]:
    """Write a bundle's model repository into ``folder`` and serve it: ONNX Runtime in fp32."""
    options = ["--backend", "onnxruntime", "--precision", "fp32", "--quiet"]
    assert main(["triton", str(bundle), "-o", str(folder / "repository"), *options]) == 0
    server = TritonServer(folder / "repository", folder / "log")
    server.start()
    try:
        yield server
    finally:
        server.stop()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody uses."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
