"""The NVIDIA driver, asked through a shared library with its functions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ldm_runtime.backends.driver import Gpu, check_driver, installed_gpu, query_driver
from ldm_runtime.errors import BackendError
from tests.support.cuda_driver import compile_driver

compiled = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@compiled
@pytest.mark.parametrize(("capability", "version", "cuda"), [("9.0", 13000, (13, 0)), ("12.1", 12080, (12, 8))])
def test_the_first_gpu_of_a_driver(tmp_path: Path, capability: str, version: int, cuda: tuple[int, int]) -> None:
    driver = compile_driver(tmp_path, capability, version=version, count=2)
    assert query_driver(str(driver)) == Gpu(capability, cuda)


@compiled
@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"init": 100}, r"^the NVIDIA driver finds no GPU$"),
        ({"count": 0}, r"^the NVIDIA driver finds no GPU$"),
        ({"init": 804}, r"^the NVIDIA driver cannot start: CUDA error 804 \(CUDA_ERROR_X\)$"),
        ({"init": 999}, r"^the NVIDIA driver cannot start: CUDA error 999 \(unknown\)$"),
        ({"attribute": 1}, r"^cuDeviceGetAttribute: CUDA error 1 \(unknown\)$"),
    ],
)
def test_a_driver_without_a_usable_gpu(tmp_path: Path, answers: dict[str, int], message: str) -> None:
    driver = compile_driver(tmp_path, **answers)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=message):
        query_driver(str(driver))


def test_a_machine_without_a_driver(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"^no NVIDIA driver is installed \(.*libcuda\.so\.1: cannot open shared"):
        query_driver(str(tmp_path / "libcuda.so.1"))
    (tmp_path / "text").write_text("no library")
    with pytest.raises(BackendError, match=r"^no NVIDIA driver is installed \(.*text: file too short"):
        query_driver(str(tmp_path / "text"))


def test_a_library_that_is_no_driver() -> None:
    with pytest.raises(BackendError, match=r"^no NVIDIA driver is installed \(.*undefined symbol: cuInit"):
        query_driver("libc.so.6")


def test_this_machine_is_asked_once() -> None:
    first = installed_gpu()
    assert first is installed_gpu() and isinstance(first, Gpu | str)


@pytest.mark.parametrize(
    ("needed", "supported", "fits"),
    [("13.0", (13, 2), True), ("12.8", (13, 0), True), ("", (11, 4), True), ("13.0", (12, 9), False)],
)
def test_the_driver_must_support_the_cuda_version_of_a_package(
    needed: str, supported: tuple[int, int], fits: bool
) -> None:
    if fits:
        check_driver(Gpu("9.0", supported), "onnxruntime", needed)
        return
    with pytest.raises(
        BackendError, match=r"driver supports CUDA 12\.9, onnxruntime needs 13\.0; update the driver, or install "
    ):
        check_driver(Gpu("9.0", supported), "onnxruntime", needed)
