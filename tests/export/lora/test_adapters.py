"""LoRA adapters of a bundle that requests select: the images of weights into which the same files are merged."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm_export.bundle.build import build
from ldm_export.cli import main
from ldm_export.families import open_checkpoint
from ldm_export.lora import adapter_of, parse_lora, with_loras
from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.http.served_model import ServedModel
from ldm_runtime.loras.adapter_file import read_adapter
from ldm_runtime.loras.graph_layers import graph_layers
from ldm_runtime.triton.request_tensors import parse_request
from tests.http.conftest import ENGINE, running
from tests.support.lora_files import UNET, XL_PREFIXES, factors_of, kohya, peft
from tests.support.shared import SharedFolders
from tests.support.torch_pipeline import torch_pipeline

WHOLE, SMALL = "whole", "small.style-2"
OPTIONS: dict[str, Any] = {"num_inference_steps": 3, "height": 16, "width": 16, "guidance_scale": 3.0, "seed": 5}
PROMPT = "a red circle"
BOTH = {WHOLE: 0.5, SMALL: -1.0}
Refused = Callable[..., None]
Pixels = NDArray[np.int64]


def weighted(module: Any) -> list[str]:
    """Names of the submodules with matrices or kernels."""
    named = [(name, getattr(one, "weight", None)) for name, one in module.named_modules()]
    return [name for name, weight in named if weight is not None and weight.ndim > 1 and "embeddings" not in name]


def write_files(checkpoint: Path, folder: Path) -> None:
    """Write a LoRA file that changes every layer of UNet and text encoder, and one of another form for some."""
    pipeline = DiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    factors = factors_of(pipeline, {part: weighted(getattr(pipeline, part)) for part in ("unet", "text_encoder")})
    factors = {layer: (0.4 * down, 0.4 * up) for layer, (down, up) in factors.items()}
    save_file(peft(factors), folder / f"{WHOLE}.safetensors")
    some = {layer: pair for layer, pair in factors.items() if layer[1].endswith((".to_v", "q_proj", "proj_in"))}
    save_file(kohya(some, False, {**XL_PREFIXES, "text_encoder": "lora_te_"}), folder / f"{SMALL}.safetensors")


@pytest.fixture(scope="module")
def bundle(sd2_checkpoint: Path, sd2_bundle: Bundle, shared: SharedFolders) -> Bundle:
    """``sd2_bundle`` with two adapters, and their files beside it; read-only."""

    def make(folder: Path) -> None:
        shutil.copytree(sd2_bundle.folder, folder / "bundle")
        write_files(sd2_checkpoint, folder)
        given = [f"{name}={folder / name}.safetensors" for name in (WHOLE, SMALL)]
        assert main(["add-lora", str(folder / "bundle"), *given, "--quiet"]) == 0

    return Bundle.open(shared.once("sd2_loras", make) / "bundle")


@pytest.fixture(scope="module")
def merged(sd2_checkpoint: Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pixels]:
    """Images of torch's modules with merged weights: without adapters, with one, and with two."""
    texts = {"plain": {}, "one": {WHOLE: 0.7}, "two": BOTH}
    images = {}
    for name, loras in texts.items():
        given = [parse_lora(f"{bundle.folder.parent / lora}.safetensors:{scale}") for lora, scale in loras.items()]
        checkpoint = with_loras(open_checkpoint(sd2_checkpoint), given)
        with torch_pipeline(checkpoint, tmp_path_factory.mktemp("merged") / name) as pipe:
            images[name] = image(pipe)
    assert np.abs(images["one"] - images["plain"]).max() > 8 < np.abs(images["one"] - images["two"]).max()
    return images


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> Iterator[LatentDiffusionPipeline]:
    """The bundle on ONNX Runtime in fp32."""
    with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime") as pipeline:
        yield pipeline


def image(pipeline: LatentDiffusionPipeline, **options: Any) -> Pixels:
    (result,) = pipeline(PROMPT, **{**OPTIONS, **options}).images
    return np.asarray(result, np.int64)


@pytest.mark.parametrize(("backend", "precision"), [("openvino", "fp32"), ("onnxruntime", "fp16")])
def test_images_equal_those_of_merged_weights(
    bundle: Bundle, merged: dict[str, Pixels], backend: str, precision: str
) -> None:
    with LatentDiffusionPipeline.from_bundle(bundle, precision=precision, backend=backend) as pipeline:
        assert np.abs(image(pipeline, loras={WHOLE: 0.7}) - merged["one"]).max() <= 1
        assert np.abs(image(pipeline) - merged["plain"]).max() <= 1


