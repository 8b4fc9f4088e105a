"""Copies bundles without their weights to a GPU machine, and fills them with random weights there."""

from __future__ import annotations

import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from ldm_runtime.bundle import Bundle, file_facts
from ldm_runtime.bundle_layout import CUDA_VARIANT, MANIFEST, graph_file, weights_file
from ldm_runtime.manifest_reader import read_manifest

__all__ = ["copy_without_weights", "fill_with_random_weights"]


def copy_without_weights(bundle: Bundle, target: Path) -> None:
    """Copy what ONNX Runtime on CUDA runs in fp16, without the weights that lie beside the graphs."""
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    (target / MANIFEST).write_text(bundle.manifest.to_json())
    needed = [file for entry in bundle.manifest.conditioning for file in entry.files.values()]
    for name, component in bundle.manifest.components.items():
        needed.append(component.variants.get(CUDA_VARIANT, {}).get("fp16", graph_file(name, "fp32")))
    for file in needed:
        (target / file).parent.mkdir(exist_ok=True)
        shutil.copy(bundle.folder / file, target / file)


def fill_with_random_weights(folder: Path) -> None:
    """Write random weights for every graph in the folder whose weights are missing, and their digests.

    Matrices and convolutions have the standard deviation of their fan-in; scales of normalization are about one. All
    weights are parts of one table of random numbers, because drawing each would take longer than the measurements.
    """
    manifest = read_manifest(folder)
    graphs = [graph for part in manifest.components.values() for graph in part.variants.get(CUDA_VARIANT, {}).values()]
    table, files = np.random.default_rng(0).standard_normal(2**24 + 1, np.float32), dict(manifest.files)
    for graph in graphs:
        weights = folder / weights_file(graph)
        if weights_file(graph) not in files or weights.exists():
            continue
        with weights.open("wb") as stream:
            stream.truncate(files[weights_file(graph)].size)
            for tensor in onnx.load(folder / graph, load_external_data=False).graph.initializer:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    _write(stream, tensor, table)
        files |= file_facts(folder, [weights_file(graph)])
    (folder / MANIFEST).write_text(replace(manifest, files=files).to_json())


def _write(stream, tensor: onnx.TensorProto, table: NDArray[np.float32]) -> None:  # type: ignore[no-untyped-def]
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype, shape = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
    if dtype.kind != "f":
        return  # zeros
    fan_in = prod(shape[1:]) if len(shape) == 4 else shape[0] if len(shape) > 1 else 2500
    start, count = int(place.get("offset", 0)) % len(table), prod(shape)
    repeats = -(-(start + count) // len(table))
    repeated = table if repeats == 1 else np.tile(table, repeats)
    values = repeated[start : start + count].reshape(shape) * np.float32(fan_in**-0.5)
    if len(shape) == 1 and ("gamma" in tensor.name or ("norm" in tensor.name and tensor.name.endswith("weight"))):
        values += 1
    stream.seek(int(place.get("offset", 0)))
    stream.write(values.astype(dtype).tobytes())
