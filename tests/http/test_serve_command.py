"""``ldm-export serve`` in an environment without torch: it serves, logs, and stops on a signal."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SERVE = ROOT / ".venv-thin/bin/ldm-export", "serve"
FAST = ("--port", 0, "--backend", "onnxruntime", "--threads", 1)


@contextmanager
def serving(*arguments: object, log: Path | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server and its address. The log of many requests must go to a file, because nobody empties a pipe meanwhile."""
    command = [*map(str, (*SERVE, *arguments, *FAST))]
    with nullcontext(subprocess.PIPE) if log is None else log.open("w") as stdout:
        process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        notes = ""
        while not (found := re.search(r"open (http://\S+) in a browser", notes)):
            line = process.stderr.readline()
            assert line, notes
            notes += line
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_a_signal(bundles: list[Path], stop: signal.Signals) -> None:
    with serving(*bundles) as (process, url):
        body = json.dumps({"prompt": "a circle", "steps": 2, "response_format": "url"}).encode()
        request = urllib.request.Request(f"{url}/v1/images/generations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            (image,) = json.load(response)["data"]
        assert urllib.request.urlopen(image["url"], timeout=30).read().startswith(b"\x89PNG")
        process.send_signal(stop)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0 and "Traceback" not in err, err
        assert [json.loads(line)["status"] for line in out.splitlines()] == [200, 200]


def test_running_requests_end_before_the_server_does(bundles: list[Path]) -> None:
    with serving(bundles[0]) as (process, url):
        body = json.dumps({"prompt": "a circle", "steps": 300, "stream": True, "progress": True}).encode()
        request = urllib.request.Request(f"{url}/v1/images/generations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            response.readline()
            process.terminate()
            assert b"image_generation.completed" in response.read()
        assert process.wait(30) == 0


REFUSED: dict[str, tuple[list[Any], str]] = {
    "no key": (["--host", "0.0.0.0"], "host: got '0.0.0.0' without a key, expected 127.0.0.1"),
    "no key file": (["--api-key-file", "none.txt"], "none.txt: "),
    "rows": (["--max-rows", "65"], "max-rows: got 65, expected 1..8, which the UNet of text takes"),
    "port": (["--port", "99999"], "port: got 99999"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_refuses(bundles: list[Path], case: str) -> None:
    arguments, message = REFUSED[case]
    done = subprocess.run(
        [*map(str, (*SERVE, bundles[0], *FAST, *arguments))], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("ldm-export: error: ")
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_key_from_a_file(bundles: list[Path], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("0123456789abcdef\n")
    with serving(bundles[1], "--api-key-file", tmp_path / "key") as (_, url):
        request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": "Bearer 0123456789abcdef"})
        assert json.load(urllib.request.urlopen(request, timeout=30))["data"][0]["id"] == "plain"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/v1/models", timeout=30)
