"""Reports, answers, URLs and terminals that are not what they should be: one line, no traceback, no password."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from ldm_export.cli import main
from ldm_export.serving.address import parse_url
from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime.bundle import file_facts
from ldm_runtime.bundle_layout import MANIFEST, precision_report
from ldm_runtime.engine_facts import EngineFacts
from ldm_runtime.errors import SpecError
from tests.support.small_bundle import write_small_bundle

REPORTS = [b"{nope", b"{}", b"[]", b"\xff", b"[" * 10**5, b'{"islands": [1]}', b'{"islands": {}, "half": NaN}']
REPORTS += [b'{"islands": {}, "half": "x"}', b'{"islands": {}, "int8": -1}']


@pytest.mark.parametrize("report", REPORTS)
def test_inspect_refuses_a_damaged_report(tmp_path: Path, capsys, report: bytes) -> None:
    bundle = write_small_bundle(tmp_path / "bundle", "fp16")
    name = precision_report("unet", "fp16")
    (bundle.folder / name).parent.mkdir()
    (bundle.folder / name).write_bytes(report)
    files = {**bundle.manifest.files, **file_facts(bundle.folder, [name])}
    (bundle.folder / MANIFEST).write_text(replace(bundle.manifest, files=files).to_json())
    assert main(["inspect", "--json", str(bundle.folder)]) == 1
    assert "report/unet.fp16.json" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_inspect_shows_an_engine_with_a_strange_proof(tmp_path: Path, capsys) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    (bundle.folder / "e.engine").write_bytes(b"x")
    shape = ((1,), (1,), (1,))
    engine = EngineFacts("e.engine", "tensorrt", "1", (), "fp32", "0", ({"x": shape},), {"matrix_work": [1]})
    part = replace(bundle.manifest.components["unet"], engines=(engine,))
    files = {**bundle.manifest.files, **file_facts(bundle.folder, ["e.engine"])}
    components = {**bundle.manifest.components, "unet": part}
    manifest = replace(bundle.manifest, files=files, components=components)
    (bundle.folder / MANIFEST).write_text(manifest.to_json())
    assert main(["inspect", str(bundle.folder)]) == 0
    assert "matrix work: none" in capsys.readouterr().out


METADATA = [None, [], {}, {"inputs": 1}, {"inputs": [1]}, {"inputs": [{}]}, {"inputs": [{"name": "SEED"}]}]
METADATA += [{"inputs": [{"name": "SEED", "datatype": "NONE"}, {"name": "PROMPT", "datatype": "BYTES"}]}]


class Hostile(BaseHTTPRequestHandler):
    """A server that speaks the protocol, but describes its model wrongly."""

    metadata: object = None

    def do_GET(self) -> None:
        content = json.dumps(self.metadata).encode() if "ready" not in self.path and "live" not in self.path else b""
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("metadata", METADATA)
def test_the_client_refuses_wrong_metadata(server: str, capsys, monkeypatch, tmp_path: Path, metadata: object) -> None:
    monkeypatch.setattr(Hostile, "metadata", metadata)
    assert main(["client", "a", "--url", server, "--timeout", "5", "-o", str(tmp_path / "o.png")]) == 1
    assert (error := capsys.readouterr().err).startswith(f"ldm-export: error: {server}: ") and error.count("\n") == 1


URLS = ["http://user:secret@host", "user:secret@host", "http://user:secret@host:port", "http://user:se@cret@[::1"]


@pytest.mark.parametrize("url", [*URLS, "http://user:secret@host://x", "http://user:secret＠℀@host"])
def test_a_password_in_a_url_is_not_printed(url: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_url(url)
    assert "secret" not in str(caught.value) and "user" not in str(caught.value) and "cret" not in str(caught.value)


CODES = """
import json, sys
from ldm_export.cli import main

def code(arguments):
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code

sys.exit([code(arguments) for arguments in json.loads(sys.argv[1])] != [0, 1, 0])
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_any_encoding(tmp_path: Path, encoding: str) -> None:
    bundle = write_small_bundle(tmp_path / "bündel-円")
    manifest = replace(bundle.manifest, tools={"名": "×…"})
    (bundle.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    commands = (["inspect", str(bundle.folder)], ["inspect", str(tmp_path / "無")], ["generate", "--help"])
    done = subprocess.run([sys.executable, "-c", CODES, json.dumps(commands)], capture_output=True, env=environment)
    assert b"Traceback" not in done.stderr and done.returncode == 0, done.stderr


@pytest.mark.parametrize("place", [lambda folder: folder / "file" / "cache", lambda folder: Path("/proc/cache")])
def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog, place: Callable[[Path], Path]) -> None:
    bundle: Bundle = write_small_bundle(tmp_path / "bundle")
    (tmp_path / "file").write_text("")
    cache = place(tmp_path)
    with (
        caplog.at_level("WARNING", logger="ldm_runtime"),
        LatentDiffusionPipeline.from_bundle(
            bundle, backend="openvino", precision="fp32", threads=1, cache=cache
        ) as pipeline,
    ):
        assert np.isfinite(pipeline(count=1, seed=1, num_inference_steps=1).arrays).all()
    assert f"cache: {cache}" in caplog.text and "cannot be written" in caplog.text
