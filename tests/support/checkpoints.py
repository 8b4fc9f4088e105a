"""Tiny real latent diffusion checkpoints, in every published form: what the export's tests run on."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from safetensors.torch import save_file
from torch import nn
from transformers import BertTokenizer

WORDS = ("a", "red", "green", "blue", "circle", "square", "and", "left", "right", "of", "the", "on")
VOCABULARY = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *WORDS,
    *string.ascii_lowercase[1:],
    *(f"##{letter}" for letter in string.ascii_lowercase),
    *".,!",
)
LEVELS = 4  # of the autoencoder: an image has 8 times the latents' height and width


def tiny_modules(*, vq: bool = False, seed: int = 0) -> dict[str, nn.Module]:
    """Component folder → a randomly initialised module: bert, unet and vqvae, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bert = LDMBertModel(
            LDMBertConfig(
                vocab_size=len(VOCABULARY),
                max_position_embeddings=77,
                encoder_layers=2,
                d_model=24,
                encoder_attention_heads=2,
                head_dim=8,
                encoder_ffn_dim=48,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=24,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        shared: dict[str, Any] = {
            "block_out_channels": (32, 32, 32, 64),
            "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
            "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
            "latent_channels": 4,
            "sample_size": 64,
        }
        vqvae = VQModel(num_vq_embeddings=16, vq_embed_dim=4, **shared) if vq else AutoencoderKL(**shared)
    return {name: module.eval() for name, module in (("bert", bert), ("unet", unet), ("vqvae", vqvae))}


def random_checkpoint(
    folder: Path,
    *,
    vq: bool = False,
    dtype: torch.dtype = torch.float32,
    layout: str = "current",
    format: str = "safetensors",
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Write a checkpoint of ``tiny_modules`` with its tokenizer and DDIM scheduler, and give its folder back.

    ``layout``: "current", as diffusers saves it today, or "older", with the names of its first releases. ``format``:
    "safetensors" or "bin". With ``shards`` above 1 every component's tensors are spread over that many files.
    """
    modules = tiny_modules(vq=vq, seed=seed)
    classes = {"bert": ["latent_diffusion", "LDMBertModel"], "tokenizer": ["transformers", "BertTokenizer"]}
    for name, module in modules.items():
        place = folder / name
        place.mkdir(parents=True)
        module.save_config(place) if name != "bert" else module.config.save_pretrained(place)
        state = {key: tensor.to(dtype) for key, tensor in module.state_dict().items()}
        if name != "bert":
            classes[name] = ["diffusers", type(module).__name__]
        if layout == "older" and name != "bert":
            state = {older_name(name, key): tensor for key, tensor in state.items()}
        write_weights(place, state, transformers=name == "bert", format=format, shards=shards)
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    DDIMScheduler(**scheduler).save_pretrained(folder / "scheduler")
    classes["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer(str(folder / "tokenizer" / "vocab.txt"), model_max_length=77)
    tokenizer.save_pretrained(folder / "tokenizer")
    index = {"_class_name": "LDMTextToImagePipeline", "_diffusers_version": "0.42.1"} | dict(sorted(classes.items()))
    write_json(folder / "model_index.json", index)
    if layout == "older":
        _make_older(folder)
    return folder


def write_weights(
    folder: Path, state: dict[str, torch.Tensor], *, transformers: bool = False, format: str, shards: int = 1
) -> None:
    """Write tensors under the file names of transformers or diffusers, whole or in shards with their index."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[format] if transformers else "diffusion_pytorch_model"
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    if shards == 1:
        return write_tensors(folder / f"{stem}.{format}", state)
    weight_map = {}
    for number in range(shards):
        names = list(state)[number::shards]
        file = folder / f"{stem}-{number + 1:05}-of-{shards:05}.{format}"
        write_tensors(file, {name: state[name] for name in names})
        weight_map |= dict.fromkeys(names, file.name)
    size = sum(tensor.nbytes for tensor in state.values())
    return write_json(
        folder / f"{stem}.{format}.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
    )


def write_tensors(file: Path, state: dict[str, torch.Tensor]) -> None:
    if file.suffix == ".safetensors":
        save_file(state, file, metadata={"format": "pt"})
    else:
        torch.save(state, file)


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def edit_json(file: Path, **changes: object) -> None:
    """Set keys of a JSON object in a file; ``...`` removes a key."""
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    write_json(file, {key: value for key, value in content.items() if value is not ...})


def older_name(component: str, name: str) -> str:
    """A tensor's name of today as it was in diffusers' first releases (unet), and at CompVis (vqvae)."""
    if component == "unet":
        name = re.sub(r"^mid_block\.", "mid.", name)
        name = re.sub(r"^(down|up)_blocks\.", r"\1sample_blocks.", name)
        return re.sub(r"downsamplers\.(\d+)\.conv\.", r"downsamplers.\1.op.", name)
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up_blocks.{LEVELS - 1 - int(match[1])}.", name)
    name = re.sub(r"\.mid_block\.resnets\.(\d+)\.", lambda match: f".mid.block_{int(match[1]) + 1}.", name)
    name = name.replace(".mid_block.attentions.0.group_norm.", ".mid.attn_1.norm.")
    name = re.sub(r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1.", name)
    name = name.replace(".mid_block.attentions.0.to_out.0.", ".mid.attn_1.proj_out.")
    name = re.sub(r"\.(down|up)_blocks\.(\d+)\.resnets\.", r".\1.\2.block.", name)
    name = re.sub(r"\.(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.", r".\1.\2.\3sample.", name)
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def _make_older(folder: Path) -> None:
    """Rewrite configs and folders of a checkpoint as the first releases wrote them; a tensor is renamed before."""
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "LatentDiffusionPipeline", "unet": ["diffusers", "UNetConditionalModel"]}
    index["noise_scheduler"] = index.pop("scheduler")
    index.pop("_diffusers_version")
    write_json(folder / "model_index.json", index)
    unet = json.loads((folder / "unet" / "config.json").read_text())
    write_json(
        folder / "unet" / "config.json",
        {
            "_class_name": "UNetConditionalModel",
            "image_size": unet["sample_size"],
            "in_channels": unet["in_channels"],
            "out_channels": unet["out_channels"],
            "num_res_blocks": unet["layers_per_block"],
            "dropout": 0.0,
            "block_channels": unet["block_out_channels"],
            "down_blocks": [f"UNetRes{kind}" for kind in unet["down_block_types"]],
            "up_blocks": [f"UNetRes{kind}" for kind in unet["up_block_types"]],
            "resnet_act_fn": unet["act_fn"],
            "resnet_eps": unet["norm_eps"],
            "conv_resample": True,
            "num_head_channels": unet["attention_head_dim"],
            "resnet_num_groups": unet["norm_num_groups"],
            "cross_attention_dim": unet["cross_attention_dim"],
        },
    )
    vqvae = json.loads((folder / "vqvae" / "config.json").read_text())
    base = vqvae["block_out_channels"][0]
    older = {
        "_class_name": vqvae["_class_name"],
        "ch": base,
        "ch_mult": [channels // base for channels in vqvae["block_out_channels"]],
        "num_res_blocks": vqvae["layers_per_block"],
        "attn_resolutions": [],
        "resolution": vqvae["sample_size"],
        "z_channels": vqvae["latent_channels"],
        "embed_dim": vqvae["latent_channels"],
        "in_channels": vqvae["in_channels"],
        "out_ch": vqvae["out_channels"],
        "double_z": "quant_conv" in vqvae,
    }
    write_json(folder / "vqvae" / "config.json", older | ({"n_embed": 16} if "num_vq_embeddings" in vqvae else {}))
    bert = json.loads((folder / "bert" / "config.json").read_text())
    bert |= {"hidden_size": bert.pop("d_model"), "num_hidden_layers": bert.pop("encoder_layers")}
    write_json(folder / "bert" / "config.json", bert)
    (folder / "scheduler").rename(folder / "noise_scheduler")
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler |= {"_class_name": "DDIMScheduler", "timesteps": 1000, "clip_predicted_image": False}
    write_json(folder / "noise_scheduler" / "scheduler_config.json", scheduler)
