"""What the inspector of TensorRT says of layers, in the forms that versions 10 and 8 write, read for their types."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorrt_rtx

from ldm_export.engine.inspector import inspect_engine, layer_work
from ldm_export.engine.proof import checked
from ldm_runtime.errors import BuildError

CONVOLUTION = {
    "Name": "unet.conv_in/Conv",
    "LayerType": "CaskConvolution",
    "Inputs": [{"Name": "sample", "Format/Datatype": "N/A due to dynamic shapes"}],
    "Weights": {"Type": "Half", "Count": 2048},
    "Metadata": "[ONNX Layer: unet.conv_in/Conv]",
}
PRODUCT = {
    "Name": "__myl_FcAdd_myl3_7",
    "LayerType": "gemm",
    "Inputs": [{"Format/Datatype": "Half"}, {"Format/Datatype": "Half"}, {"Format/Datatype": "Float"}],
    "Metadata": "[ONNX Layer: unet.mid/MatMul_2]\x1f[ONNX Layer: unet.mid/Add_2]",
}
OLDER = {
    "Name": "conv_out",
    "Inputs": [{"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
    "Metadata": "[ONNX Layer: unet.conv_out/Conv]",
}
POINTWISE = {"Name": "x", "Inputs": [{"Format/Datatype": "Float"}], "Metadata": "[ONNX Layer: unet.act/Mul]"}


def test_types_of_matrix_work_alone() -> None:
    assert layer_work({"Layers": [CONVOLUTION, POINTWISE, PRODUCT, OLDER]}) == [
        ("half", ["unet.conv_in/Conv"]),
        ("half", ["unet.mid/MatMul_2"]),
        ("half", ["unet.conv_out/Conv"]),
    ]


@pytest.mark.parametrize(
    ("text", "kind"),
    [("Float", "float"), ("BFloat16", "bf16"), ("Int8", "int8"), ("Row major linear FP32", "float"), ("", "unknown")],
)
def test_every_spelling_of_a_type(text: str, kind: str) -> None:
    assert layer_work({"Layers": [{**CONVOLUTION, "Weights": {"Type": text}}]}) == [(kind, ["unet.conv_in/Conv"])]


def test_fp32_work_fails_unless_it_is_an_island() -> None:
    result = layer_work({"Layers": [PRODUCT, {**CONVOLUTION, "Weights": {"Type": "Float"}}]})
    with pytest.raises(BuildError, match=r"1 matrix operations are in float, expected fp16, first unet\.conv_in/Conv"):
        checked(Path("x.engine"), result, "fp16", (), "inspector")
    proof = checked(Path("x.engine"), result, "fp16", ("unet.conv_in/Conv",), "inspector")
    assert proof.facts() == {"read_from": "inspector", "matrix_work": {"float": 1, "half": 1}}


def test_names_alone_prove_nothing() -> None:
    with pytest.raises(BuildError, match="detailed profiling verbosity"):
        layer_work({"Layers": ["unet.conv_in/Conv"]})


def test_an_engine_that_does_not_open_is_reported(tmp_path: Path) -> None:
    (tmp_path / "x.engine").write_bytes(b"no engine at all" * 100)
    with pytest.raises(BuildError, match="tensorrt_rtx cannot open what it built"):
        inspect_engine(tensorrt_rtx, tmp_path / "x.engine", "fp16", ())
