"""What the machine refuses: a disk that is full, a GPU that is not there. Real limits, in processes of their own."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.checkpoints import random_checkpoint
from tests.support.forked import run_command
from tests.support.snapshot import contents

PROMPT = ("a red circle", "--steps", "1", "--seed", "0", "--threads", "1")
SMALL, GRAPH = 1000, 30_000
"""Bytes a file may have: less than any file that is written, and less than a graph but more than a tokenizer."""


def assert_error(done: CompletedProcess[str], message: str) -> None:
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith("ldm-export: error: ") and message in done.stderr


@pytest.mark.usefixtures("tiny_bundle")  # whose build keeps the traces: on a full disk that fails with a warning
@pytest.mark.parametrize("largest", [SMALL, GRAPH])
def test_build_on_a_full_disk_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, largest: int) -> None:
    done = run_command("build", tiny_checkpoint, "-o", tmp_path / "bundle", largest=largest)
    assert_error(done, "File too large; free some disk space or choose another -o")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("largest", [SMALL, GRAPH])
def test_build_on_a_full_disk_leaves_the_bundle_that_is_there(bundle_copy: Path, tmp_path: Path, largest: int) -> None:
    other = random_checkpoint(tmp_path / "other", seed=1)
    if largest == SMALL:  # a vocabulary of its own, so that the tokenizer is written anew
        shutil.copy(other / "tokenizer/vocab.txt", other / "tokenizer/copy.txt")
    before = contents(tmp_path)
    done = run_command("build", other, "-o", bundle_copy, largest=largest)
    assert_error(done, "File too large; free some disk space or choose another -o")
    assert contents(tmp_path) == before


def test_generate_on_a_full_disk_leaves_no_half_a_image(tiny_bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    done = run_command("generate", tiny_bundle, *PROMPT, "-o", target, largest=SMALL)
    assert_error(done, f"{target}: cannot be written (File too large); choose another -o")
    assert contents(tmp_path) == {}
    target.write_bytes(b"the image before")
    assert_error(run_command("generate", tiny_bundle, *PROMPT, "-o", target, largest=SMALL), "cannot be written")
    assert contents(tmp_path) == {"out.png": b"the image before"}
    assert run_command("generate", tiny_bundle, *PROMPT, "-o", target).returncode == 0
    assert target.stat().st_size > SMALL


def test_verify_on_a_full_disk_leaves_the_bundle_as_it_was(tiny_checkpoint: Path, bundle_copy: Path) -> None:
    before = contents(bundle_copy)
    done = run_command("verify", bundle_copy, "--against", tiny_checkpoint, "--steps", "1", largest=SMALL)
    assert_error(done, f"{bundle_copy}: cannot be written (File too large); free some disk space or verify a copy")
    assert contents(bundle_copy) == before


def test_cuda_without_a_gpu(tiny_bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    done = run_command(
        "generate", tiny_bundle, *PROMPT, "-o", target, "--device", "cuda", environment={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert_error(done, "CUDA")
    assert contents(tmp_path) == {}
    done = run_command(
        "generate", tiny_bundle, *PROMPT, "-o", target, "--device", "auto", environment={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0 and done.stderr.startswith("seed 0; ") and target.exists()


def test_an_interrupt_is_one_line_and_leaves_no_image(tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ("generate", tiny_bundle, *PROMPT, "--steps", 1000, "--width", 512, "-o", tmp_path / "out.png")
    command = [sys.executable, "-m", "ldm_export.cli", *map(str, arguments)]
    interruptible = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # even below a shell's `&`
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **interruptible
    ) as process:
        while "onnxruntime" not in Path(f"/proc/{process.pid}/maps").read_text():  # then the command is under way
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (130, "", "ldm-export: interrupted\n")
    assert contents(tmp_path) == {}
