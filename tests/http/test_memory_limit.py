"""Bundles that share a limit of memory: loaded on first use, the least recently used idle one unloaded."""

from __future__ import annotations

import shutil
import threading
import time
import urllib.error
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ldm_export.bundle.publish import publish
from ldm_export.cli import main
from ldm_runtime import Bundle
from ldm_runtime.batching.counters import Snapshot
from ldm_runtime.errors import BackendError, SpecError
from ldm_runtime.http import served_bundle
from ldm_runtime.http.served_models import ServedModels
from ldm_runtime.required_memory import bundle_bytes
from tests.http.conftest import ENGINE, Served, running
from tests.http.test_new_versions import call, expected, pixels
from tests.support.small_bundle import write_small_bundle
from tests.support.step_gate import StepGate
from tests.support.waiting import wait_until

NAMES = ("a", "b", "c")
BODY = {"prompt": "", "seed": 3, "steps": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three bundles of one size."""
    base = tmp_path_factory.mktemp("limit")
    for seed, name in enumerate(NAMES):
        write_small_bundle(base / name, seed=seed)
    return [base / name for name in NAMES]


@pytest.fixture(scope="module")
def images(folders: list[Path]) -> dict[str, NDArray[np.int64]]:
    """Name of a bundle -> the image of ``BODY``."""
    return {folder.name: expected(folder, num_inference_steps=3) for folder in folders}


def limited(folders: list[Path]) -> ServedModels:
    """The bundles, with memory for two of them."""
    (size,) = {bundle_bytes(Bundle.open(folder)) for folder in folders}
    assert size == sum(path.stat().st_size for path in folders[0].glob("*/fp32.onnx"))
    return ServedModels.open(folders, ENGINE, 2 * size, patience=30.0)


@pytest.fixture
def server(folders: list[Path]) -> Iterator[tuple[Served, ServedModels]]:
    models = limited(folders)
    try:
        with running(models) as served:
            yield served, models
    finally:
        models.close()


def image(server: Served, name: str) -> NDArray[np.int64]:
    return pixels(call(f"{server.url}/v1/images/generations", {**BODY, "model": name})["data"][0]["b64_json"])


def loaded(server: Served) -> list[str]:
    return [entry["id"] for entry in call(f"{server.url}/v1/models")["data"] if entry["ldm"]["loaded"]]


def test_the_least_recently_used_one_makes_room(
    server: tuple[Served, ServedModels], images: dict[str, NDArray[np.int64]]
) -> None:
    served, models = server
    assert call(f"{served.url}/readyz") == "ready\nnot loaded: a, b, c\n" and loaded(served) == []
    for name, then in (("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc"), ("c", "bc"), ("a", "ac")):
        assert np.abs(image(served, name) - images[name]).max() <= 1
        assert loaded(served) == list(then)
    assert call(f"{served.url}/readyz") == "ready\nnot loaded: b\n"
    text = call(f"{served.url}/metrics")
    assert 'ldm_loaded{model="a"} 1.0\nldm_loaded{model="b"} 0.0\n' in text
    assert 'ldm_loads_total{model="a",outcome="done"} 2.0' in text
    assert 'ldm_requests_total{model="b",outcome="done"} 2.0' in text, "counters outlive the loaded version"
    assert models.used() == models.memory


def test_the_metrics_miss_no_request_while_a_bundle_is_unloaded(
    server: tuple[Served, ServedModels], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, _ = server
    changing, add = threading.Event(), served_bundle.merged

    def slow(snapshots: Sequence[Snapshot]) -> Snapshot:
        if threading.current_thread().name.startswith("ldm-loader"):
            changing.set()
            time.sleep(0.3)  # the metrics must wait meanwhile
        return add(snapshots)

    monkeypatch.setattr(served_bundle, "merged", slow)
    with ThreadPoolExecutor() as pool:
        for name in ("a", "b"):
            image(served, name)
        third = pool.submit(image, served, "c")
        assert changing.wait(60)
        assert 'ldm_requests_total{model="a",outcome="done"} 1.0' in call(f"{served.url}/metrics")
        third.result(60)


Stopped = tuple[list[StepGate], list[Future[NDArray[np.int64]]]]


def stopped(served: Served, models: ServedModels, pool: ThreadPoolExecutor, patch: pytest.MonkeyPatch) -> Stopped:
    """Requests for "a" and "b" that wait at the gates of their UNets."""
    gates, answers = [], []
    for name in ("a", "b"):
        image(served, name)
        current = models.bundles[name].current
        assert current is not None
        unet = current.pipeline.backends["unet"]
        gates.append(StepGate(unet.run))
        patch.setattr(unet, "run", gates[-1])
        answers.append(pool.submit(image, served, name))
        gates[-1].wait_for_call()
    return gates, answers


def test_a_bundle_in_use_stays_loaded(
    server: tuple[Served, ServedModels], images: dict[str, NDArray[np.int64]], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, models = server
    with ThreadPoolExecutor() as pool:
        gates, answers = stopped(served, models, pool, monkeypatch)
        third = pool.submit(image, served, "c")
        assert wait_until(lambda: models.bundles["c"].loading is not None)
        assert loaded(served) == ["a", "b"] and not third.done()
        gates[1].open()
        for name, answer in (("b", answers[1]), ("c", third)):
            assert np.abs(answer.result(60) - images[name]).max() <= 1
        assert loaded(served) == ["a", "c"]
        gates[0].open()
        assert np.abs(answers[0].result(60) - images["a"]).max() <= 1


def test_many_requests_for_more_bundles_than_there_is_memory_for(
    server: tuple[Served, ServedModels], images: dict[str, NDArray[np.int64]]
) -> None:
    served, models = server
    wrong: list[str] = []

    def client(first: int) -> None:
        for number in range(first, first + 6):
            name = NAMES[number % 3]
            if np.abs(image(served, name) - images[name]).max() > 1:
                wrong.append(name)
            assert models.used() <= (models.memory or 0)

    threads = [threading.Thread(target=client, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and sum(one.snapshot().outcomes["done"] for one in models.bundles.values()) == 36


def test_what_cannot_be_loaded_in_time(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    models = limited(folders)
    try:
        with running(models) as served, ThreadPoolExecutor() as pool:
            gates, answers = stopped(served, models, pool, monkeypatch)
            monkeypatch.setattr(models, "_patience", 0.1)
            with pytest.raises(urllib.error.HTTPError) as raised:
                image(served, "c")
            text = raised.value.read().decode()
            assert raised.value.code == 503 and "model: c " in text and '"not_ready"' in text
            for gate, answer in zip(gates, answers, strict=True):
                gate.open()
                assert answer.result(60).size
            monkeypatch.setattr(models, "_patience", 30.0)
            assert image(served, "c").size
    finally:
        models.close()


@pytest.mark.parametrize("room", [1.5, 2.0])
def test_a_new_version_needs_memory_beside_the_old_one(
    folders: list[Path], images: dict[str, NDArray[np.int64]], tmp_path: Path, room: float
) -> None:
    first, second = (Path(shutil.copytree(folders[index], tmp_path / str(index))) for index in (0, 1))
    models = ServedModels.open([first], ENGINE, int(room * bundle_bytes(Bundle.open(first))))
    try:
        with running(models) as served:
            assert np.abs(image(served, "0") - images["a"]).max() <= 1
            publish(second, first)
            loading = models.load(models.bundles["0"])
            if room < 2:
                with pytest.raises(BackendError, match=r"memory: needs about .* GB beside"):
                    loading.result(30)
            else:
                loading.result(30)
            assert np.abs(image(served, "0") - images["a" if room < 2 else "b"]).max() <= 1
    finally:
        models.close()


def test_a_damaged_bundle_is_reported_when_it_is_asked_for(folders: list[Path], tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / "damaged")
    (bundle.folder / "decoder" / "fp32.onnx").write_bytes(b"")
    models = ServedModels.open([folders[0], bundle.folder], ENGINE, 10**9)
    try:
        with running(models) as served:
            with pytest.raises(urllib.error.HTTPError) as raised:
                image(served, "damaged")
            assert "model: damaged cannot be loaded (" in raised.value.read().decode()
            assert image(served, "a").size and call(f"{served.url}/readyz") == "ready\nnot loaded: damaged\n"
    finally:
        models.close()


def test_a_limit_below_one_bundle(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SpecError, match="memory: got 1e-06 GB, but a alone needs about"):
        ServedModels.open(folders, ENGINE, 1000)
    assert main(["serve", str(folders[0]), "--memory", "1KB", "--port", "0"]) == 1
    assert "error: memory: got 1e-06 GB, but a alone needs" in capsys.readouterr().err
    for wrong in ("much", "0", "-1GB", "1e400", "nan"):
        with pytest.raises(SystemExit):
            main(["serve", str(folders[0]), f"--memory={wrong}"])
        assert "expected a size, e.g. 8GB or 500MB" in capsys.readouterr().err
