"""Runs the UNet with torch on a GPU: eager, in a CUDA graph, and compiled; all in fp16 with channels-last memory."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Calls", "copy_bandwidth", "matrix_throughput", "torch_calls"]

Calls = dict[str, Callable[[], None]]
"""Name of a runtime -> one call of the UNet, which returns when the GPU has finished it."""


def unet_of(config: Path) -> nn.Module:
    """A UNet with random fp16 weights on the GPU, channels-last."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device("cuda"):
        unet = UNet2DConditionModel.from_config(json.loads(config.read_text()))
    return unet.half().eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


def torch_calls(config: Path, rows: int, limits: Mapping[str, int]) -> tuple[Calls, dict[str, str]]:
    """Return the runtimes of torch for a number of rows, and for each that is left out why.

    Args:
        config: ``config.json`` of the UNet.
        rows: Rows of a call.
        limits: Mode of torch.compile -> seconds after which it is given up.
    """
    unet = unet_of(config)
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    shape = (rows, unet.config.in_channels, size, size)
    sample = torch.randn(shape, device="cuda", dtype=torch.half).to(memory_format=torch.channels_last)
    context = torch.randn(rows, 77, width, device="cuda", dtype=torch.half)
    timestep = torch.full((rows,), 501, device="cuda")
    calls: Calls = {}
    left_out: dict[str, str] = {}

    def run(module: Callable[..., Any]) -> Any:
        with torch.inference_mode():
            return module(sample, timestep, encoder_hidden_states=context, return_dict=False)[0]

    def eager() -> None:
        run(unet)
        torch.cuda.synchronize()

    eager()
    calls["torch eager"] = eager
    graph = captured(lambda: run(unet))

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    calls["torch eager in a CUDA graph"] = replay
    for mode, limit in limits.items():
        fused = unet_of(config)
        fused.fuse_qkv_projections()
        try:
            with time_limit(limit):
                compiled = torch.compile(fused, mode=mode, fullgraph=True)
                for _ in range(3):
                    run(compiled)
                torch.cuda.synchronize()
        except Exception as error:  # torch raises exceptions of many kinds
            left_out[f"torch.compile {mode}"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            torch._dynamo.reset()
            continue

        def call(compiled: Callable[..., Any] = compiled) -> None:
            run(compiled)
            torch.cuda.synchronize()

        calls[f"torch.compile {mode}"] = call
    return calls, left_out


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """The launches of a call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread after some seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not finished after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def milliseconds(call: Callable[[], Any], count: int) -> float:
    """Milliseconds of a call on the GPU, the mean of several after some warm-up."""
    for _ in range(3):
        call()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(count):
        call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / count


def matrix_throughput() -> float:
    """Operations per second of an fp16 product of two 8192 × 8192 matrices of random numbers."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.half) for _ in range(2))
    return 2 * 8192.0**3 / (milliseconds(lambda: left @ right, 20) / 1e3)


def copy_bandwidth() -> float:
    """Bytes per second of a copy within the GPU's memory, counting bytes read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2.0**30 / (milliseconds(lambda: target.copy_(source), 20) / 1e3)
