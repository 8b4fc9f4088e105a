"""A bundle that is replaced while it is served: no request is lost, and each image is that of its version."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ldm_export.bundle.publish import publish
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.http.served_model import version_of
from tests.http.test_serve_command import serving
from tests.support.small_bundle import write_small_bundle
from tests.support.waiting import wait_until

REQUEST = {"prompt": "", "seed": 3, "steps": 3}
THREADS = 4


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle, with the versions that replace it later beside it: "second" and "broken"."""
    for seed, name in enumerate(("bundle", "second", "broken")):
        write_small_bundle(tmp_path / name, seed=seed)
    decoder = tmp_path / "broken" / "decoder" / "fp32.onnx"
    decoder.write_bytes(decoder.read_bytes()[:-1])
    return tmp_path / "bundle"


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        text = response.read().decode()
    return json.loads(text) if response.headers["Content-Type"] == "application/json" else text


def pixels(encoded: str) -> NDArray[np.int64]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))), np.int64)


def expected(folder: Path, **options: Any) -> NDArray[np.int64]:
    with LatentDiffusionPipeline.from_bundle(folder, backend="onnxruntime", threads=1) as pipeline:
        return np.asarray(pipeline(seed=3, **options).images[0], np.int64)


def metric(url: str, name: str, **labels: str) -> float:
    shown = ",".join(f'{label}="{value}"' for label, value in {"model": "bundle", **labels}.items())
    found = re.search(rf"^{name}\{{{shown}\}} (\S+)$", call(f"{url}/metrics"), re.MULTILINE)
    assert found, name
    return float(found[1])


def version(url: str) -> str:
    return str(call(f"{url}/v1/models/bundle")["ldm"]["version"])


class Clients:
    """Threads that send the same request again and again, and keep the images in the order of the answers."""

    def __init__(self, url: str):
        self._url, self._stop = url, threading.Event()
        self.images: list[list[NDArray[np.int64]]] = [[] for _ in range(THREADS)]
        self._threads = [threading.Thread(target=self._run, args=(images,)) for images in self.images]

    def _run(self, images: list[NDArray[np.int64]]) -> None:
        while not self._stop.is_set():
            images.append(pixels(call(f"{self._url}/v1/images/generations", REQUEST)["data"][0]["b64_json"]))

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def answered(self, more: int) -> bool:
        """Wait until every thread has so many more images."""
        counts = [len(images) for images in self.images]
        return wait_until(lambda: all(len(images) >= n + more for images, n in zip(self.images, counts, strict=True)))


def events(url: str, steps: int) -> Iterator[dict[str, Any]]:
    """The events of a stream as they arrive."""
    body = {**REQUEST, "steps": steps, "stream": True, "progress": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/images/generations", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        for line in response:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


def test_requests_during_an_exchange(bundle: Path) -> None:
    long, first = expected(bundle, num_inference_steps=900), expected(bundle, num_inference_steps=3)
    second = expected(bundle.with_name("second"), num_inference_steps=3)
    versions = version_of(bundle), version_of(bundle.with_name("second"))
    assert np.abs(first - second).mean() > 10
    log = bundle.with_name("log")
    with serving(bundle, "--watch", 0.02, log=log) as (process, url):
        assert version(url) == versions[0]
        with Clients(url) as clients:
            assert clients.answered(2)
            running = events(url, 900)
            next(running)
            publish(bundle.with_name("second"), bundle)
            assert wait_until(lambda: version(url) == versions[1]) and clients.answered(2)
            *_, last = running
        assert np.abs(pixels(last["b64_json"]) - long).max() <= 1, "a running request ends on the old version"
        for images in clients.images:
            kinds = [0 if np.abs(image - first).max() <= 1 else 1 for image in images]
            assert kinds == sorted(kinds) and set(kinds) == {0, 1}
            assert all(np.abs(image - second).max() <= 1 for image, kind in zip(images, kinds, strict=True) if kind)
        assert wait_until(lambda: metric(url, "ldm_loaded_versions") == 1)
        total = sum(map(len, clients.images)) + 1
        assert metric(url, "ldm_requests_total", outcome="done") == total, "counters go on"

        publish(bundle.with_name("broken"), bundle)
        assert wait_until(lambda: metric(url, "ldm_loads_total", outcome="failed") == 1)
        answer = call(f"{url}/v1/images/generations", REQUEST)
        assert np.abs(pixels(answer["data"][0]["b64_json"]) - second).max() <= 1
        assert version(url) == versions[1] and call(f"{url}/readyz") == "ready\n"
        assert metric(url, "ldm_loads_total", outcome="done") == 2

        shutil.rmtree(bundle)
        assert call(f"{url}/v1/images/generations", REQUEST)["data"][0]["b64_json"] == answer["data"][0]["b64_json"]
        process.terminate()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0 and "Traceback" not in err, err
        assert {json.loads(line)["status"] for line in log.read_text().splitlines()} == {200}
        lines = err.splitlines()
        assert sum(f"bundle: version {versions[1][:12]} takes the requests" in line for line in lines) == 1, err
        assert sum("the new version is not loaded, the old one serves" in line for line in lines) == 1, err


def test_without_a_watch_nothing_is_exchanged(bundle: Path) -> None:
    first = expected(bundle, num_inference_steps=3)
    with serving(bundle, "--watch", 0) as (_, url):
        publish(bundle.with_name("second"), bundle)
        answer = call(f"{url}/v1/images/generations", REQUEST)
        assert np.abs(pixels(answer["data"][0]["b64_json"]) - first).max() <= 1


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_pipeline_that_is_loaded_needs_no_files(bundle: Path, backend: str) -> None:
    sizes = [{}, {"height": 16, "width": 16}, {"height": 16, "width": 8}]
    options = {"backend": backend, "precision": "fp32", "threads": 1}
    with LatentDiffusionPipeline.from_bundle(bundle, **options) as pipeline:
        images = [np.asarray(pipeline(seed=3, num_inference_steps=2, **size).images[0]) for size in sizes]
    with LatentDiffusionPipeline.from_bundle(bundle, **options) as pipeline:
        pipeline.load()
        shutil.rmtree(bundle)
        for image, size in zip(images, sizes, strict=True):
            assert np.array_equal(np.asarray(pipeline(seed=3, num_inference_steps=2, **size).images[0]), image)
