"""LoRA adapters in a bundle: added, replaced, removed, kept by a build, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from ldm_export.bundle.build import build
from ldm_export.cli import main
from ldm_export.families import open_checkpoint
from ldm_export.lora import adapter_of
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import ManifestError
from ldm_runtime.loras.adapter_file import read_adapter
from ldm_runtime.loras.graph_layers import graph_layers
from tests.support.lora_bundle import SMALL, WHOLE

Refused = Callable[..., None]


def test_a_name_is_replaced_or_removed(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    (folder / "loras/left.0123456789abcdef.safetensors").write_bytes(b"of a command that was killed")
    file = bundle.folder.parent / f"{SMALL}.safetensors"
    assert main(["add-lora", str(folder), f"{WHOLE}={file}", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["replaced"] == [WHOLE] and facts["loras"][WHOLE]["source"] == f"{SMALL}.safetensors"
    changed = Bundle.open(folder)
    changed.check()
    assert sorted(f"loras/{one.name}" for one in (folder / "loras").iterdir()) == sorted(
        lora.file for lora in changed.manifest.loras.values()
    )
    assert main(["inspect", str(folder), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["loras"]) == {WHOLE, SMALL}
    assert main(["add-lora", str(folder), "--remove", WHOLE, "--remove", SMALL]) == 0
    assert not Bundle.open(folder).manifest.loras and not (folder / "loras").exists()
    assert "removed whole" in capsys.readouterr().out


def test_an_adapter_is_a_lora_file_itself(bundle: Bundle) -> None:
    lora = bundle.manifest.loras[SMALL]
    again = adapter_of(bundle, bundle.folder / lora.file)
    assert again.content == (bundle.folder / lora.file).read_bytes()
    assert again.layers == lora.layers
    tensors = load_file(bundle.folder / lora.file)
    assert {key.partition(".")[0] for key in tensors} == {"unet", "text_encoder"}


def test_a_bundle_that_is_built_again_keeps_adapters_that_fit(
    bundle: Bundle, sd2_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    built = build(open_checkpoint(sd2_checkpoint), folder).bundle  # without fp16
    assert built.manifest.loras == bundle.manifest.loras
    built.check()
    assert "fp16" not in built.manifest.components["unet"].graphs
    assert not caplog.records


def test_layers_of_the_graphs_for_cuda_are_those_of_the_portable_graphs(shapes_cuda: Bundle) -> None:
    for name in ("unet", "cross_attention_kv", "time_embedding"):
        portable = {layer.module: layer for layer in graph_layers(shapes_cuda.graph(name, "fp32"))}
        layers = graph_layers(shapes_cuda.graph(name, "fp16", "onnxruntime-cuda"))
        assert {layer.module for layer in layers} == set(portable)
        for layer in layers:
            plain = portable[layer.module]
            weight = plain.weight.read().T if plain.layout == "matrix" else plain.weight.read()
            assert weight.shape == plain.shape
            assert layer.shape in (plain.shape, plain.shape[:2])  # a 1 × 1 kernel may have become a matrix
            assert np.allclose(layer.weight.read(), layer.stored(weight), atol=1e-3, rtol=1e-3)
        assert name != "unet" or {layer.layout for layer in layers} == {"matrix", "channels last"}


def test_refusals(bundle: Bundle, tmp_path: Path, refused: Refused, xl_bundle: Bundle) -> None:
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    shutil.copytree(xl_bundle.folder, tmp_path / "xl")
    file = tmp_path / "style.safetensors"
    shutil.copy(bundle.folder.parent / f"{WHOLE}.safetensors", file)
    refused("add-lora", "xl", "a=style.safetensors", message="LoRA layers all must fit the checkpoint: use a LoRA that")
    refused("add-lora", "bundle", "a=none.safetensors", message="none.safetensors: no such file, expected NAME=FILE")
    refused("add-lora", "bundle", "style.safetensors", message="got 'style.safetensors', expected NAME=FILE")
    refused("add-lora", "bundle", "a/b=style.safetensors", message="got name 'a/b', expected up to 64 letters")
    refused("add-lora", "bundle", "a=style.safetensors", "a=x", message="got 'a' twice")
    refused("add-lora", "bundle", "--remove", "other", message="has no adapter 'other'; it has small.style-2, whole")
    refused("add-lora", "bundle", message="got nothing to do, expected NAME=FILE or --remove NAME")
    refused("add-lora", "none", "a=style.safetensors", message="none: no such folder, expected a bundle")
    generate = ("generate", "bundle", "a circle", "--lora")
    refused(*generate, "other:1", message="loras: got 'other', expected one of small.style-2, whole; add one with")
    refused(*generate, "whole:much", message="lora: got 'whole:much', expected NAME or NAME:WEIGHT")
    refused(*generate, "whole:1e9", message="loras: whole: got 1000000000.0, expected a number from -1000 to 1000")
    refused(*generate, "whole", "--lora", "whole:2", message="lora: got 'whole' twice, expected each adapter once")
    plain = ("generate", "xl", "a circle", "--lora", "whole")
    refused(*plain, message="expected none, because this bundle has no adapters; add one with `ldm-export add-lora`")


def test_damaged_adapters_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    lora = bundle.manifest.loras[SMALL]
    whole = bundle.verified(lora.file)
    content, file = whole.path.read_bytes(), tmp_path / "damaged.safetensors"
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size]
    odd = [
        b"",
        content[:4],
        content[: 8 + size],
        (2**60).to_bytes(8, "little") + content[8:],
        content[:8] + b"[" * size + content[8 + size :],
        content.replace(b"lora_A.weight", b"lora_C.weight"),
        content.replace(b'"F16"', b'"I16"'),
        content[:8] + header.replace(b'"shape":[3,', b'"shape":[9,') + content[8 + size :],
    ]
    for damaged in odd:
        file.write_bytes(damaged)
        with pytest.raises(ManifestError, match=r"damaged\.safetensors"):
            read_adapter(SMALL, type(whole)(file, whole.sha256, type(whole.identity).of(file.stat())))
