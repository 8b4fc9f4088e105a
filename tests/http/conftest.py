"""A real server in this process, with two small models: one conditioned on text, and one without conditioning."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn

from ldm_runtime.batching.job import Job
from ldm_runtime.http.app import make_app
from ldm_runtime.http.served_model import ModelOptions, ServedModel
from ldm_runtime.http.served_models import ServedModels
from ldm_runtime.http.server import listening_socket
from ldm_runtime.http.server_options import ServerOptions
from tests.support.measured import record_of
from tests.support.small_bundle import write_small_bundle
from tests.support.small_models import bundle_of, text_model
from tests.support.step_gate import StepGate
from tests.support.waiting import wait_until

ENGINE = ModelOptions({"backend": "onnxruntime", "precision": "fp32", "threads": 1})


@dataclass(frozen=True)
class Served:
    """A running server: its address, its models, and the lines of its access log."""

    url: str
    models: dict[str, ServedModel]
    log: list[str]


def open_models(paths: Sequence[Path], options: ModelOptions = ENGINE) -> dict[str, ServedModel]:
    """The models of bundles, by the names of their folders."""
    return {path.name: ServedModel.open(path, path.name, options) for path in paths}


@contextmanager
def running(models: dict[str, ServedModel] | ServedModels, options: ServerOptions | None = None) -> Iterator[Served]:
    """Serve models on a free port while the block runs."""
    log: list[str] = []
    served = models if isinstance(models, ServedModels) else ServedModels.of(models)
    config = uvicorn.Config(
        make_app(served, options or ServerOptions(), log.append),
        log_level="warning",
        access_log=False,
    )
    server = uvicorn.Server(config)
    with listening_socket(ServerOptions(port=0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            assert wait_until(lambda: server.started)
            opened = {name: bundle.current for name, bundle in served.bundles.items() if bundle.current is not None}
            yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", opened, log)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@contextmanager
def stopped(model: ServedModel) -> Iterator[StepGate]:
    """Stop the UNet of a model before each call while the block runs, so that its requests do not end."""
    unet = model.pipeline.backends["unet"]
    gate = StepGate(unet.run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unet, "run", gate)
        try:
            yield gate
        finally:
            gate.open()


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when the server has cancelled a request, which then ends before its next step."""
    event, cancel = threading.Event(), Job.cancel

    def noted(job: Job) -> None:
        cancel(job)
        event.set()

    monkeypatch.setattr(Job, "cancel", noted)
    return event


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of the bundles "text", with measured settings, and "plain"."""
    folder = tmp_path_factory.mktemp("http")
    bundle_of(text_model(folder / "model"), folder / "text", ()).with_quality(record_of(10))
    write_small_bundle(folder / "plain")
    return [folder / "text", folder / "plain"]


@pytest.fixture(scope="session")
def models(bundles: list[Path]) -> Iterator[dict[str, ServedModel]]:
    """The models "text" and "plain", loaded."""
    opened = open_models(bundles)
    yield opened
    for model in opened.values():
        model.close()


@pytest.fixture(scope="session")
def served(models: dict[str, ServedModel]) -> Iterator[Served]:
    """A server of both models without a key."""
    with running(models) as server:
        yield server
