"""Weights in several files: the index, missing shards, and shards that lead out of their folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm_export.checkpoint.json_files import read_json
from ldm_export.checkpoint.weights import read_weights
from ldm_runtime.errors import CheckpointError
from tests.support.checkpoints import edit_json, write_json, write_tensors, write_weights
from tests.support.weight_files import STATE, assert_read


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_shard_missing(tmp_path: Path, format: str) -> None:
    write_weights(tmp_path, STATE, format=format, shards=2)
    (tmp_path / f"diffusion_pytorch_model-00002-of-00002.{format}").unlink()
    with pytest.raises(CheckpointError, match=r"shard 'diffusion_pytorch_model-00002-of-00002\S*' is missing"):
        read_weights(tmp_path, "unet")


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/{}/outside.safetensors",
        "sub/../../outside.safetensors",
        "sub/inside.safetensors",
        "..",
        "a\0b",
        "x" * 999,
    ],
)
def test_shard_outside_the_folder(tmp_path: Path, shard: str) -> None:
    write_tensors(tmp_path / "outside.safetensors", STATE)
    (tmp_path / "unet" / "sub").mkdir(parents=True)
    write_tensors(tmp_path / "unet" / "sub" / "inside.safetensors", STATE)
    index = {"weight_map": dict.fromkeys(STATE, shard.format(str(tmp_path).lstrip("/")))}
    write_json(tmp_path / "unet" / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=r"shard '.*' leads elsewhere, expected the name of a file in .*unet"):
        read_weights(tmp_path / "unet", "unet")


def test_shard_linked_outside_the_folder(tmp_path: Path) -> None:
    write_tensors(tmp_path / "outside.safetensors", STATE)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "a.safetensors").symlink_to(tmp_path / "outside.safetensors")
    write_json(
        tmp_path / "unet" / "model.safetensors.index.json", {"weight_map": dict.fromkeys(STATE, "a.safetensors")}
    )
    with pytest.raises(CheckpointError, match=r"shard 'a.safetensors' leads elsewhere"):
        read_weights(tmp_path / "unet", "unet")


def test_shards_of_a_hugging_face_cache(tmp_path: Path) -> None:
    folder, blobs = tmp_path / "models--x--y" / "snapshots" / "0123" / "unet", tmp_path / "models--x--y" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    write_weights(folder, STATE, format="safetensors", shards=2)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("../../../blobs") / str(number))
    assert_read(folder, STATE)


def test_links_to_blobs_of_a_cache_elsewhere(tmp_path: Path) -> None:
    """Earlier versions of huggingface_hub filled a folder outside the cache with links."""
    folder, blobs = tmp_path / "unet", tmp_path / "hub" / "models--x--y" / "blobs"
    folder.mkdir()
    blobs.mkdir(parents=True)
    write_weights(folder, STATE, format="safetensors", shards=2)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert_read(folder, STATE)


def test_index_and_shard_disagree(tmp_path: Path) -> None:
    write_weights(tmp_path, STATE, format="safetensors", shards=2)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    weight_map = read_json(index, "unet")["weight_map"]
    edit_json(index, weight_map={name: shard for name, shard in weight_map.items() if name != "scalar"})
    assert_read(tmp_path, STATE)
    edit_json(index, weight_map=weight_map | {"ghost": weight_map["scalar"]})
    with pytest.raises(CheckpointError, match=r"shard \S+ lacks ghost: the index lists 3 tensors .*, it holds 2"):
        read_weights(tmp_path, "unet")


def test_tensor_in_two_shards_is_the_listed_one(tmp_path: Path) -> None:
    write_weights(tmp_path, STATE, format="safetensors", shards=2)
    weight_map = read_json(tmp_path / "diffusion_pytorch_model.safetensors.index.json", "unet")["weight_map"]
    other = next(shard for shard in weight_map.values() if shard != weight_map["scalar"])
    tensors = {name: tensor for name, tensor in STATE.items() if weight_map[name] == other}
    write_tensors(tmp_path / other, tensors | {"scalar": torch.tensor(9.0)})
    assert_read(tmp_path, STATE)


@pytest.mark.parametrize("weight_map", [..., None, [], {"x": 3}, {"x": None}])
def test_index_without_a_map(tmp_path: Path, weight_map: object) -> None:
    write_weights(tmp_path, STATE, format="safetensors", shards=2)
    edit_json(tmp_path / "diffusion_pytorch_model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(CheckpointError, match=r"index.json: expected \"weight_map\" from tensor names to file names"):
        read_weights(tmp_path, "unet")
