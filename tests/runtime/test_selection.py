"""Which engine is selected to run a bundle, and why."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ldm_runtime import Bundle, LatentDiffusionPipeline, LdmError
from ldm_runtime.backends import onnxruntime as onnxruntime_module
from ldm_runtime.backends import openvino as openvino_module
from ldm_runtime.backends.engine import Choice, Wish, pipeline_components
from ldm_runtime.backends.openvino import has_bf16
from ldm_runtime.backends.registry import BACKEND_NAMES, BACKENDS
from ldm_runtime.backends.selection import select_backend
from ldm_runtime.bundle import file_facts
from ldm_runtime.bundle_layout import MANIFEST
from ldm_runtime.engine_facts import EngineFacts
from ldm_runtime.specs import profile
from tests.support.cuda_driver import compile_driver
from tests.support.small_bundle import write_small_bundle

FAST = "bf16" if has_bf16() else "fp32"
PACKAGES = {"onnxruntime", "openvino", "tensorrt", "tensorrt_lean", "tensorrt_rtx"}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_small_bundle(tmp_path / "bundle")


def built_for(tmp_path: Path, precision: str) -> Bundle:
    return write_small_bundle(tmp_path / precision, precision)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes only these engines look installed."""
    find = importlib.util.find_spec

    def only(*names: str) -> None:
        def result(name: str, package: str | None = None) -> object:
            return None if name in PACKAGES and name not in names else find(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", result)

    return only


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every model count as a large one."""
    monkeypatch.setattr(onnxruntime_module, "SMALL_UNET", 0)


def choose(bundle: Bundle, backend: str = "auto", precision: str | None = None, **wish: object) -> Choice:
    selected = select_backend(bundle, backend, Wish(precision, **wish))  # type: ignore[arg-type]
    assert selected.engine.name == selected.choice.backend
    return selected.choice


def test_callers_may_name_every_engine_or_auto() -> None:
    assert BACKEND_NAMES == ("auto", "onnxruntime", "openvino", "tensorrt")
    assert all(engine.name == name and engine.extra for name, engine in BACKENDS.items())


@pytest.mark.parametrize(
    ("precision", "graph", "arithmetic"),
    [(None, "fp32", FAST), ("fp32", "fp32", "fp32"), ("fp16", "fp16", "fp32"), ("int8", "int8", FAST)],
)
def test_openvino_computes_in_bf16_unless_fp32_is_requested(
    bundle: Bundle, precision: str | None, graph: str, arithmetic: str
) -> None:
    choice = choose(bundle, "openvino", precision)
    assert (choice.backend, choice.graph, choice.arithmetic) == ("openvino", graph, arithmetic)


@pytest.mark.parametrize(("built", "graph"), [("fp16", "fp32"), ("bf16", "fp32"), ("int8", "int8")])
def test_openvino_runs_the_precision_that_the_bundle_was_built_for(tmp_path: Path, built: str, graph: str) -> None:
    choice = choose(built_for(tmp_path, built))
    assert (choice.backend, choice.graph) == ("openvino", graph)


def test_onnxruntime_generates_one_image_of_a_small_model(bundle: Bundle, tmp_path: Path, installed) -> None:
    for one in (bundle, built_for(tmp_path, "fp16")):
        choice = choose(one, once=True)
        assert (choice.backend, choice.device, choice.graph, choice.arithmetic) == (
            "onnxruntime",
            "cpu",
            "fp32",
            "fp32",
        )
        assert "one image" in str(choice) and choose(one).backend == "openvino"
    assert choose(built_for(tmp_path, "int8"), once=True).backend == "openvino"
    if has_bf16():
        assert choose(bundle, precision="bf16", once=True).backend == "openvino"
    installed("openvino")
    assert choose(bundle, once=True).backend == "openvino"


@pytest.mark.usefixtures("large")
def test_openvino_generates_one_image_of_a_large_model(bundle: Bundle) -> None:
    assert choose(bundle, once=True).backend == "openvino"


def test_a_named_engine_runs_the_precision_of_the_bundle_even_once(tmp_path: Path) -> None:
    choice = choose(built_for(tmp_path, "fp16"), "onnxruntime", once=True)
    assert (choice.graph, choice.reason) == ("fp16", "as asked")
    assert choose(built_for(tmp_path, "bf16"), "onnxruntime", device="cpu").graph == "fp32"
    with pytest.raises(LdmError, match="onnxruntime does not compute in bf16 on a CPU; use precision fp32"):
        choose(built_for(tmp_path, "bf16"), "onnxruntime", "bf16", device="cpu")


def test_auto_takes_the_fastest_installed_engine_and_says_why(bundle: Bundle, installed) -> None:
    assert choose(bundle).backend == "openvino" and "fastest" in str(choose(bundle))
    installed("onnxruntime")
    choice = choose(bundle)
    assert (choice.backend, choice.device, choice.arithmetic) == ("onnxruntime", "cpu", "fp32")
    assert "not installed" in choice.facts()["reason"] and "rank" not in choice.facts()
    installed()
    with pytest.raises(LdmError, match=r"no engine is installed; .*\[openvino\]"):
        choose(bundle)


def test_openvino_is_not_imported_if_onnxruntime_is_better(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_module, "has_bf16", lambda: pytest.fail("OpenVINO was asked"))
    assert choose(bundle, once=True).backend == "onnxruntime"


def test_auto_lists_why_no_engine_can_run_the_bundle(bundle: Bundle) -> None:
    with pytest.raises(LdmError, match=r"no engine can run .*: .*openvino: openvino runs on the CPU") as caught:
        choose(bundle, device="cuda", precision="fp64")
    assert "tensorrt: " in str(caught.value)


def test_explicit_choices_are_used_or_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, installed) -> None:
    assert choose(bundle, "onnxruntime", "fp32", device="cpu").facts()["reason"] == "as asked"
    with pytest.raises(LdmError, match="runs on the CPU"):
        choose(bundle, "openvino", device="cuda")
    with pytest.raises(LdmError, match="runs on a GPU"):
        choose(bundle, "tensorrt", device="cpu")
    with pytest.raises(LdmError, match="device: got 'tpu', expected one of auto, cpu, cuda"):
        choose(bundle, device="tpu")
    monkeypatch.setattr(openvino_module, "has_bf16", lambda: False)
    assert choose(bundle, "openvino").arithmetic == "fp32"
    with pytest.raises(LdmError, match="bf16, in which this CPU does not compute"):
        choose(bundle, "openvino", "bf16")
    rounded = choose(built_for(bundle.folder.parent, "bf16"), "openvino", "bf16")
    assert (rounded.graph, rounded.arithmetic) == ("bf16", "fp32")
    with pytest.raises(
        LdmError, match=r"no engine can run .*: onnxruntime: .* bf16 on a CPU; .*openvino: precision: got"
    ):
        choose(bundle, "auto", "bf16")


@pytest.mark.parametrize("backend", ["tensorflow", "", "TensorRT", 3])
def test_unknown_backends(bundle: Bundle, backend: object) -> None:
    with pytest.raises(LdmError, match=r"^backend: got .*, expected one of auto, onnxruntime, openvino, tensorrt"):
        LatentDiffusionPipeline.from_bundle(bundle, backend=backend)  # type: ignore[arg-type]


def choice_in_a_process_of_its_own(bundle: Path, folder: Path, *before: str) -> dict[str, str]:
    """Reason, backend and log of "auto" for a bundle, where the process loads the driver of a folder."""
    lines = [
        "import json, logging, sys",
        *before,
        "from ldm_runtime import LatentDiffusionPipeline",
        "logging.basicConfig(stream=sys.stderr, format='%(levelname)s %(message)s')",
        "with LatentDiffusionPipeline.from_bundle(sys.argv[1], threads=1) as pipeline:",
        "    pipeline(count=1, seed=1, num_inference_steps=1)",
        "    print(json.dumps(pipeline.choice.facts()))",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), str(bundle)],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), "CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "log": done.stderr}


@pytest.fixture
def with_rtx_engines(bundle: Bundle) -> Path:
    """A bundle with entries of engines for 8.6 and 8.9, whose files are not engines."""
    version = pytest.importorskip("tensorrt_rtx").__version__
    components, files = dict(bundle.manifest.components), dict(bundle.manifest.files)
    for name in pipeline_components(bundle.manifest.model):
        file = f"{name}/fp32.tensorrt-rtx-8.9.engine"
        (bundle.folder / file).write_bytes(b"no engine")
        files |= file_facts(bundle.folder, [file])
        graph = files[components[name].graphs["fp32"]].sha256
        bounds = (profile(components[name].spec),)
        engine = EngineFacts(file, "tensorrt-rtx", version, ("8.6", "8.9"), "fp32", graph, bounds)
        components[name] = replace(components[name], engines=(engine,))
    manifest = replace(bundle.manifest, components=components, files=files)
    (bundle.folder / MANIFEST).write_text(manifest.to_json())
    return bundle.folder


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (
            {"capability": "9.0"},
            "8.6, 8.9, this GPU has 9.0; TensorRT for RTX does not support 9.0: use --backend onnx",
        ),
        ({"capability": "8.9"}, "no CUDA GPU can be used"),  # CUDA's runtime needs more of a driver than this one has
        ({"init": 803}, "(the NVIDIA driver cannot start: CUDA error 803"),
        (None, "file too short)); engines need one"),
    ],
)
def test_auto_goes_on_to_the_next_engine_and_reports_why(
    with_rtx_engines: Path, tmp_path: Path, driver: dict[str, object] | None, reason: str
) -> None:
    folder = tmp_path / "driver"
    folder.mkdir()
    if driver is None:
        (folder / "libcuda.so.1").touch()
    else:
        compile_driver(folder, **driver)  # type: ignore[arg-type]
    facts = choice_in_a_process_of_its_own(with_rtx_engines, folder)
    assert facts["backend"] == "openvino"
    assert "fastest" in facts["reason"] and "tensorrt cannot be used: " in facts["reason"] and reason in facts["reason"]
    assert facts["log"].count("WARNING") == 1 and "; openvino runs the model instead" in facts["log"]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_auto_goes_on_from_engines_of_another_version(with_rtx_engines: Path, tmp_path: Path) -> None:
    manifest, version = with_rtx_engines / MANIFEST, pytest.importorskip("tensorrt_rtx").__version__
    manifest.write_text(manifest.read_text().replace(f'"{version}"', '"0.1"'))
    (tmp_path / "driver").mkdir()
    compile_driver(tmp_path / "driver", "8.9")
    facts = choice_in_a_process_of_its_own(with_rtx_engines, tmp_path / "driver")
    assert facts["backend"] == "openvino" and f"built by tensorrt-rtx 0.1, here is {version}" in facts["reason"]


def test_auto_goes_on_if_a_package_is_broken(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino/__init__.py").write_text(
        "raise ImportError('libopenvino.so: cannot open shared object file')"
    )
    facts = choice_in_a_process_of_its_own(bundle.folder, tmp_path, f"sys.path.insert(0, {str(tmp_path)!r})")
    assert facts["backend"] == "onnxruntime"
    assert "openvino cannot be used: openvino cannot be loaded: libopenvino.so" in facts["reason"]
    assert facts["log"].count("WARNING") == 1 and "; onnxruntime runs the model instead" in facts["log"]
