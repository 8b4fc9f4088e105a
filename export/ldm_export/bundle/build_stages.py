"""The stages of a build: tokenizer, fp32 graphs and, for half precision, ranges and the graphs rewritten by them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
from tokenizers import Tokenizer

from ldm_export.bundle.stages import Stage
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.modules import load_module
from ldm_export.checkpoint.placeholder_vocabulary import tokenizer_folder
from ldm_export.checkpoint.tokenizer_files import write_tokenizer_json
from ldm_export.engine.builder import build_engine
from ldm_export.engine.builder_package import check_request, open_package
from ldm_export.engine.messages import Progress
from ldm_export.engine.process import build_apart
from ldm_export.engine.request import EngineRequest
from ldm_export.graph.components import MODULES
from ldm_export.graph.islands import MARGIN
from ldm_export.graph.keyed_unet import FILES, FORM, export_keyed
from ldm_export.graph.onnx_graph import INLINE_BYTES, OPSET, export_graph
from ldm_export.graph.precision import half_graph
from ldm_export.graph.ranges import measure_ranges
from ldm_export.graph.step_graph import export_step
from ldm_export.prompts import PROMPTS
from ldm_runtime.bundle import Bundle, sha256
from ldm_runtime.ddim import DDIM
from ldm_runtime.errors import CheckpointError
from ldm_runtime.specs import ComponentSpec

TOKENIZER, RANGES = "tokenizer.json", "report/ranges.json"
RANGE_STEPS = 10
"""Denoising steps of each trajectory that ranges are measured on."""
LARGEST_TOLD = 8
"""Largest ranges told in the report on a half graph."""
_WEIGHTS_OF = {"text_encoder": "text_encoder", "unet": "unet", "decoder": "autoencoder"}


def graph_file(component: str, precision: str) -> str:
    """Where a component's graph lies in the bundle."""
    return f"{component}/{precision}.onnx"


def islands_file(component: str, precision: str) -> str:
    """Where the report on a half graph's fp32 islands lies in the bundle."""
    return f"report/{component}.{precision}.json"


def tokenizer_stage(checkpoint: Checkpoint, tools: dict[str, str]) -> Stage:
    """Writes ``tokenizer.json``.

    Its run raises CheckpointError where the tokenizer knows tokens that the text encoder does not embed.
    """

    def run(folder: Path) -> list[str]:
        with TemporaryDirectory() as room:
            write_tokenizer_json(tokenizer_folder(checkpoint, Path(room)), folder / TOKENIZER)
        _check_ids(folder / TOKENIZER, checkpoint)
        return [TOKENIZER]

    return Stage("tokenizer", {"inputs": _digests(checkpoint.tokenizer), "tools": tools}, run)


def graph_stage(checkpoint: Checkpoint, name: str, spec: ComponentSpec, tools: dict[str, str]) -> Stage:
    """Loads, traces and frees one component: its fp32 graph."""

    def run(folder: Path) -> list[str]:
        (folder / name).mkdir()
        module = MODULES[name](load_module(checkpoint, name)).eval()
        return _relative(export_graph(module, spec, folder / graph_file(name, "fp32")), folder)

    depends: dict[str, Any] = {
        "inputs": _digests(checkpoint.components[_WEIGHTS_OF[name]].folder),
        "spec": repr(spec),
        "seed": checkpoint.random_seed,
        "precision": "fp32",
        "opset": OPSET,
        "inline": INLINE_BYTES,
        "tools": tools,
    }
    return Stage(f"{name}.fp32", depends, run)


def step_stage(spec: ComponentSpec, tools: dict[str, str]) -> Stage:
    """Writes the graph of a DDIM step, which is the same for every model of these shapes."""

    def run(folder: Path) -> list[str]:
        (folder / spec.name).mkdir()
        return _relative(export_step(spec, folder / graph_file(spec.name, "fp32")), folder)

    return Stage(f"{spec.name}.fp32", {"spec": repr(spec), "tools": tools}, run)


def keyed_stage(work: Path, unet: Stage) -> Stage:
    """Write the UNet's fp32 graph, which lies in ``work``, in the form that ONNX Runtime runs on a CPU.

    A UNet whose attention has another form gets no such graph.
    """

    def run(folder: Path) -> list[str]:
        targets = {component: folder / file for component, file in FILES.items()}
        (folder / "unet").mkdir()
        return _relative(export_keyed(work / graph_file("unet", "fp32"), targets), folder)

    return Stage("keyed_unet.fp32", {"graph": unet.key, "form": FORM}, run)


