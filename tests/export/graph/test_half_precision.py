"""Half precision of a whole graph equals the former rewriting; the parts of a split graph can be converted too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ldm_calibration.probes import HIGHEST, LOWEST, add_extremes
from ldm_export.graph.onnx_graph import load_graph, save_graph
from ldm_export.graph.passes import apply
from ldm_export.graph.passes.half_precision import half_precision
from ldm_export.graph.passes.split_off import split_cross_attention_kv, split_time_embedding
from ldm_runtime.errors import BuildError
from tests.export.graph.whole import Whole, largest_difference, run


def ranges_of(model: ir.Model, feed: dict[str, np.ndarray], file: Path) -> dict[str, float]:
    probe = model.clone()
    names = add_extremes(probe)
    save_graph(probe, file)
    results = run(file, feed)
    return dict(zip(names, np.maximum(results[HIGHEST], -results[LOWEST]).tolist(), strict=True))


def split(model: ir.Model) -> list[ir.Model]:
    """The parts of a conditional UNet in the order in which they run."""
    kv = split_cross_attention_kv(model)
    assert kv is not None
    time = split_time_embedding(kv.rest)
    assert time is not None
    return [kv.prefix, time.prefix, time.rest]


def test_half_parts_compute_what_the_fp32_graph_computes(wholes: dict[str, Whole], tmp_path: Path) -> None:
    feed = wholes["conditional"].feed(2, 8, 8)
    values, half_values = dict(feed), dict(feed)
    for index, model in enumerate(split(wholes["conditional"].model)):
        file = tmp_path / f"{index}.onnx"
        ranges = ranges_of(model, values, file)
        save_graph(model, file)
        values |= run(file, values)
        half = half_precision("fp16", ranges)(load_graph(file))
        half_file = tmp_path / f"{index}.half.onnx"
        save_graph(half.model, half_file)
        onnx.checker.check_model(str(half_file), full_check=True)
        assert half.changes > 0 and not half.matrix_islands
        for side, other in (
            (half.model.graph.inputs, model.graph.inputs),
            (half.model.graph.outputs, model.graph.outputs),
        ):
            assert [(v.name, v.dtype, str(v.shape)) for v in side] == [(v.name, v.dtype, str(v.shape)) for v in other]
        half_values |= run(half_file, half_values)
        expected = {"softmax", "statistics"} if index == 2 else {"timestep embedding"} if index == 1 else set()
        assert set(half.islands.values()) == expected
    assert 0 < largest_difference(half_values["noise_pred"], values["noise_pred"]) < 0.02


def test_a_time_embedding_beyond_half_is_divided_in_fp32(wholes: dict[str, Whole], tmp_path: Path) -> None:
    model = wholes["conditional"].model
    time = split_time_embedding(model)
    assert time is not None
    feed = wholes["conditional"].feed(1, 8, 8)
    save_graph(time.prefix, tmp_path / "time.onnx")
    ranges = ranges_of(time.rest, feed | run(tmp_path / "time.onnx", feed), tmp_path / "probe.onnx")
    (packed,) = time.values
    large = half_precision("fp16", ranges | {packed.parts[0]: 1e5})(time.rest)
    assert large.islands["time_embedding/Split"] == f"range: |{packed.parts[0]}| reaches 1e+05"


def test_it_runs_as_a_pass_and_names_itself(wholes: dict[str, Whole]) -> None:
    model = wholes["scale_shift"].model
    with pytest.raises(BuildError, match=r"pass half_precision: \d+ tensors were not measured"):
        apply(model, (half_precision("fp16", {}),))
    with pytest.raises(BuildError, match="pass half_precision: got precision 'fp8'"):
        half_precision("fp8", {})
    names = {value.name or "": 1.0 for node in wholes["scale_shift"].model.graph for value in node.outputs}
    result = apply(wholes["scale_shift"].model, (half_precision("bf16", names),))
    assert result.changes > 0 and result.model.opset_imports[""] == 22
