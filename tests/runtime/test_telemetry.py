"""No process opens a network connection or writes to the home folder, whichever engine it imports."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from ldm_runtime import telemetry
from ldm_runtime.backends.host import import_engine
from tests.support.small_bundle import write_small_bundle

GENERATE = """
import sys, time
from ldm_runtime import LatentDiffusionPipeline
with LatentDiffusionPipeline.from_bundle(sys.argv[2], backend=sys.argv[1], threads=1) as pipeline:
    pipeline(count=1, seed=1, num_inference_steps=2)
time.sleep(3)
"""
MEASURE = """
import sys, time
import ldm_calibration.sessions, ldm_export.quality.layerwise, ldm_export.bundle.precision_stages
ldm_calibration.sessions.load_onnxruntime()
time.sleep(3)
"""
ENGINES = ("onnxruntime", "openvino")
CONNECTS = re.compile(r"(connect|send\w*)\(.*AF_INET")


def connections(folder: Path, script: str, *arguments: str) -> list[str]:
    """Calls of a process that connect or send. Its home folder is empty and must stay so."""
    assert shutil.which("strace") is not None, "strace is missing: `make test` installs it"
    home, trace = folder / "home", folder / "trace"
    home.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "CI"))}
    environment.pop(telemetry.VARIABLE, None)
    command = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=network", "-o", str(trace)]
    done = subprocess.run(
        [*command, sys.executable, "-c", script, *arguments],
        env=environment | {"HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [str(path) for path in home.rglob("*")] == []
    return [line for line in trace.read_text(errors="replace").splitlines() if CONNECTS.search(line)]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[list[str]]]]:
    """Connections of each process. They run at the same time, because each waits for reports at its end."""
    folder = tmp_path_factory.mktemp("traced")
    bundle = str(write_small_bundle(folder / "bundle").folder)
    commands = {engine: (GENERATE, engine, bundle) for engine in ENGINES} | {"measure": (MEASURE,)}
    with ThreadPoolExecutor(len(commands)) as pool:
        yield {name: pool.submit(connections, folder / name, *command) for name, command in commands.items()}


@pytest.mark.parametrize("engine", ENGINES)
def test_generating_an_image_opens_no_connection(traced: dict[str, Future[list[str]]], engine: str) -> None:
    assert traced[engine].result() == []


def test_measuring_opens_no_connection(traced: dict[str, Future[list[str]]]) -> None:
    assert traced["measure"].result() == []


def test_the_variable_is_set_for_processes_that_are_started_and_the_users_value_stays(monkeypatch) -> None:
    assert os.environ[telemetry.VARIABLE] == "1"
    monkeypatch.setenv(telemetry.VARIABLE, "0")
    telemetry.disable_reports()
    assert os.environ[telemetry.VARIABLE] == "0"


def test_the_reporter_is_hidden_while_an_engine_is_imported_and_no_longer(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "openvino_telemetry.py").write_text("loaded = True\n")
    (tmp_path / "toy_engine.py").write_text(
        "try:\n    import openvino_telemetry\n    sends = True\nexcept ImportError:\n    sends = False\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {name: module for name, module in sys.modules.items() if name.startswith("openvino_telemetry")}
    assert not import_engine("toy_engine", "toy").sends
    assert {name: module for name, module in sys.modules.items() if name.startswith("openvino_telemetry")} == before


def test_threads_that_import_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reporter stays hidden until the last block ends, then is the same module; other imports do not disturb."""
    reporter = types.ModuleType("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", reporter)
    ended = threading.Event()

    def change_modules() -> None:
        for index in itertools.count():
            names = [f"ldm_test_{index}_{number}" for number in range(50)]
            sys.modules.update(dict.fromkeys(names, reporter))
            for name in names:
                del sys.modules[name]
            if ended.is_set():
                return

    def hide(_: int) -> bool:
        with telemetry.hidden_reporter():
            hidden = [sys.modules["openvino_telemetry"]]
            time.sleep(0)  # lets another thread run
            hidden.append(sys.modules["openvino_telemetry"])
        return hidden == [None, None]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(5) as pool:
            changing = pool.submit(change_modules)
            try:
                assert all(pool.map(hide, range(100)))
            finally:
                ended.set()
            changing.result()
    finally:
        sys.setswitchinterval(interval)
    assert sys.modules["openvino_telemetry"] is reporter
