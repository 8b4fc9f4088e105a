"""A bounded share of the campaign, and the judgement of outcomes; `make fuzz` runs the whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ldm_runtime.errors import LdmError, SpecError
from tests.fuzz.campaign import INPUTS, prepared
from tests.fuzz.outcome import outcome, try_inputs
from tests.fuzz.report import RESULTS, tables

SHARE = {
    "manifests": 400,
    "configs": 150,
    "tokenizers": 200,
    "safetensors": 200,
    "bin": 300,
    "graphs": 12,
    "records": 60,
    "requests": 1000,
    "answers": 200,
}
"""Kind -> inputs; `bodies` are sent in tests/serving, where a server runs."""


@pytest.mark.parametrize("kind", SHARE)
def test_inputs_are_accepted_or_refused(tmp_path: Path, kind: str) -> None:
    counts = try_inputs(prepared(kind, tmp_path), 0, SHARE[kind])
    assert counts.failures == []
    assert counts.accepted and counts.refused


def test_the_share_has_every_kind() -> None:
    assert {*SHARE, "bodies"} == set(INPUTS)
    assert sum(INPUTS.values()) >= 100_000


def raising(error: BaseException) -> object:
    def run() -> None:
        raise error

    return run


def test_outcomes() -> None:
    assert outcome(lambda: None) == "accepted"
    assert outcome(raising(SpecError("no"))) == "refused"
    assert outcome(raising(ValueError("no"))).startswith("ValueError: 'no' at test_fuzz.py:")
    assert outcome(raising(SystemExit(0))).startswith("SystemExit")
    assert outcome(raising(MemoryError())).startswith("MemoryError")
    assert outcome(raising(SpecError(""))).startswith("SpecError with a message of 0 characters")


def test_an_input_that_hangs() -> None:
    """In a process of its own, because an alarm has ended test processes that had threads of many other tests."""
    code = "import time; from tests.fuzz.outcome import outcome; print(outcome(lambda: time.sleep(5), 0.05))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Hang: 'more than 0.05 s'")


def test_a_message_of_an_error_is_one_short_line() -> None:
    assert str(LdmError("unet: got 3,\n  expected 4")) == "unet: got 3, expected 4"
    path = "/" + "/".join(["folder"] * 100) + "/unet.onnx"
    text = str(LdmError(f"{path}: got {'x' * 10_000}, expected a text; rebuild the bundle"))
    assert len(text) == 300
    assert text.startswith("/folder/") and text.endswith(", expected a text; rebuild the bundle")
    assert len(str(LdmError("many short words " * 100))) == 300


def test_the_documentation_has_the_results_of_the_campaigns() -> None:
    page = (RESULTS.parents[1] / "docs" / "reliability.md").read_text()
    assert "\n".join(tables()) in page