def test_selections_alternate_and_change_nothing(pipe: LatentDiffusionPipeline, merged: dict[str, Pixels]) -> None:
    plain, one, two = image(pipe), image(pipe, loras={WHOLE: 0.7}), image(pipe, loras=BOTH)
    for ours, theirs in ((plain, "plain"), (one, "one"), (two, "two")):
        assert np.abs(ours - merged[theirs]).max() <= 1
    third = image(pipe, loras={SMALL: 2})  # the first selection is freed
    assert (image(pipe, loras={WHOLE: 0.7}) == one).all()
    assert (image(pipe, loras=dict(reversed(BOTH.items()))) == two).all()
    assert (image(pipe, loras={SMALL: 2.0, WHOLE: 0}) == third).all()
    for nothing in (None, {}, {WHOLE: 0.0}):
        assert (image(pipe, loras=nothing) == plain).all()


def test_one_selection_at_a_time(bundle: Bundle, pipe: LatentDiffusionPipeline) -> None:
    with LatentDiffusionPipeline.from_bundle(
        bundle, precision="fp32", backend="onnxruntime", lora_selections=1
    ) as small:
        for loras in (BOTH, {WHOLE: 0.7}, BOTH):
            assert (image(small, loras=loras) == image(pipe, loras=loras)).all()
        assert (small.most_loras, pipe.most_loras) == (1, 2)
    for wrong in (0, 65, "2", True):
        with pytest.raises(SpecError, match=r"lora_selections: got .*, expected a whole number from 1 to 64"):
            LatentDiffusionPipeline.from_bundle(bundle, lora_selections=wrong)  # type: ignore[arg-type]


def test_cached_features_have_the_weights_of_the_adapter(pipe: LatentDiffusionPipeline, bundle: Bundle) -> None:
    options = {"cache_every": 2, "full_steps": 1}
    changed, plain = image(pipe, loras={WHOLE: 0.7}, **options), image(pipe, **options)
    pipe.load()
    whole = image(pipe, loras={WHOLE: 0.7})
    assert np.abs(changed - plain).max() > 8
    assert np.abs(changed - whole).mean() < 0.5 * np.abs(plain - whole).mean()


@pytest.mark.slow
def test_images_equal_those_of_a_bundle_built_with_the_file(
    pipe: LatentDiffusionPipeline, bundle: Bundle, sd2_checkpoint: Path, tmp_path: Path
) -> None:
    given = parse_lora(f"{bundle.folder.parent / WHOLE}.safetensors:0.7")
    built = build(with_loras(open_checkpoint(sd2_checkpoint), [given]), tmp_path / "built").bundle
    with LatentDiffusionPipeline.from_bundle(built, precision="fp32", backend="onnxruntime") as other:
        for options in ({}, {"cache_every": 2, "full_steps": 1}, {"scheduler": "EulerDiscreteScheduler"}):
            ours = image(pipe, loras={WHOLE: 0.7}, num_inference_steps=6, **options)
            assert np.abs(ours - image(other, num_inference_steps=6, **options)).max() <= 1


def test_requests_with_other_adapters_have_batches_of_their_own(pipe: LatentDiffusionPipeline) -> None:
    selections: list[dict[str, float] | None] = [None, {WHOLE: 0.7}, BOTH, {SMALL: 1.5}, {WHOLE: 0.7}]
    expected = [image(pipe, loras=loras) for loras in selections]
    with BatchScheduler(pipe) as scheduler:
        jobs = [scheduler.submit(Request(PROMPT, **OPTIONS, loras=loras)) for loras in selections * 2]
        results = [np.asarray(job.result().images[0], np.int64) for job in jobs]
    for ours, theirs in zip(results, expected * 2, strict=True):
        assert np.abs(ours - theirs).max() <= 1


