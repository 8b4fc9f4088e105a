"""Exports a checkpoint as optimum does: ``onnx`` by optimum-onnx, ``openvino`` by optimum-intel, ``int8`` by NNCF.

optimum has no export configuration for the text encoder and the decoder, so they are exported with the functions that
its exporters call. For int8, weights and activations of the UNet are quantized with the settings of optimum-intel's
OVQuantizationConfig. They are calibrated on calls of real denoising, or on random numbers if the weights are random.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference_pipeline import draw, load, pipeline

PROMPTS = 8
STEPS = 20
STRIDE = 5
"""Every fifth call of a calibration trajectory is used."""


class Decoder(torch.nn.Module):
    """The decoder of the autoencoder: latents → image."""

    def __init__(self, autoencoder: torch.nn.Module):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """float32 [B, 4, h, w] → [B, 3, 8h, 8w]."""
        return self.autoencoder.decode(latents, return_dict=False)[0]


class Encoder(torch.nn.Module):
    """The text encoder without its unused head: tokens → hidden states."""

    def __init__(self, bert: torch.nn.Module):
        super().__init__()
        self.model = bert.model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [B, T] → float32 [B, T, D]."""
        return self.model(tokens, return_dict=False)[0]


def others(checkpoint: Path) -> dict[str, tuple[torch.nn.Module, torch.Tensor, dict[int, str]]]:
    """Return name -> module, example input, dynamic dimensions."""
    config = json.loads((checkpoint / "vqvae/config.json").read_text())
    latents = torch.randn(2, config["latent_channels"], 8, 8)
    return {
        "bert": (Encoder(load(checkpoint, "bert")), torch.ones(2, 77, dtype=torch.long), {0: "batch"}),
        "decoder": (Decoder(load(checkpoint, "vqvae")), latents, {0: "batch", 2: "height", 3: "width"}),
    }


def to_onnx(checkpoint: Path, output: Path) -> None:
    """Write unet.onnx, bert.onnx and decoder.onnx."""
    from optimum.exporters.onnx import export
    from optimum.exporters.onnx.model_configs import UNetOnnxConfig

    for name, (module, example, free) in others(checkpoint).items():
        torch.onnx.export(
            module, (example,), str(output / f"{name}.onnx"), dynamo=False, opset_version=18, input_names=["x"],
            output_names=["y"], dynamic_axes={"x": free, "y": free if name == "decoder" else {0: "batch"}},
        )  # fmt: skip
    unet = load(checkpoint, "unet")
    export(unet, UNetOnnxConfig(unet.config, task="semantic-segmentation"), output / "unet.onnx")


def to_openvino(checkpoint: Path, output: Path) -> None:
    """Write unet.xml, bert.xml and decoder.xml."""
    import openvino
    from optimum.exporters.openvino import export
    from optimum.exporters.openvino.model_configs import UNetOpenVINOConfig

    for name, (module, example, _) in others(checkpoint).items():
        openvino.save_model(openvino.convert_model(module, example_input=example), output / f"{name}.xml", False)
    unet = load(checkpoint, "unet")
    config = UNetOpenVINOConfig(unet.config, task="semantic-segmentation")
    export(unet, config, output / "unet.xml", stateful=False, library_name="diffusers")


def to_int8(checkpoint: Path, output: Path, random: bool) -> None:
    """Write unet-int8.xml."""
    import nncf
    import openvino

    core = openvino.Core()
    model = core.read_model(output / "unet.xml")
    calls = _random_calls(checkpoint) if random else _calls(checkpoint, core.compile_model(model, "CPU"))
    quantised = nncf.quantize(
        model,
        nncf.Dataset(calls),
        subset_size=len(calls),
        model_type=nncf.ModelType.TRANSFORMER,
        fast_bias_correction=True,
    )
    openvino.save_model(quantised, output / "unet-int8.xml", False)


def _random_calls(checkpoint: Path) -> list[list[np.ndarray]]:
    config = json.loads((checkpoint / "unet/config.json").read_text())
    rng, side = np.random.default_rng(1), config["sample_size"]
    shapes = ((2, config["in_channels"], side, side), (2, 77, config["cross_attention_dim"]))
    calls = []
    for timestep in (200, 800):
        sample, context = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        calls.append([sample, np.full(2, timestep, np.int64), context])
    return calls


def _calls(checkpoint: Path, unet: Any) -> list[list[np.ndarray]]:
    modules = {name: load(checkpoint, name) for name in ("bert", "vqvae")}
    feeds: list[list[np.ndarray]] = []

    def step(sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        feeds.append([sample.numpy(), np.full(len(sample), int(timestep), np.int64), context.numpy()])
        return torch.from_numpy(unet(feeds[-1])[0])

    reference = pipeline(checkpoint, lambda x: modules["bert"](x)[0], step, lambda x: modules["vqvae"].decode(x).sample)
    config = json.loads((checkpoint / "unet/config.json").read_text())
    side = config["sample_size"]
    for index in range(PROMPTS):
        command = {
            "prompts": [f"a large red circle above a small blue square on a {('white', 'black')[index % 2]} background"]
        }
        command |= {"seed": 1000 + index, "batch": 1, "steps": STEPS, "guidance": 6.0, "height": None, "width": None}
        draw(reference, {**command, "latent": [config["in_channels"], side, side]})
    return feeds[::STRIDE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("onnx", "openvino", "int8"))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--random", action="store_true", help="calibrate int8 on random numbers")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    if args.what == "int8":
        return to_int8(args.checkpoint, args.output, args.random)
    return (to_onnx if args.what == "onnx" else to_openvino)(args.checkpoint, args.output)


if __name__ == "__main__":
    sys.exit(main())
