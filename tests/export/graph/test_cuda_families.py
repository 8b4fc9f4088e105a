"""Graphs for ONNX Runtime on CUDA of every family compute what the portable graphs compute, and can become fp16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ldm_export.bundle.variant_stages import FP32_INSIDE
from ldm_export.graph.onnx_graph import load_graph, save_graph
from ldm_export.graph.passes import ENGINE_PASSES, apply
from ldm_export.graph.passes.half_precision import half_precision
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import CUDA_VARIANT
from ldm_runtime.specs import dummy_inputs
from tests.export.graph.whole import run
from tests.support.contrib_operators import evaluate
from tests.support.paper_bundles import BUILT, paper_bundle
from tests.support.shared import SharedFolders


@pytest.fixture(params=["sd2_bundle", "xl_bundle", *BUILT])
def bundle(request: pytest.FixtureRequest, shared: SharedFolders) -> Bundle:
    if request.param in BUILT:
        return paper_bundle(shared, request.param).bundle
    found: Bundle = request.getfixturevalue(request.param)
    return found


def test_every_component(bundle: Bundle, tmp_path: Path) -> None:
    for name, component in bundle.manifest.components.items():
        source = bundle.file(component.graphs["fp32"])
        measured = {value.name or "": 1.0 for node in load_graph(source).graph for value in node.outputs}
        model = apply(load_graph(source), ENGINE_PASSES[CUDA_VARIANT]).model
        path = tmp_path / f"{name}.onnx"
        save_graph(model, path)
        feed = dummy_inputs(component.spec)
        ours, theirs = evaluate(path, feed), run(source, feed)
        for output, expected in theirs.items():
            assert np.abs(ours[output] - expected).max() <= 1e-4 * max(1, np.abs(expected).max()), (name, output)
        half_precision("fp16", measured, fp32_inside=FP32_INSIDE)(model)
