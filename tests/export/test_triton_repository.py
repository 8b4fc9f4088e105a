"""Model repositories: configs that Triton's schema takes and that say what the bundle says, and whole versions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from ldm_export.cli import main
from ldm_export.serving.config import DATA_TYPES, Serving, component_config
from ldm_export.serving.models import model_names
from ldm_export.serving.pbtxt import Enum, MapOf, to_pbtxt
from ldm_export.verbs.triton import row_buckets
from ldm_runtime.batching.limits import Limits
from ldm_runtime.bundle import Bundle
from ldm_runtime.engine_facts import EngineFacts
from ldm_runtime.specs import Axis, profile
from ldm_runtime.triton.parameters import ModelParameters
from ldm_runtime.triton.tensors import input_fields, output_fields
from tests.support.numpy_model import description

COMPONENTS = ("text_encoder", "cross_attention_kv", "time_embedding", "unet", "shallow_unet", "decoder")


def write(bundle: Path, repository: Path, *options: object) -> int:
    return main(["triton", str(bundle), "-o", str(repository), "--quiet", *map(str, options)])


def config(repository: Path, name: str) -> ModelConfig:
    return text_format.Parse((repository / name / "config.pbtxt").read_text(), ModelConfig())


def files(folder: Path) -> dict[str, os.stat_result]:
    return {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}


def test_text_format_is_read_back_as_it_was_meant() -> None:
    message = {
        "name": 'a "quoted" name\n\u00e9',
        "max_batch_size": 4,
        "input": [{"name": "x", "data_type": Enum("TYPE_FP32"), "dims": [-1, 3], "reshape": {"shape": []}}],
        "parameters": MapOf({"k": {"string_value": "v"}, "l": {"string_value": ""}}),
        "dynamic_batching": {"preserve_ordering": True},
    }
    read = text_format.Parse(to_pbtxt(message), ModelConfig())
    assert read.name == message["name"] and read.max_batch_size == 4
    assert list(read.input[0].dims) == [-1, 3] and read.input[0].HasField("reshape")
    assert {key: value.string_value for key, value in read.parameters.items()} == {"k": "v", "l": ""}
    assert read.dynamic_batching.preserve_ordering


@pytest.mark.parametrize("target", ["python", "onnxruntime"])
def test_a_component_is_served_as_its_spec_says(tiny_bundle: Path, tmp_path: Path, target: str) -> None:
    assert write(tiny_bundle, tmp_path / "repository", "--target", target, "--device", "cpu") == 0
    for name in COMPONENTS:
        part = Bundle.open(tiny_bundle).manifest.components[name]
        read = config(tmp_path / "repository", name)
        assert read.name == name and read.version_policy.latest.num_versions == 1
        assert (read.backend, read.platform) == {"python": ("python", ""), "onnxruntime": ("", "onnxruntime_onnx")}[
            target
        ]
        for tensors, specs in ((read.input, part.spec.inputs), (read.output, part.spec.outputs)):
            assert [tensor.name for tensor in tensors] == [tensor.name for tensor in specs]
            for tensor, spec in zip(tensors, specs, strict=True):
                assert (
                    ModelConfig.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number[tensor.data_type].name
                    == f"TYPE_{DATA_TYPES[spec.dtype]}"
                )
                expected = [-1 if isinstance(dim, Axis) else dim for dim in spec.shape[1:]]
                assert list(tensor.dims) == (expected or [1])
                assert tensor.HasField("reshape") == (not expected) and not tensor.reshape.shape
                assert read.max_batch_size <= spec.bounds("max")[0]
        (group,) = read.instance_group
        assert (group.kind, group.count) == (group.KIND_CPU, 1)
        assert read.dynamic_batching.max_queue_delay_microseconds == 0
        assert read.dynamic_batching.default_queue_policy.max_queue_size > 0
        (warmup,) = read.model_warmup
        for spec in part.spec.inputs:
            assert list(warmup.inputs[spec.name].dims) == (list(spec.bounds("opt")[1:]) or [1])
        assert warmup.batch_size == part.spec.inputs[0].bounds("opt")[0]
    assert (config(tmp_path / "repository", "unet").optimization.graph.level == 1) == (target == "onnxruntime")


def test_a_gpu_is_requested_for_gpu_models(tiny_bundle: Path, tmp_path: Path) -> None:
    assert write(tiny_bundle, tmp_path / "repository", "--target", "onnxruntime", "--device", "cuda") == 0
    for name in (*COMPONENTS, "ldm_stream"):
        (group,) = config(tmp_path / "repository", name).instance_group
        assert group.kind == group.KIND_GPU and list(group.gpus) == [0]
    (group,) = config(tmp_path / "repository", "ldm").instance_group
    assert group.kind == group.KIND_CPU  # it only passes requests on


def test_graphs_for_cuda_are_served_on_a_gpu(cuda_bundle: Bundle, tmp_path: Path) -> None:
    options = ("--target", "onnxruntime", "--device", "cuda", "--precision", "fp16")
    assert write(cuda_bundle.folder, tmp_path / "repository", *options) == 0
    read = config(tmp_path / "repository", "unet")
    types = {tensor.name: tensor.data_type for tensor in read.input}
    assert types.pop("sample") == read.output[0].data_type != next(iter(types.values()))
    assert len(set(types.values())) == 1  # fp16
    (accelerator,) = read.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "cuda" and accelerator.parameters["prefer_nhwc"] == "1"
    graph = (tmp_path / "repository" / "unet" / "1" / "model.onnx").read_bytes()
    assert graph == cuda_bundle.file("unet/fp16.onnxruntime-cuda.onnx").read_bytes()


def test_tensorrt_plans_are_chosen_by_compute_capability(tiny_bundle: Path) -> None:
    spec = Bundle.open(tiny_bundle).manifest.components["unet"].spec
    shapes = {name: (low, opt, (8, *high[1:])) for name, (low, opt, high) in profile(spec).items()}
    engines = [
        EngineFacts(f"unet/{c}.plan", "tensorrt", "10.3", (c,), "fp16", "0" * 64, (shapes,)) for c in ("8.6", "9.0")
    ]
    serving = Serving("tensorrt", True, ModelParameters(precision="fp16"))
    read = text_format.Parse(to_pbtxt(component_config(spec, serving, engines)), ModelConfig())
    assert read.platform == "tensorrt_plan" and read.max_batch_size == 8
    assert dict(read.cc_model_filenames) == {"8.6": "model-86.plan", "9.0": "model-90.plan"}
    assert read.optimization.cuda.graphs and read.instance_group[0].kind == read.instance_group[0].KIND_GPU


def test_the_whole_model_takes_and_gives_what_the_documentation_says(tiny_bundle: Path, tmp_path: Path) -> None:
    options = ("--max-rows", "16", "--max-queue", "7", "--threads", "1", "--lora-selections", "3")
    assert write(tiny_bundle, tmp_path / "repository", *options) == 0
    stream, front = (config(tmp_path / "repository", name) for name in ("ldm_stream", "ldm"))
    assert stream.model_transaction_policy.decoupled and not front.model_transaction_policy.decoupled
    assert {tensor.name for tensor in stream.input} - {tensor.name for tensor in front.input} == {"PREVIEW_EVERY"}
    assert {tensor.name for tensor in stream.output} - {tensor.name for tensor in front.output} == {
        "STEP",
        "TOTAL",
        "FINAL",
    }
    assert [tensor.name for tensor in front.input if not tensor.optional] == ["PROMPT"]
    assert front.max_batch_size == stream.max_batch_size == 0
    args = {"parameters": {key: {"string_value": value.string_value} for key, value in stream.parameters.items()}}
    parameters = ModelParameters.from_args({"model_config": json.dumps(args)})
    assert parameters.limits == Limits(max_rows=16, max_queue=7)
    assert (parameters.unet, parameters.threads, parameters.lora_selections) == ("in_process", "1", "3")


def test_the_tensors_follow_the_model() -> None:
    """A model without text has no prompts but a number of images; one without guidance has no guidance scale."""
    text, free = description(), description(text=False, image_channels=1)
    names = [{field.name for field in input_fields(model)} for model in (text, free)]
    assert names[0] - names[1] == {
        *("PROMPT", "NEGATIVE_PROMPT", "IMAGES_PER_PROMPT", "CLIP_SKIP", "PROMPT_CHUNKS", "PROMPT_WEIGHTS"),
        *("GUIDANCE", "GUIDANCE_EVERY", "GUIDANCE_INTERVAL", "GUIDANCE_RESCALE"),
    }
    assert names[1] - names[0] == {"COUNT"} and all(field.optional for field in input_fields(free))
    assert [output_fields(model)[0].dims[-1] for model in (text, free)] == [3, 1]


def test_files_are_linked_not_copied(bundle_copy: Path, tmp_path: Path) -> None:
    assert write(bundle_copy, tmp_path / "repository", "--target", "onnxruntime") == 0
    graph = (bundle_copy / "unet" / "fp32.onnx").stat()
    assert (tmp_path / "repository/unet/1/model.onnx").stat().st_ino == graph.st_ino
    assert (tmp_path / "repository/ldm_stream/1/bundle/unet/fp32.onnx").stat().st_ino == graph.st_ino
    Bundle.open(tmp_path / "repository/ldm_stream/1/bundle").check()


def test_writing_again_adds_a_version_and_keeps_the_one_before(bundle_copy: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for number in (1, 2, 3):
        assert write(bundle_copy, repository, "--max-queue", number) == 0
        for name in model_names(Bundle.open(bundle_copy)):
            versions = sorted(path.name for path in (repository / name).iterdir() if path.is_dir())
            assert versions == [str(n) for n in range(max(1, number - 1), number + 1)]
        assert config(repository, "ldm").parameters["max_queue"].string_value == str(number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "repository"]


def test_only_some_models(tiny_bundle: Path, tmp_path: Path) -> None:
    assert write(tiny_bundle, tmp_path / "one", "--only", "ldm") == 0
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["ldm", "ldm_stream"]
    assert write(tiny_bundle, tmp_path / "two", "--only", "ldm_stream", "--per-step") == 0
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["ldm_stream", "shallow_unet", "unet"]
    assert config(tmp_path / "two", "ldm_stream").parameters["unet"].string_value == "per_step"
    (tmp_path / "two" / "mine").mkdir()
    assert write(tiny_bundle, tmp_path / "two", "--only", "unet") == 0
    assert (tmp_path / "two" / "mine").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-rows", "0"], "max-rows: got 0, expected 1..64"),
        (["--max-rows", "65"], "max-rows: got 65"),
        (["--max-queue", "0"], "max-queue: got 0"),
        (["--lora-selections", "65"], "lora-selections: got 65, expected a whole number from 1 to 64"),
        (["--threads", "0"], "threads: got 0"),
        (["--only", "ldm", "step"], "only: got 'step', expected one or more of text_encoder, cross_attention_kv, "),
        (["--precision", "fp16", "--target", "onnxruntime"], "has no fp16 graph"),
        (["--target", "tensorrt"], "has no fp32 engine of TensorRT"),
    ],
)
def test_what_cannot_be_served_is_refused(tiny_bundle: Path, refused, options: list[str], message: str) -> None:
    refused("triton", tiny_bundle, "-o", "repository", *options, message=message)


def test_a_damaged_bundle_is_refused(bundle_copy: Path, refused) -> None:
    graph = bundle_copy / "decoder" / "fp32.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    refused("triton", bundle_copy, "-o", "repository", message="decoder/fp32.onnx: got sha256")


def test_a_model_of_somebody_else_is_left_alone(tiny_bundle: Path, tmp_path: Path, refused) -> None:
    (tmp_path / "repository" / "unet" / "1").mkdir(parents=True)
    (tmp_path / "repository" / "unet" / "config.pbtxt").write_text('name: "unet"')
    refused("triton", tiny_bundle, "-o", "repository", message="is not a model that `ldm-export triton` wrote")
    (tmp_path / "file").write_text("")
    refused("triton", tiny_bundle, "-o", "file", message="is a file, expected a folder")


def test_a_full_disk_leaves_the_old_version_alone(bundle_copy: Path, tmp_path: Path, monkeypatch) -> None:
    repository = tmp_path / "repository"
    assert write(bundle_copy, repository) == 0
    before = {name: (fact.st_ino, fact.st_size) for name, fact in files(repository).items()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    assert write(bundle_copy, repository) == 1
    assert {name: (fact.st_ino, fact.st_size) for name, fact in files(repository).items()} == before


def test_another_disk_gets_one_copy_for_all_models(bundle_copy: Path, tmp_path: Path, monkeypatch) -> None:
    link = os.link

    def link_on_this_disk(source: Path, target: Path) -> None:
        if Path(source).is_relative_to(bundle_copy):
            raise OSError(18, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr(os, "link", link_on_this_disk)
    assert write(bundle_copy, tmp_path / "repository") == 0
    copies = {
        (tmp_path / f"repository/{name}/1/bundle/unet/fp32.onnx").stat().st_ino for name in (*COMPONENTS, "ldm_stream")
    }
    assert len(copies) == 1 and copies != {(bundle_copy / "unet/fp32.onnx").stat().st_ino}


def test_row_counts_for_engines() -> None:
    assert (
        row_buckets(32) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
        and row_buckets(1) == [1]
        and row_buckets(5) == [1, 2, 3, 4, 5]
    )
    for most in range(1, 65):
        Limits(max_rows=most, row_buckets=row_buckets(most))
