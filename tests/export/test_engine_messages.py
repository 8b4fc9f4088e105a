"""Messages of builders: explained errors, progress, interrupts that reach the caller; and timings kept in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorrt_rtx

from ldm_export.engine.config import load_timings, save_timings
from ldm_export.engine.messages import builder_monitor, explain
from ldm_runtime.backends.tensorrt_log import error_log
from ldm_runtime.errors import BuildError


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Error Code 10: Could not find any implementation for node {…}.", "out of memory (Error Code 10"),
        ("[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)", "out of memory ("),
        ("MyelinCheckException: graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed.", "it needs a GPU for this ("),
        ("FP32 GEMM is not supported\n  on this device", "no fp32 matrix product on this GPU (FP32 GEMM is not"),
        ("something\nelse", "something else; choose other bounds or report it"),
    ],
)
def test_errors_are_explained_in_one_line(message: str, expected: str) -> None:
    assert explain(message).startswith(expected) and "\n" not in explain(message)


def test_control_c_cancels_the_build() -> None:
    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monitor = builder_monitor(tensorrt_rtx, interrupted)
    monitor.phase_start("building", None, 3)
    assert monitor.step_complete("building", 0) is False and monitor.interrupted


def test_progress_is_that_of_the_outermost_phase() -> None:
    reported: list[tuple[int, int]] = []
    monitor = builder_monitor(tensorrt_rtx, lambda *steps: reported.append(steps))
    monitor.phase_start("all", None, 4)
    assert monitor.step_complete("all", 0)
    monitor.phase_start("part", "all", 2)
    assert monitor.step_complete("part", 0)
    monitor.phase_start("part of it", "part", 5)
    assert monitor.step_complete("part of it", 3)
    monitor.phase_finish("part of it")
    monitor.phase_finish("part")
    monitor.phase_finish("all")
    assert reported == [(250, 1000), (375, 1000), (475, 1000), (500, 1000), (500, 1000), (1000, 1000)]


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops")
def test_timings_are_kept_in_a_file(tmp_path: Path) -> None:
    """The programming interface, with the real package: that of TensorRT for RTX keeps an empty cache."""
    builder = tensorrt_rtx.Builder(error_log(tensorrt_rtx))
    config, file = builder.create_builder_config(), tmp_path / "timings"
    save_timings(load_timings(config, file), file)
    assert file.stat().st_size > 0
    save_timings(load_timings(builder.create_builder_config(), file), file)
    with pytest.raises(BuildError, match=r"cannot be read .*--timing-cache"):
        load_timings(config, tmp_path)