def ranges_stage(
    work: Path,
    specs: dict[str, ComponentSpec],
    scheduler: DDIM,
    before: list[Stage],
    tools: dict[str, str],
    progress: Progress,
) -> Stage:
    """Measures how large each tensor grows over denoising trajectories of the fp32 graphs that lie in ``work``."""

    def run(folder: Path) -> list[str]:
        graphs = {name: work / graph_file(name, "fp32") for name in specs}
        ranges = measure_ranges(graphs, specs, work / TOKENIZER, scheduler, PROMPTS, RANGE_STEPS, progress)
        (folder / RANGES).parent.mkdir()
        (folder / RANGES).write_text(json.dumps(ranges, indent=1, sort_keys=True) + "\n")
        return [RANGES]

    depends = {
        "stages": {stage.name: stage.key for stage in before},
        "scheduler": scheduler.to_config(),
        "prompts": PROMPTS,
        "steps": RANGE_STEPS,
        "tools": {**tools, "onnxruntime": onnxruntime.__version__},
    }
    return Stage("ranges", depends, run)


def half_stage(work: Path, name: str, precision: str, ranges: Stage) -> Stage:
    """Rewrites a component's fp32 graph, which lies in ``work``, in half precision, and reports its islands."""

    def run(folder: Path) -> list[str]:
        (folder / name).mkdir()
        measured = json.loads((work / RANGES).read_text())[name]
        made = half_graph(work / graph_file(name, "fp32"), folder / graph_file(name, precision), precision, measured)
        report = folder / islands_file(name, precision)
        report.parent.mkdir()
        largest = sorted(measured.items(), key=lambda item: -item[1])[:LARGEST_TOLD]
        facts = {key: value for key, value in asdict(made).items() if key != "files"} | {"largest": dict(largest)}
        report.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        return _relative([*made.files, report], folder)

    depends = {"ranges": ranges.key, "precision": precision, "margin": MARGIN}
    return Stage(f"{name}.{precision}", depends, run)


def engine_file(component: str, precision: str, request: EngineRequest) -> str:
    """Where a component's engine lies in the bundle; its facts lie beside it in ``.json``."""
    return f"{component}/{precision}.{request.name}.engine"


def engine_stage(
    work: Path,
    spec: ComponentSpec,
    precision: str,
    request: EngineRequest,
    graph: Stage,
    factor: int,
    progress: Progress,
    *,
    matrix: bool = True,
    previous: Bundle | None = None,
) -> Stage:
    """Builds an engine from the component's graph that lies in ``work``, and writes its facts beside it.

    Args:
        matrix: the graph has convolutions or matrix products.
        previous: the bundle that is there, whose engine may take the new weights.

    Raises:
        BuildError: a request that the package cannot serve.
    """

    def run(folder: Path) -> list[str]:
        file = engine_file(spec.name, precision, request)
        report = work / islands_file(spec.name, precision)
        islands = json.loads(report.read_text())["matrix_islands"] if report.is_file() else ()
        (folder / spec.name).mkdir()
        source, computed = work / graph_file(spec.name, precision), precision
        if not source.is_file():  # the component stays in fp32 as a whole
            source, computed = work / graph_file(spec.name, "fp32"), "fp32"
        options = {"factor": factor, "islands": islands, "progress": progress, "previous": previous}
        if matrix:
            made = build_apart(source, spec, computed, request, folder / file, **options)
        else:
            made = build_engine(source, spec, computed, request, folder / file, matrix=False, **options)
        told = replace(made, file=file, precision=precision).to_json()
        (folder / f"{file}.json").write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
        return [file, f"{file}.json"]

    package = open_package(request.target)
    check_request(package, request, precision, matrix)
    depends = {"graph": graph.key, "request": repr(request), "version": package.__version__}
    return Stage(f"{spec.name}.{precision}.{request.name}", depends, run)


def _relative(files: list[Path], folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in files]


def _check_ids(tokenizer: Path, checkpoint: Checkpoint) -> None:
    token, highest = max(Tokenizer.from_file(str(tokenizer)).get_vocab().items(), key=lambda item: item[1])
    rows = checkpoint.components["text_encoder"].config["vocab_size"]
    if highest >= rows:
        raise CheckpointError(
            f"tokenizer: {checkpoint.tokenizer}: token {token!r:.40} has id {highest}, but the text encoder embeds "
            f"{rows} tokens; use the tokenizer and the text encoder of one checkpoint"
        )


def _digests(folder: Path) -> dict[str, str]:
    try:
        return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}); check the checkpoint") from None
