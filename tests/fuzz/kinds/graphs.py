"""ONNX graphs with external data: an engine loads and runs each in a process of its own, which it may crash."""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import onnx
from onnx import TensorProto, helper

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.bundle import file_facts
from ldm_runtime.bundle_layout import MANIFEST, graph_file, weights_file
from ldm_runtime.errors import BackendError
from tests.fuzz.mutation import BYTES, NUMBERS, TEXTS, changed_bytes
from tests.fuzz.outcome import ACCEPTED, REFUSED, Attempt, outcome
from tests.support.isolated import context
from tests.support.small_bundle import write_small_bundle

__all__ = ["prepare"]

ENGINES = ("onnxruntime", "openvino")
COMPONENTS = ("unet", "decoder", "time_embedding")
MEMORY = 4 * 2**30
"""Bytes of address space that an input may take."""
SECONDS = 30.0
OPERATORS = ("Identity", "Cast", "Reshape", "Gather", "Resize", "Conv", "Loop", "If", "ConstantOfShape", "Tile", "NoOp")


def prepare(folder: Path) -> Attempt:
    """Write a bundle whose weights are external data; an input changes a graph or its data, and the manifest fits."""
    write_small_bundle(folder / "valid")
    names = [name for component in COMPONENTS for name in _externalize(folder / "valid", component)]

    def attempt(random: Random) -> None:
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder / "valid", work)
        name = random.choice(names)
        content = (work / name).read_bytes()
        (work / name).write_bytes(
            _changed_graph(random, content)
            if name.endswith(".onnx") and random.random() < 0.7
            else changed_bytes(random, content)
        )
        _relist(work, [name])
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = context().Process(target=_run, args=(work, random.choice(ENGINES), sender))
        process.start()
        sender.close()
        process.join(SECONDS + 15)
        if process.is_alive():
            process.kill()
            process.join()
        try:
            result = receiver.recv()
        except EOFError:
            result = f"the process ended with {process.exitcode}"
        if result == REFUSED:
            raise BackendError("refused")
        if result != ACCEPTED:
            raise AssertionError(result)

    return attempt


def _run(bundle: Path, engine: str, sender: Connection) -> None:
    """Generate an image, and send the outcome."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def generate() -> None:
        with LatentDiffusionPipeline.from_bundle(bundle, backend=engine, precision="fp32", threads=1) as pipeline:
            pipeline(count=1, seed=1, num_inference_steps=1)

    sender.send(outcome(generate, SECONDS))
    sender.close()


def _externalize(bundle: Path, component: str) -> list[str]:
    """Move the constants of a graph into a file beside it; returns the names of both."""
    name = graph_file(component, "fp32")
    model = onnx.load(str(bundle / name))
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:
        tensor = node.attribute[0].t
        tensor.name = node.output[0]
        model.graph.initializer.append(tensor)
        model.graph.node.remove(node)
    data = weights_file(name)
    onnx.save(model, str(bundle / name), save_as_external_data=True, location=Path(data).name, size_threshold=0)
    _relist(bundle, [name, data])
    return [name, data]


def _relist(bundle: Path, names: list[str]) -> None:
    """Write the digests of files into the manifest."""
    document = json.loads((bundle / MANIFEST).read_text())
    facts = file_facts(bundle, names)
    document["files"] |= {name: {"sha256": facts[name].sha256, "size": facts[name].size} for name in names}
    (bundle / MANIFEST).write_text(json.dumps(document))


def _changed_graph(random: Random, content: bytes) -> bytes:
    """Change fields of a graph: tensors and their places in the data, operators, attributes, inputs and outputs."""
    model = onnx.load_from_string(content)
    for _ in range(random.randint(1, 3)):
        kind = random.randrange(8)
        if kind <= 2 and model.graph.initializer:
            _change_tensor(random, random.choice(model.graph.initializer))
        elif kind == 3 and model.graph.node:
            node = random.choice(model.graph.node)
            node.op_type = random.choice(OPERATORS)
        elif kind == 4 and model.graph.node:
            node = random.choice(model.graph.node)
            value = random.choice((random.choice(NUMBERS) % 2**63, 0.5, "x", [1, -1], [2**40] * 4))
            node.attribute.append(helper.make_attribute(random.choice(("axis", "pads", "to", "group", "mode")), value))
        elif kind == 5:
            value_info = random.choice([*model.graph.input, *model.graph.output])
            value_info.type.tensor_type.elem_type = random.randrange(24)
        elif kind == 6:
            value_info = random.choice([*model.graph.input, *model.graph.output])
            dim = random.choice(value_info.type.tensor_type.shape.dim)
            dim.dim_value = random.choice(NUMBERS) % 2**63
        elif model.graph.node:
            node = random.choice(model.graph.node)
            places = node.input if random.random() < 0.5 else node.output
            if places:
                places[random.randrange(len(places))] = random.choice(("", "sample", "image", "latents", "nothing"))
    return bytes(model.SerializeToString())


def _change_tensor(random: Random, tensor: TensorProto) -> None:
    kind = random.randrange(4)
    if kind == 0 and tensor.dims:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(NUMBERS) % 2**63
    elif kind == 1:
        tensor.data_type = random.randrange(24)
    elif kind == 2 and tensor.external_data:
        entry = random.choice(tensor.external_data)
        entry.value = str(random.choice((*NUMBERS, *TEXTS))).replace("\ud800", "")
    else:
        tensor.raw_data = random.choice(BYTES)
