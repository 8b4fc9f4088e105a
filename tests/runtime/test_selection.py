"""What is chosen to run a bundle, and what is said of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ldm_runtime import Bundle, LatentDiffusionPipeline, LdmError
from ldm_runtime.backends import selection as module
from ldm_runtime.backends.openvino import has_bf16
from ldm_runtime.backends.selection import choose

FAST = "bf16" if has_bf16() else "fp32"


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Makes only these packages look installed."""
    return lambda *names: monkeypatch.setattr(module, "find_spec", lambda name: name if name in names else None)


def built_for(bundle: Bundle, precision: str) -> Bundle:
    """The bundle as if it had been built for a precision, with a graph for it."""
    components = {
        name: dataclasses.replace(part, graphs={**part.graphs, precision: part.graphs["fp32"]})
        for name, part in bundle.manifest.components.items()
    }
    manifest = dataclasses.replace(bundle.manifest, components=components, asked={"precision": precision})
    return dataclasses.replace(bundle, manifest=manifest)


@pytest.mark.parametrize(
    ("precision", "graph", "arithmetic"),
    [(None, "fp32", FAST), ("fp32", "fp32", "fp32"), ("fp16", "fp16", "fp32"), ("int8", "int8", FAST)],
)
def test_openvino_computes_in_bf16_unless_fp32_is_asked_for(bundle, precision, graph, arithmetic) -> None:
    choice = choose(bundle, "openvino", precision)
    assert (choice.backend, choice.graph, choice.arithmetic) == ("openvino", graph, arithmetic)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts every model as a large one."""
    monkeypatch.setattr(module, "SMALL", 0)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("built", "graph"), [("fp16", "fp32"), ("bf16", "fp32"), ("int8", "int8")])
def test_openvino_runs_what_the_bundle_was_built_for(bundle, built: str, graph: str) -> None:
    assert choose(built_for(bundle, built), "auto").graph == graph


def test_one_picture_of_a_small_model_is_onnxruntimes_where_that_is_installed(bundle, installed) -> None:
    installed("onnxruntime", "openvino")
    for one in (bundle, built_for(bundle, "fp16")):
        choice = choose(one, once=True)
        assert (choice.backend, choice.graph, choice.arithmetic) == ("onnxruntime", "fp32", "fp32")
        assert "one picture" in str(choice) and choose(one).backend == "openvino"
    for choice in (choose(built_for(bundle, "int8"), once=True), choose(bundle, precision="bf16", once=True)):
        assert choice.backend == "openvino"
    installed("openvino")
    assert choose(bundle, once=True).backend == "openvino"


@pytest.mark.usefixtures("large")
def test_one_picture_of_a_large_model_is_openvinos(bundle, installed) -> None:
    installed("onnxruntime", "openvino")
    assert choose(bundle, once=True).backend == "openvino"


@pytest.mark.usefixtures("large")
def test_auto_uses_the_fastest_installed_engine_and_gives_the_reason(bundle, installed) -> None:
    installed("onnxruntime", "openvino")
    assert choose(bundle).backend == "openvino" and "fastest" in str(choose(bundle))
    installed("onnxruntime")
    choice = choose(bundle)
    assert (choice.backend, choice.device, choice.arithmetic) == ("onnxruntime", "cpu", "fp32")
    assert "not installed" in choice.facts()["reason"]
    assert choose(bundle, device="cuda").device == "cuda"
    installed()
    with pytest.raises(LdmError, match=r"no engine is installed; .*\[openvino\]"):
        choose(bundle)


def test_an_explicit_backend_is_used_or_refused(bundle, monkeypatch) -> None:
    assert choose(bundle, "onnxruntime", "fp32", "cpu").facts()["reason"] == "as asked"
    with pytest.raises(LdmError, match="runs on the CPU"):
        choose(bundle, "openvino", device="cuda")
    monkeypatch.setattr(module, "has_bf16", lambda: False)
    assert choose(bundle, "openvino").arithmetic == "fp32"
    with pytest.raises(LdmError, match="bf16, in which this CPU does not compute"):
        choose(bundle, "openvino", "bf16")
    assert choose(bundle, "auto", "bf16").backend == "onnxruntime"


@pytest.mark.usefixtures("large")
def test_the_pipeline_reports_its_backend_and_frees_used_components(tiny_bundle: Path) -> None:
    for keep in (True, False):
        with LatentDiffusionPipeline.from_bundle(tiny_bundle, keep_loaded=keep, threads=1) as pipeline:
            assert pipeline.choice is not None and pipeline.choice.backend == "openvino"
            assert not any(part._loaded for part in pipeline.backends.values())
            first = pipeline("a red circle", seed=1, num_inference_steps=2)
            assert [part._loaded is not None for part in pipeline.backends.values()] == [keep] * 3
            again = pipeline("a red circle", seed=1, num_inference_steps=2)
            assert first.images[0].tobytes() == again.images[0].tobytes()


def test_a_text_is_encoded_once_and_alone(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LatentDiffusionPipeline.from_bundle(tiny_bundle, precision="fp32", threads=1) as pipeline:
        rows: list[int] = []
        encoder = pipeline.backends["text_encoder"]
        run = encoder.run
        monkeypatch.setattr(encoder, "run", lambda feed: rows.append(len(feed["input_ids"])) or run(feed))
        options = {"seed": 1, "num_inference_steps": 2, "guidance_scale": 3.0}
        together = pipeline(["a red circle", "a blue square"], **options)
        assert rows == [1, 1, 1]
        pipeline(["a blue square", "a red circle"], **options)
        assert rows == [1, 1, 1]
        assert len(together.images) == 2
