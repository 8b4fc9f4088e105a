"""The UNet as two graphs with fused attention gives what its one graph gives, whatever the sizes and the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from ldm_export.graph.attention import fuse_attention
from ldm_export.graph.components import ModelShape, UNet
from ldm_export.graph.keyed_unet import export_keyed, keyed_specs
from ldm_runtime.backends.onnxruntime_keyed import KEYED, KEYS, KeyedUNetBackend

from ldm_export.bundle.build import build
from ldm_export.families import open_checkpoint
from ldm_export.graph.onnx_graph import export_graph
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from ldm_runtime.pipeline import LatentDiffusionPipeline
from tests.support.configs_only import random_unet

SIZES = [(1, 2, 2), (2, 8, 8), (3, 9, 11), (1, 5, 16), (32, 3, 3)]  # rows, height, width
SAMPLE = {"seed": 3, "eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 5}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def backends_of(bundle: Bundle) -> tuple[OnnxRuntimeBackend, KeyedUNetBackend]:
    parts = bundle.manifest.components
    keys, keyed = ((bundle.graph(name, "fp32"), parts[name].spec) for name in (KEYS, KEYED))
    plain = OnnxRuntimeBackend(bundle.graph("unet", "fp32"), parts["unet"].spec, "cpu", 1)
    return plain, KeyedUNetBackend(parts["unet"].spec, keys, keyed, 1)


def feed_of(rows: int, height: int, width: int, context: tuple[int, int] = (77, 24)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows + height)
    return {
        "sample": rng.standard_normal((rows, 4, height, width)).astype(np.float32),
        "timestep": rng.integers(0, 1000, rows),
        "context": rng.standard_normal((rows, *context)).astype(np.float32),
    }


def assert_near(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape and expected.std() > 0.01
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("sizes", SIZES)
def test_two_graphs_give_what_one_gives(bundle: Bundle, sizes: tuple[int, int, int]) -> None:
    plain, keyed = backends_of(bundle)
    feed = feed_of(*sizes)
    expected = plain.run(feed)["noise_pred"]
    prepared = {**feed, **keyed.prepare({"context": feed["context"]})}
    assert_near(keyed.run(prepared)["noise_pred"], expected)
    np.testing.assert_array_equal(keyed.run(feed)["noise_pred"], keyed.run(prepared)["noise_pred"])


def test_prepared_rows_can_be_taken_and_put_together(bundle: Bundle) -> None:
    _, keyed = backends_of(bundle)
    feed = feed_of(3, 8, 8)
    prepared = keyed.prepare({"context": feed["context"]})
    turned = {name: array[[2, 0]] for name, array in {**feed, **prepared}.items()}
    assert_near(keyed.run(turned)["noise_pred"], keyed.run(feed)["noise_pred"][[2, 0]])


def test_keys_do_not_depend_on_the_rest_and_attention_is_one_operator(bundle: Bundle) -> None:
    kinds = {name: [node.op_type for node in ir.load(bundle.graph(name, "fp32")).graph] for name in (KEYS, KEYED)}
    attentions = [node.op_type for node in ir.load(bundle.graph("unet", "fp32")).graph].count("Softmax")
    assert attentions >= 6  # self- and cross-attention of three transformers
    assert kinds[KEYED].count("MultiHeadAttention") == attentions and "Softmax" not in kinds[KEYED]
    assert kinds[KEYS] == ["MatMul"] * attentions  # of each pair, the cross-attention has a key and a value
    assert [tensor.name for tensor in bundle.manifest.components[KEYED].spec.inputs][:3] == [
        "sample",
        "timestep",
        "context.0",
    ]


def test_what_does_not_fit_is_refused_in_the_unets_name(bundle: Bundle) -> None:
    _, keyed = backends_of(bundle)
    feed = feed_of(2, 8, 8)
    with pytest.raises(SpecError, match=r"unet.*context"):
        keyed.run({**feed, "context": feed["context"][:, :5]})
    with pytest.raises(SpecError, match="unet_keys"):
        keyed.prepare({"context": feed["context"].astype(np.float64)})


@pytest.mark.parametrize("inline", [True, False])
def test_four_levels_of_heads_that_differ(tmp_path: Path, inline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not inline:
        monkeypatch.setattr("ldm_export.graph.onnx_graph.INLINE_BYTES", 1000)
    spec = ModelShape(tokens=5, context_width=24, latent_channels=4, latent_size=8).specs()["unet"]
    graph = tmp_path / "fp32.onnx"
    export_graph(UNet(random_unet(4, 1)).eval().requires_grad_(False), spec, graph)
    files = export_keyed(graph, {KEYS: tmp_path / "keys.onnx", KEYED: tmp_path / "keyed.onnx"})
    specs = keyed_specs(spec, files[0])
    plain = OnnxRuntimeBackend(graph, spec, "cpu", 1)
    keyed = KeyedUNetBackend(spec, (files[0], specs[KEYS]), (files[1], specs[KEYED]), 1)
    for sizes in SIZES:
        feed = feed_of(*sizes, context=(5, 24))
        assert_near(keyed.run(feed)["noise_pred"], plain.run(feed)["noise_pred"])
    assert inline != graph.with_name("fp32.onnx.data").exists()
    assert inline != (b"fp32.onnx.data" in files[1].read_bytes())


def test_attention_of_another_form_stays_as_it_is(bundle: Bundle) -> None:
    model = ir.load(bundle.graph("unet", "fp32"))
    count = sum(node.op_type == "Softmax" for node in model.graph)
    for node in model.graph:
        if node.op_type == "Softmax":
            node.attributes["axis"] = ir.AttrInt64("axis", 2)
            break
    assert fuse_attention(model) == count - 1
    assert [node.op_type for node in model.graph].count("Softmax") == 1


def test_the_pipeline_runs_it_and_gives_the_same_picture(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pipe = LatentDiffusionPipeline.from_bundle(tiny_bundle, backend="onnxruntime", device="cpu")
    assert isinstance(pipe.backends["unet"].load(), KeyedUNetBackend)
    parts = {name: part for name, part in pipe.backends.items() if name != "unet"}
    bundle = Bundle.open(tiny_bundle)
    plain = OnnxRuntimeBackend(bundle.graph("unet", "fp32"), bundle.manifest.components["unet"].spec, "cpu")
    other = LatentDiffusionPipeline({**parts, "unet": plain}, pipe.tokenizer, pipe.scheduler)
    found, expected = (one("a red circle", **SAMPLE).latents for one in (pipe, other))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    origins = build(open_checkpoint(tiny_checkpoint), Path(bundle.folder)).origins
    assert set(origins.values()) == {"kept"} and "keyed_unet.fp32" in origins
