"""The command line in processes of its own that start quickly: forked from one that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

__all__ = ["run_command", "start_command"]

TIMEOUT = 300  # seconds
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "ldm_export.cli",
        "ldm_export.bundle.build",
        "ldm_export.quality.verification",
        "torch.onnx._internal.exporter._core",
    ]
)


def start_command(*arguments: object, **options: object) -> ForkServerProcess:
    """Start ``ldm-export ARGUMENTS``; options are those of ``_command``."""
    process = _CONTEXT.Process(target=_command, args=(list(map(str, arguments)), str(Path.cwd())), kwargs=options)
    process.start()
    return process


def run_command(
    *arguments: object, largest: int | None = None, environment: dict[str, str] | None = None
) -> CompletedProcess[str]:
    """Run ``ldm-export ARGUMENTS`` to its end and return its exit code and what it printed.

    Args:
        largest: Writing a file beyond so many bytes fails, as on a full disk.
        environment: Variables that are set for this process.
    """
    with TemporaryDirectory() as folder:
        outputs = [f"{folder}/{name}" for name in ("out", "err")]
        process = start_command(*arguments, outputs=outputs, largest=largest, environment=environment or {})
        process.join(TIMEOUT)
        ended = not process.is_alive()
        process.kill()
        assert ended, f"{arguments}: runs for more than {TIMEOUT} seconds"
        out, err = (Path(output).read_text() for output in outputs)
        return CompletedProcess(list(map(str, arguments)), process.exitcode or 0, out, err)


def _command(
    arguments: list[str],
    folder: str,
    outputs: tuple[str, str] = (os.devnull, os.devnull),
    largest: int | None = None,
    environment: dict[str, str] | None = None,
) -> None:
    """Run a command in this process, with its standard output and error in the files ``outputs``."""
    for descriptor, output in zip((1, 2), outputs, strict=True):
        opened = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.dont_write_bytecode = True  # a limit would leave a half of it
    os.chdir(folder)
    os.environ.update(environment or {})
    if largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    from ldm_export.cli import main

    sys.exit(main(arguments))
