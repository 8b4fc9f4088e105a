"""Opening a checkpoint: both layouts give the same facts, and what is missing, wrong or absurd is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from diffusers import DDIMScheduler

from ldm_export.checkpoint.modules import load_module
from ldm_export.families import open_checkpoint
from ldm_runtime.errors import CheckpointError
from tests.support.checkpoints import edit_json, random_checkpoint, write_json
from tests.support.configs_only import CONFIGS

LARGE = {  # the published model's configs, with the keys it has and no others
    "model_index.json": CONFIGS["model_index.json"],
    "bert/config.json": {"architectures": ["LDMBertModel"], "model_type": "ldmbert", "vocab_size": 30522},
    "scheduler/scheduler_config.json": {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
    },
    "tokenizer/tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "model_max_length": 77},
    "unet/config.json": {"sample_size": 32, "attention_head_dim": 8, "norm_eps": 1e-05},
    "vqvae/config.json": {
        "sample_size": 256,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
}


def write_configs(folder: Path) -> Path:
    for name, content in LARGE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, content)
    return folder


@pytest.mark.parametrize("vq", [False, True])
def test_both_layouts_say_the_same(tmp_path: Path, vq: bool) -> None:
    current = open_checkpoint(random_checkpoint(tmp_path / "current", vq=vq))
    older = open_checkpoint(random_checkpoint(tmp_path / "older", vq=vq, layout="older"))
    assert set(current.components) == {"text_encoder", "unet", "autoencoder"}
    for name, component in current.components.items():
        assert older.components[name].class_name == component.class_name
        assert older.components[name].config == component.config
    assert current.scheduler_config == older.scheduler_config
    folders = (current.files["tokenizer"], older.files["tokenizer"])
    assert folders == (tmp_path / "current/tokenizer", tmp_path / "older/tokenizer")


def test_configs_hold_every_argument(tiny: Path) -> None:
    for key in ("scaling_factor", "force_upcast", "_diffusers_version"):
        edit_json(tiny / "vqvae" / "config.json", **{key: ...})
    for key in ("set_alpha_to_one", "steps_offset", "timestep_spacing", "_diffusers_version"):
        edit_json(tiny / "scheduler" / "scheduler_config.json", **{key: ...})
    checkpoint = open_checkpoint(tiny)
    assert checkpoint.components["autoencoder"].config["scaling_factor"] == 0.18215
    assert checkpoint.random_seed is None
    expected = {
        key: value for key, value in DDIMScheduler.from_pretrained(tiny / "scheduler").config.items() if key[0] != "_"
    }
    assert checkpoint.scheduler_config == {**expected, "class": "DDIMScheduler"}
    assert (expected["set_alpha_to_one"], expected["steps_offset"], expected["beta_start"]) == (True, 0, 0.00085)


def test_current_names_take_precedence_and_unknown_keys_do_not_matter(tiny: Path) -> None:
    edit_json(tiny / "unet" / "config.json", num_res_blocks=7, conv_resample=True, invented=[{}])
    edit_json(tiny / "bert" / "config.json", num_hidden_layers=9, dtype="float16")
    checkpoint = open_checkpoint(tiny)
    assert checkpoint.components["unet"].config["layers_per_block"] == 1
    assert checkpoint.components["text_encoder"].config["encoder_layers"] == 2
    assert "invented" not in checkpoint.components["unet"].config


def test_components_under_other_names(tiny: Path) -> None:
    index = json.loads((tiny / "model_index.json").read_text())
    index |= {"text_encoder": index.pop("bert"), "vae": index.pop("vqvae")}
    write_json(tiny / "model_index.json", index)
    (tiny / "bert").rename(tiny / "text_encoder")
    (tiny / "vqvae").rename(tiny / "vae")
    assert open_checkpoint(tiny).components["autoencoder"].folder == tiny / "vae"


def test_older_autoencoder_with_attention_in_its_levels(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "older", layout="older")
    edit_json(folder / "vqvae" / "config.json", attn_resolutions=[16, 8])
    config = open_checkpoint(folder).components["autoencoder"].config
    assert config["down_block_types"] == ("DownEncoderBlock2D",) * 2 + ("AttnDownEncoderBlock2D",) * 2
    assert config["up_block_types"] == ("AttnUpDecoderBlock2D",) * 2 + ("UpDecoderBlock2D",) * 2


def test_configs_alone(tmp_path: Path) -> None:
    folder = write_configs(tmp_path)
    with pytest.raises(CheckpointError, match=r"text_encoder: no weights in .*bert.*random weights"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, random_weights=True, seed=7)
    assert checkpoint.random_seed == 7
    assert checkpoint.components["unet"].config["block_out_channels"] == (320, 640, 1280, 1280)
    assert sum(parameter.numel() for parameter in load_module(checkpoint, "decoder").parameters()) == 49490199


def test_no_checkpoint(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent is missing, expected a checkpoint folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"model_index.json is a file, expected a checkpoint folder"):
        open_checkpoint(tiny / "model_index.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty is empty"):
        open_checkpoint(tmp_path / "empty")
    (tiny / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint: .*model_index.json is missing"):
        open_checkpoint(tiny)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "DiTPipeline", None, ["LDMTextToImagePipeline"]])
def test_other_pipelines(tiny: Path, name: object) -> None:
    edit_json(tiny / "model_index.json", _class_name=name)
    with pytest.raises(CheckpointError, match=r"model_index.json is of a .*expected LDMTextToImagePipeline") as caught:
        open_checkpoint(tiny)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_corrupt_json(tiny: Path, file: str) -> None:
    text = (tiny / file).read_text()
    (tiny / file).write_text(text[: text.index("\n", 20)])
    with pytest.raises(CheckpointError, match=rf"{file}: line \d+, column \d+: not JSON"):
        open_checkpoint(tiny)
    (tiny / file).write_text("[]")
    with pytest.raises(CheckpointError, match=rf"{file} holds a JSON list, expected an object"):
        open_checkpoint(tiny)


@pytest.mark.parametrize("component", ["bert", "unet", "vqvae", "scheduler", "tokenizer"])
def test_missing_component(tiny: Path, component: str) -> None:
    shutil.rmtree(tiny / component)
    with pytest.raises(CheckpointError, match=rf"folder .*{component} is missing; download the checkpoint whole"):
        open_checkpoint(tiny)
    edit_json(tiny / "model_index.json", **{component: ...})
    with pytest.raises(CheckpointError, match=rf"model_index.json has no {component}"):
        open_checkpoint(tiny)
    for entry in ([None, None], "unet", ["diffusers"]):
        edit_json(tiny / "model_index.json", **{component: entry})
        with pytest.raises(CheckpointError, match=rf'got "{component}": .*expected \[library, class\]'):
            open_checkpoint(tiny)


@pytest.mark.parametrize("file", ["bert/config.json", "vqvae/config.json", "scheduler/scheduler_config.json"])
def test_missing_config(tiny: Path, file: str) -> None:
    (tiny / file).unlink()
    with pytest.raises(CheckpointError, match=rf"{file} is missing"):
        open_checkpoint(tiny)


def test_missing_vocabulary(tiny: Path) -> None:
    (tiny / "tokenizer" / "vocab.txt").unlink()
    (tiny / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer: no vocab.txt or tokenizer.json"):
        open_checkpoint(tiny)


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("bert", "CLIPTextModel"),
        ("unet", "UNet2DModel"),
        ("unet", "UNetLDMModel"),
        ("vqvae", "AutoencoderTiny"),
        ("scheduler", "IPNDMScheduler"),
    ],
)
def test_other_classes(tiny: Path, component: str, name: str) -> None:
    edit_json(tiny / "model_index.json", **{component: ["diffusers", name]})
    with pytest.raises(CheckpointError, match=rf"{component}.*got class '{name}', expected \w+"):
        open_checkpoint(tiny)


def test_classes_that_disagree(tiny: Path) -> None:
    for name in ("VQModel", "Imagined", ["AutoencoderKL"]):
        edit_json(tiny / "vqvae" / "config.json", _class_name=name)
        with pytest.raises(CheckpointError, match=r"got class .*expected AutoencoderKL as in model_index.json"):
            open_checkpoint(tiny)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("unet/config.json", "in_channels", "4"),
        ("unet/config.json", "in_channels", 4.0),
        ("unet/config.json", "in_channels", True),
        ("unet/config.json", "in_channels", None),
        ("unet/config.json", "in_channels", -4),
        ("unet/config.json", "in_channels", 0),
        ("unet/config.json", "cross_attention_dim", 10**30),
        ("unet/config.json", "block_out_channels", 320),
        ("unet/config.json", "block_out_channels", []),
        ("unet/config.json", "block_out_channels", [16, "32"]),
        ("unet/config.json", "block_out_channels", [[16], [32]]),
        ("unet/config.json", "block_out_channels", [16] * 10_000),
        ("unet/config.json", "down_block_types", [1, 2]),
        ("unet/config.json", "down_block_types", "DownBlock2D"),
        ("unet/config.json", "layers_per_block", 10**9),
        ("unet/config.json", "flip_sin_to_cos", "yes"),
        ("unet/config.json", "act_fn", 5),
        ("unet/config.json", "act_fn", ["silu"]),
        ("unet/config.json", "norm_eps", float("nan")),
        ("unet/config.json", "class_embed_type", {"a": 1}),
        ("bert/config.json", "vocab_size", 2**40),
        ("bert/config.json", "encoder_layers", 10**6),
        ("bert/config.json", "d_model", -24),
        ("vqvae/config.json", "scaling_factor", "0.18215"),
        ("scheduler/scheduler_config.json", "beta_start", "small"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0),
        ("scheduler/scheduler_config.json", "trained_betas", [0.1, "x"]),
    ],
)
def test_absurd_values(tiny: Path, file: str, key: str, value: object) -> None:
    edit_json(tiny / file, **{key: value})
    with pytest.raises(CheckpointError, match=rf"{file}: {key}: got .*, expected .*correct the config") as caught:
        open_checkpoint(tiny)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_trained_betas_may_be_many(tiny: Path) -> None:
    edit_json(tiny / "scheduler" / "scheduler_config.json", trained_betas=[0.01] * 1000)
    assert len(open_checkpoint(tiny).scheduler_config["trained_betas"]) == 1000


def test_older_autoencoder_of_a_wrong_type(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "older", layout="older")
    for changes in (
        {"ch": "32"},
        {"ch": 32, "ch_mult": 4},
        {"ch_mult": [1.5]},
        {"ch_mult": [1], "attn_resolutions": ["x"]},
    ):
        edit_json(folder / "vqvae" / "config.json", **changes)
        with pytest.raises(
            CheckpointError, match=r"autoencoder: config.json: got ch .*expected a whole number and lists"
        ):
            open_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "changes", "what"),
    [
        ("bert/config.json", {"d_model": 32}, "cross_attention_dim is 24, not the text encoder's 32"),
        ("vqvae/config.json", {"latent_channels": 3}, r"in and out channels are \(4, 4\), the latents' 3"),
        ("unet/config.json", {"out_channels": 8}, r"in and out channels are \(4, 8\), the latents' 4"),
        ("unet/config.json", {"sample_size": [8, 8, 8]}, r"sample_size is \(8, 8, 8\), expected one number, or height"),
        ("vqvae/config.json", {"scaling_factor": 0}, "scaling_factor is 0, expected a positive number"),
        ("unet/config.json", {"addition_embed_type": "text_image"}, "addition_embed_type asks for inputs"),
    ],
)
def test_components_that_do_not_fit(tiny: Path, file: str, changes: dict[str, object], what: str) -> None:
    edit_json(tiny / file, **changes)
    with pytest.raises(CheckpointError, match=what):
        open_checkpoint(tiny)
