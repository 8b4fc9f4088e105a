"""Bad input at the command line: one line on standard error, exit code 1, and the disk as it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import edit_json

Refused = Callable[..., None]
PROMPT = "a red circle"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda c: (shutil.rmtree(c), c.mkdir()), "checkpoint is empty, expected a checkpoint with model_index"),
    "none": (shutil.rmtree, "checkpoint is missing, expected a checkpoint folder"),
    "a file": (lambda c: (shutil.rmtree(c), c.write_text("")), "checkpoint is a file, expected a checkpoint folder"),
    "another pipeline": (
        lambda c: edit_json(c / "model_index.json", _class_name="StableDiffusion3Pipeline"),
        "model_index.json is of a 'StableDiffusion3Pipeline' (Stable Diffusion 3, a transformer), expected LDMText",
    ),
    "no index": (lambda c: (c / "model_index.json").unlink(), "model_index.json is missing"),
    "corrupt index": (lambda c: truncate(c / "model_index.json"), "model_index.json: line "),
    "corrupt config": (lambda c: truncate(c / "unet/config.json"), "unet/config.json: line "),
    "binary config": (lambda c: (c / "bert/config.json").write_bytes(b"\xff\x00"), "bert/config.json is not JSON"),
    "corrupt scheduler": (lambda c: truncate(c / "scheduler/scheduler_config.json"), "scheduler_config.json: line "),
    "absurd config": (lambda c: edit_json(c / "unet/config.json", sample_size=-1), "sample_size: got -1, expected a"),
    "no weights": (lambda c: (c / "unet/diffusion_pytorch_model.safetensors").unlink(), "unet: no weights in "),
    "truncated weights": (lambda c: truncate(c / "bert/model.safetensors"), "bert/model.safetensors: damaged or trunc"),
    "empty weights": (lambda c: (c / "bert/model.safetensors").write_bytes(b""), "bert/model.safetensors: damaged or"),
    "other weights": (
        lambda c: shutil.copy(c / "unet/diffusion_pytorch_model.safetensors", c / "bert/model.safetensors"),
        "model.safetensors and config.json describe different models",
    ),
    "no vocabulary": (lambda c: [path.unlink() for path in (c / "tokenizer").glob("*")], "no vocab.txt or tokenizer."),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_build_from_a_bad_checkpoint(refused: Refused, checkpoint: Path, case: str) -> None:
    damage, message = CHECKPOINTS[case]
    damage(checkpoint)
    refused("build", checkpoint, "-o", "bundle", message=message)


def test_build_onto_a_folder_that_is_no_bundle(refused: Refused, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/.hidden").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in ("notes", "file", ".", ".."):
        refused("build", tiny_checkpoint, "-o", target, message=": exists and is not a bundle; choose another -o")


@pytest.mark.parametrize("target", ["file/bundle", "file/sub/bundle", "/proc/bundle", "x" * 300])
def test_build_where_nothing_can_be_written(refused: Refused, tiny_checkpoint: Path, tmp_path: Path, target) -> None:
    (tmp_path / "file").write_text("mine")
    refused("build", tiny_checkpoint, "-o", target, message=target.rpartition("/")[0] or "File name too long")


INVALID_REQUESTS = {
    "100 000 characters": (["a" * 10**5], ": got 100000 characters, expected at most 50000; shorten it"),
    "no Unicode": (["a \udcff"], ": character 2 is the lone surrogate U+DCFF, expected Unicode"),
    "33 prompts": (["a"] * 33, "images: got 33 in one call, expected 1..32; make several calls"),
    "width 63": (["--width", "63", PROMPT], "width: got 63, expected a multiple of 8 from 16 to 1024 pixels"),
    "height 0": (["--height", "0", PROMPT], "height: got 0, expected a multiple of 8"),
    "height 2000": (["--height", "2000", PROMPT], "height: got 2000, expected a multiple of 8 from 16 to 1024"),
    "steps 0": (["--steps", "0", PROMPT], "steps: got 0, expected 1..1000"),
    "steps 1001": (["--steps", "1001", PROMPT], "steps: got 1001, expected 1..1000"),
    "guidance nan": (["--guidance", "nan", PROMPT], "guidance_scale: got nan, expected a finite number"),
    "guidance inf": (["--guidance=-inf", PROMPT], "guidance_scale: got -inf, expected a finite number"),
    "guidance too large": (["--guidance", "1e38", PROMPT], "after denoising, expected at most 1e+09; lower guidance"),
    "eta nan": (["--eta", "nan", PROMPT], "eta: got nan, expected a finite number >= 0"),
    "eta -0.1": (["--eta", "-0.1", PROMPT], "eta: got -0.1, expected a finite number >= 0"),
    "eta 1000": (["--eta", "1000", PROMPT], "eta: got 1000"),
    "no images": (["--images-per-prompt", "0", PROMPT], "images_per_prompt: got 0, expected a whole number from 1"),
    "seed": (["--seed", str(2**64), PROMPT], f"seed: got {2**64}, expected an integer from"),
    "negative": (["--negative-prompt", "a" * 10**5, PROMPT], "got 100000 characters, expected at most 50000"),
    "threads -1": (["--threads", "-1", PROMPT], "threads: got -1"),
    "threads 10**12": (["--threads", str(10**12), PROMPT], "threads: got 1000000000000"),
    "no folder": (
        ["-o", "file/out.png", PROMPT],
        "file/out.png: cannot be written (file is not a folder); choose",
    ),
    "a folder": (["-o", "folder", PROMPT], "folder: is a folder, expected the name of a file; choose another name"),
    "no name": (["-o", ".", PROMPT], ".: is a folder"),
    "the root": (["-o", "/", PROMPT], "/: is a folder"),
    "no place": (["-o", "/proc/out.png", PROMPT], "/proc/out.png: cannot be written"),
    "a long name": (["-o", "x" * 300 + ".png", PROMPT], "File name too long"),
    "no suffix": (["-o", "out", PROMPT], "out: expected a name that ends in .png, .jpg, .jpeg, .webp"),
    "another suffix": (["-o", "out.mp4", PROMPT], "out.mp4: expected a name that ends in .png"),
}


@pytest.mark.parametrize("case", INVALID_REQUESTS)
def test_generate_what_cannot_be(refused: Refused, tiny_bundle: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    arguments, message = INVALID_REQUESTS[case]
    refused("generate", "--steps", "2", tiny_bundle, *arguments, message=message)


VERIFIED = {
    "tolerance nan": (["--tolerance", "nan"], "tolerance: got nan, expected a finite number >= 0"),
    "tolerance inf": (["--tolerance", "inf"], "tolerance: got inf, expected a finite number >= 0"),
    "steps 0": (["--steps", "0"], "steps: got 0, expected 1..1000"),
    "no checkpoint": (["--against", "nowhere"], "nowhere is missing, expected a checkpoint folder"),
    "no prompts file": (["--prompts", "nowhere"], "nowhere: cannot be read (No such file or directory)"),
    "no text": (["--prompts", "binary"], "binary: cannot be read as a text file of prompts"),
    "no prompts": (["--prompts", "blank"], "blank: got no prompts, expected one a line"),
    "too long": (["--prompts", "long"], "prompt 0: got 100000 characters"),
    "report": ([], "report is not a folder); free some disk space or verify a copy"),
}


@pytest.mark.parametrize("case", VERIFIED)
def test_verify_what_cannot_be(refused: Refused, tiny_checkpoint: Path, bundle_copy: Path, case: str) -> None:
    for name, content in (("binary", b"\xff"), ("blank", b"\n \n"), ("long", b"a" * 10**5), ("bundle/report", b"")):
        (bundle_copy.parent / name).write_bytes(content)
    arguments, message = VERIFIED[case]
    refused("verify", bundle_copy, "--against", tiny_checkpoint, "--steps", "1", *arguments, message=message)
