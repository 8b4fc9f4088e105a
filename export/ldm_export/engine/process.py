"""Builds an engine in a process of its own: its memory is given back whole, and if it dies it dies alone."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from ldm_export.engine.builder import build_engine
from ldm_export.engine.messages import Progress, one_line
from ldm_export.engine.request import EngineRequest
from ldm_runtime.bundle import Bundle
from ldm_runtime.engine_facts import Engine, engine_from_json
from ldm_runtime.errors import BuildError, LdmError
from ldm_runtime.spec_json import spec_from_json, spec_to_json
from ldm_runtime.specs import ComponentSpec

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def build_apart(
    graph: Path,
    spec: ComponentSpec,
    precision: str,
    request: EngineRequest,
    target: Path,
    *,
    factor: int,
    islands: Collection[str],
    progress: Progress,
    previous: Bundle | None,
) -> Engine:
    """``build.build_engine`` in another process; arguments, result and errors are the same.

    Raises:
        BuildError: also where that process ends without a word, as it does when memory runs out.
    """
    asked = {
        "graph": str(graph),
        "spec": {"name": spec.name, **spec_to_json(spec)},
        "precision": precision,
        "request": asdict(request),
        "target": str(target),
        "factor": factor,
        "islands": list(islands),
        "previous": None if previous is None else str(previous.folder),
    }
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "ldm_export.engine.process", str(writing)]
    with TemporaryFile() as noise, os.fdopen(reading, encoding="utf-8") as told:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=noise, pass_fds=(writing,)
        )
        os.close(writing)
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as pipe:  # it has died: told below
                pipe.write(json.dumps(asked).encode())
            for line in told:
                message = json.loads(line)
                if "engine" in message:
                    return engine_from_json(target.name, message["engine"])
                if "error" in message:
                    raise BuildError(message["error"])
                progress(*message["progress"])
            code = process.wait()
            noise.seek(0)
            last = one_line(noise.read()[-2000:].decode(errors="replace").strip().rpartition("\n")[2])
        finally:
            process.kill()
            process.wait()
    if code == -signal.SIGKILL:
        raise BuildError(f"{spec.name}: the builder was killed, out of memory most likely; free memory and build again")
    raise BuildError(f"{spec.name}: the builder ended with code {code} ({last}); report it with the graph")


def main(arguments: list[str]) -> None:
    """The other process: reads what is asked on standard input, tells on the file descriptor given."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    asked: dict[str, Any] = json.load(sys.stdin)
    with os.fdopen(int(arguments[0]), "w", encoding="utf-8") as out:

        def tell(message: dict[str, Any]) -> None:
            out.write(json.dumps(message) + "\n")
            out.flush()

        request = asked["request"]
        bounds = tuple((name, tuple(numbers)) for name, numbers in request["bounds"])
        capabilities = tuple(request["compute_capabilities"])
        try:
            made = build_engine(
                Path(asked["graph"]),
                spec_from_json("spec", asked["spec"]["name"], asked["spec"]),
                asked["precision"],
                EngineRequest(**{**request, "bounds": bounds, "compute_capabilities": capabilities}),
                Path(asked["target"]),
                factor=asked["factor"],
                islands=asked["islands"],
                progress=lambda done, total: tell({"progress": [done, total]}),
                previous=None if asked["previous"] is None else Bundle.open(asked["previous"]),
            )
        except LdmError as error:
            tell({"error": str(error)})
        else:
            tell({"engine": made.to_json()})


if __name__ == "__main__":
    main(sys.argv[1:])
