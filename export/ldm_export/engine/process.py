"""Builds an engine in a subprocess, so that all of its memory is freed and a crash of the builder is contained."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from tempfile import TemporaryFile
from typing import Any

from ldm_export.engine.builder import build_engine
from ldm_export.engine.messages import OnProgress
from ldm_export.engine.request import EngineJob
from ldm_runtime.backends.tensorrt_log import one_line
from ldm_runtime.engine_facts import EngineFacts, engine_from_json
from ldm_runtime.errors import BuildError, LdmError

__all__ = ["build_in_subprocess"]

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def build_in_subprocess(job: EngineJob, on_progress: OnProgress = lambda done, total: None) -> EngineFacts:
    """Build an engine in another process. Arguments, result and errors are those of ``builder.build_engine``.

    Raises:
        BuildError: Also if that process ends without an answer, e.g. because memory ran out.
    """
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "ldm_export.engine.process", str(writing)]
    with TemporaryFile() as stderr, os.fdopen(reading, encoding="utf-8") as messages:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr, pass_fds=(writing,)
        )
        os.close(writing)
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as pipe:  # the process has ended, which is reported below
                pipe.write(json.dumps(job.to_json()).encode())
            for line in messages:
                message = json.loads(line)
                if "engine" in message:
                    return engine_from_json(job.target.name, message["engine"])
                if "error" in message:
                    raise BuildError(message["error"])
                on_progress(*message["progress"])
            code = process.wait()
            stderr.seek(0)
            last = one_line(stderr.read()[-2000:].decode(errors="replace").strip().rpartition("\n")[2])
        finally:
            process.kill()
            process.wait()
    name = job.spec.name
    if code == -signal.SIGKILL:
        raise BuildError(f"{name}: the builder was killed, out of memory most likely; free memory and build again")
    raise BuildError(f"{name}: the builder ended with code {code} ({last}); report it with the graph")


def main(arguments: list[str]) -> None:
    """Run the subprocess: read a job from standard input, write JSON messages to the given file descriptor."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    document: dict[str, Any] = json.load(sys.stdin)
    with os.fdopen(int(arguments[0]), "w", encoding="utf-8") as out:

        def send(message: dict[str, Any]) -> None:
            out.write(json.dumps(message) + "\n")
            out.flush()

        try:
            engine = build_engine(EngineJob.from_json(document), lambda done, total: send({"progress": [done, total]}))
        except LdmError as error:
            send({"error": str(error)})
        else:
            send({"engine": engine.to_json()})


if __name__ == "__main__":
    main(sys.argv[1:])
