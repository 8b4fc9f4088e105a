"""Textual inversion: files of embeddings against diffusers' load_textual_inversion."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from ldm_export.families import open_checkpoint
from ldm_export.textual_inversion import GivenEmbedding, parse_embedding, with_embeddings
from tests.support.torch_pipeline import torch_pipeline

Refused = Callable[..., None]
WIDTH = 128
STEPS = {"num_inference_steps": 2}
PROMPTS = ["a <cat> photo", "<Cat>, style red <cat>'s", "a red circle"]


def vectors(count: int, seed: int = 0, width: int = WIDTH) -> torch.Tensor:
    """Embeddings that change an image."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def web_ui(tensor: torch.Tensor) -> dict[str, Any]:
    """The content of a file of AUTOMATIC1111's web UI."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": tensor},
        "name": "style",
        "step": 9,
        "sd_checkpoint": None,
    }


def images(pipeline: Any, prompts: list[str], **options: Any) -> NDArray[np.int64]:
    return np.stack([np.asarray(image, np.int64) for image in pipeline(prompts, **options).images])


def theirs(pipeline: Any, prompts: list[str]) -> NDArray[np.int64]:
    pipeline.set_progress_bar_config(disable=True)
    with torch.random.fork_rng(devices=[]):
        return images(
            pipeline, prompts, generator=torch.manual_seed(1), negative_prompt=["style"] * len(prompts), **STEPS
        )


def test_images_equal_diffusers(sd2_checkpoint: Path, tmp_path: Path) -> None:
    """A file of diffusers with three vectors, and one of the web UI with one, in one checkpoint."""
    torch.save({"<cat>": vectors(3)}, tmp_path / "cat.bin")
    torch.save(web_ui(vectors(1, 1)), tmp_path / "renamed.pt")  # the token is that in the file
    pipeline = StableDiffusionPipeline.from_pretrained(sd2_checkpoint)
    plain = theirs(pipeline, PROMPTS)
    for name in ("cat.bin", "renamed.pt"):
        pipeline.load_textual_inversion(tmp_path, weight_name=name)
    given = [parse_embedding(str(tmp_path / name)) for name in ("cat.bin", "renamed.pt")]
    checkpoint = with_embeddings(open_checkpoint(sd2_checkpoint), given)
    assert checkpoint.added_tokens == {"tokenizer": ("<cat>", "<cat>_1", "<cat>_2", "style")}
    assert [one["token"] for one in checkpoint.embeddings] == ["<cat>", "style"]
    with torch_pipeline(checkpoint, tmp_path / "files") as pipe:
        expected = theirs(pipeline, PROMPTS)
        ours = images(pipe, PROMPTS, negative_prompt="style", seed=1, **STEPS)
        assert np.abs(ours - expected).max() <= 1
        assert (np.abs(plain - expected).max(axis=(1, 2, 3)) > 1).all()  # the third by its negative prompt
        long = "<cat> " * 60
        ours = images(pipe, [long], negative_prompt="style", seed=1, **STEPS)
        assert np.abs(ours - theirs(pipeline, [long])).max() <= 1


def test_images_of_xl_equal_diffusers(xl_checkpoint: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_checkpoint)
    widths = {"clip_l": pipeline.text_encoder.config.hidden_size, "clip_g": pipeline.text_encoder_2.config.hidden_size}
    file = tmp_path / "dog.safetensors"
    save_file({name: vectors(2, width, width) for name, width in widths.items()}, file)
    state = load_file(file)
    for name, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(state[name], token="<cat>", text_encoder=encoder, tokenizer=tokenizer)
    checkpoint = with_embeddings(open_checkpoint(xl_checkpoint), [GivenEmbedding(file, "<cat>")])
    with torch_pipeline(checkpoint, tmp_path / "files") as pipe:
        ours = images(pipe, PROMPTS[:2], negative_prompt="style", seed=1, **STEPS)
    assert np.abs(ours - theirs(pipeline, PROMPTS[:2])).max() <= 1


def test_names_of_tokens(sd2_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sd2_checkpoint)
    save_file({"emb_params": vectors(2)}, tmp_path / "easy.safetensors")
    save_file({"<dog>": vectors(1)[0]}, tmp_path / "learned.safetensors")
    names = ("easy.safetensors", "learned.safetensors", "learned.safetensors:toy")
    added = with_embeddings(checkpoint, [parse_embedding(f"{tmp_path}/{name}") for name in names])
    assert added.added_tokens == {"tokenizer": ("easy", "easy_1", "<dog>", "toy")}
    assert [part for part, one in added.components.items() if "embeddings" in one.depends] == ["text_encoder"]


def test_refusals(sd2_checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(sd2_checkpoint, tmp_path / "checkpoint")
    cases: dict[str, tuple[dict[str, torch.Tensor], str, str]] = {
        "wide": ({"<cat>": vectors(1, width=64)}, "", "<cat>: got float32 [1, 64], expected up to 75 vectors of 128"),
        "many": ({"<cat>": vectors(76)}, "", "got float32 [76, 128], expected up to 75 vectors"),
        "whole": ({"<cat>": torch.ones(1, WIDTH, dtype=torch.int64)}, "", "got I64 [1, 128], expected up to"),
        "known": ({"red</w>": vectors(1)}, "", "token 'red</w>' exists in the tokenizer"),
        "xl": ({"clip_l": vectors(1), "clip_g": vectors(1)}, "", "got the tensors clip_g, clip_l, expected one tensor"),
        "spaces": ({"<cat>": vectors(1)}, ":a b", "got token 'a b', expected a text without spaces"),
    }
    for name, (state, token, message) in cases.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        arguments = ("--embedding", f"{name}.safetensors{token}", "-o", "bundle")
        refused("build", "checkpoint", *arguments, message=message)
    refused("build", "checkpoint", "--embedding", "none.pt", "-o", "bundle", message="no such file, expected FILE or")
    (tmp_path / "notes.pt").write_text(json.dumps({"a": 1}))
    refused("build", "checkpoint", "--embedding", "notes.pt", "-o", "bundle", message="expected a torch.save or")