def test_the_images_api(bundle: Bundle) -> None:
    fields = {"steps": 2, "seed": 5, "size": "16x16", "response_format": "url"}
    model = ServedModel.open(bundle.folder, "sd", ENGINE)
    try:
        expected = image(model.pipeline, guidance_scale=None, num_inference_steps=2, loras={SMALL: 2})
        with running({"sd": model}) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            answer = client.images.generate(prompt=PROMPT, extra_body={**fields, "loras": {SMALL: 2}})
            assert answer.data is not None and answer.data[0].url is not None
            received = Image.open(io.BytesIO(client._client.get(answer.data[0].url).content))
            assert np.abs(np.asarray(received, np.int64) - expected).max() <= 1
            with pytest.raises(openai.BadRequestError, match="loras: got 'other', expected one of small"):
                client.images.generate(prompt=PROMPT, extra_body={**fields, "loras": {"other": 1}})
    finally:
        model.close()


def test_tritons_input() -> None:
    tensors = {"PROMPT": np.array([b"a"], object), "LORAS": np.array([b'{"whole": 0.7}'], object)}
    assert parse_request(tensors).request.loras == {WHOLE: 0.7}
    with pytest.raises(SpecError, match=r"LORAS: got .\{whole., expected a JSON object"):
        parse_request({**tensors, "LORAS": np.array([b"{whole"], object)})


def test_images_of_xl_equal_those_of_merged_weights(xl_bundle: Bundle, xl_checkpoint: Path, tmp_path: Path) -> None:
    pipeline, last = DiffusionPipeline.from_pretrained(xl_checkpoint), "encoder.layers.{}.self_attn.q_proj"
    layers = pipeline.text_encoder.config.num_hidden_layers
    modules = {
        "unet": [*UNET],
        "text_encoder": [last.format(index) for index in range(layers)],
        "text_encoder_2": [f"text_model.{last.format(0)}", "text_projection"],
    }
    file = tmp_path / "xl.safetensors"
    save_file(kohya(factors_of(pipeline, modules), True, XL_PREFIXES), file)
    folder = Path(shutil.copytree(xl_bundle.folder, tmp_path / "bundle"))
    assert main(["add-lora", str(folder), f"xl={file}"]) == 0
    checkpoint = with_loras(open_checkpoint(xl_checkpoint), [parse_lora(f"{file}:0.5")])
    with torch_pipeline(checkpoint, tmp_path / "files") as pipe:
        theirs = image(pipe)
    with LatentDiffusionPipeline.from_bundle(folder, precision="fp32", backend="onnxruntime") as pipe:
        ours, plain = image(pipe, loras={"xl": 0.5}), image(pipe)
    assert np.abs(ours - theirs).max() <= 1 < np.abs(ours - plain).max()


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


def test_int8_graphs_are_refused(calibrated: Bundle, tmp_path: Path) -> None:
    folder, file = Path(shutil.copytree(calibrated.folder, tmp_path / "bundle")), tmp_path / "one.safetensors"
    layer = graph_layers(calibrated.graph("unet", "fp32"))[0]
    (rows, *columns), key = layer.shape, f"unet.{layer.module}.lora"
    save_file({f"{key}_A.weight": torch.ones(1, *columns), f"{key}_B.weight": torch.ones(rows, 1, 1, 1)}, file)
    assert main(["add-lora", str(folder), f"one={file}"]) == 0
    with (
        LatentDiffusionPipeline.from_bundle(folder, backend="onnxruntime") as pipe,
        pytest.raises(
            SpecError, match="loras: the weights of int8 graphs cannot be changed; use onnxruntime or openvino"
        ),
    ):
        pipe.plan(Request(PROMPT, loras={"one": 1.0}))
    with LatentDiffusionPipeline.from_bundle(folder, backend="onnxruntime", precision="fp32") as pipe:
        assert pipe.plan(Request(PROMPT, loras={"one": 1.0})).loras == (("one", 1.0),)


def test_wrong_fields_and_other_pipelines_are_refused(bundle: Bundle, pipe: LatentDiffusionPipeline) -> None:
    for wrong in (["whole"], {WHOLE: "much"}, {WHOLE: float("nan")}, {1: 1.0}, "whole", {WHOLE: True}):
        with pytest.raises(SpecError, match="loras: "):
            pipe.plan(Request(PROMPT, **OPTIONS, loras=wrong))  # type: ignore[arg-type]
    alone = LatentDiffusionPipeline(bundle.manifest.model, pipe.backends, bundle.file)
    with pytest.raises(SpecError, match="components of this pipeline run elsewhere or were given to it"):
        alone.plan(Request(PROMPT, **OPTIONS, loras={WHOLE: 1.0}))


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
