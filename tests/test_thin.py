"""What an inference server gets: the wheel with the runtime's extra alone runs, says what is missing, and draws."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_export import cli
from ldm_runtime.bundle import Bundle

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "diffusers", "transformers", "onnx", "safetensors")
VERBS = [cli.verb_name(module) for module in cli.VERBS]
PROMPT = "a large red circle in the center on a white background"

IMPORT_ALL = f"""
import importlib, importlib.util, json, pkgutil, sys, ldm_runtime
for name in {HEAVY}:
    assert importlib.util.find_spec(name) is None, name + " is installed: this environment is not thin"
names = [module.name for module in pkgutil.walk_packages(ldm_runtime.__path__, "ldm_runtime.")]
for name in names:
    importlib.import_module(name)
assert "onnxruntime" not in sys.modules, "an engine is loaded before it is asked for"
print(json.dumps(names))
"""


HELP = """
import sys
from ldm_export.cli import main
for verb in sys.argv[1:]:
    try:
        main([verb, "--help"])
    except SystemExit as ended:
        assert ended.code == 0, verb
"""


@pytest.fixture(params=[".venv-thin", ".venv-thin-numpy1"], ids=["numpy2", "numpy1"])
def thin(request: pytest.FixtureRequest) -> Path:
    folder = ROOT / request.param
    assert (folder / ".thin").exists(), f"{folder} is missing: `make test` makes it"
    return folder / "bin"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd="/", timeout=300)


def test_every_module_of_the_runtime_imports(thin: Path) -> None:
    done = run(thin / "python", "-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    folder = ROOT / "runtime"
    present = {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        for path in (folder / "ldm_runtime").rglob("*.py")
    }
    assert present == {"ldm_runtime", *json.loads(done.stdout)}


@pytest.mark.parametrize("thin", [".venv-thin"], indirect=True)  # NumPy's version makes no difference
def test_help_of_every_verb(thin: Path) -> None:
    done = run(thin / "ldm-export", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ldm-export"), done.stderr
    done = run(thin / "python", "-c", HELP, *VERBS)
    assert done.returncode == 0, done.stderr
    usages = [line for line in done.stdout.splitlines() if line.startswith("usage: ldm-export ")]
    assert [usage.split()[2] for usage in usages] == VERBS


@pytest.mark.parametrize("verb", ["build", "verify"])
def test_verbs_that_need_torch_name_the_extra_to_install(
    thin: Path, verb: str, shapes_bundle: Path, tmp_path: Path
) -> None:
    place = ["-o", tmp_path / "bundle"] if verb == "build" else [shapes_bundle]
    done = run(thin / "ldm-export", verb, *place)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    command = re.search(r"`pip install (.*)`", done.stderr)
    assert command and "[export]" in command[1]
    installed = run(thin / "python", "-m", "pip", "install", "--dry-run", "--no-deps", *shlex.split(command[1]))
    assert installed.returncode == 0, installed.stderr
    assert not (tmp_path / "bundle").exists()


def test_the_same_image_of_stable_diffusion(thin: Path, sd2_bundle: Bundle, tmp_path: Path) -> None:
    images = tmp_path / "thin.png", tmp_path / "full.png"
    options = ["--seed", "3", "--steps", "4", "--negative-prompt", "red!", "--clip-skip", "1", "--precision", "fp32"]
    options += ["--guidance-rescale", "0.7", "--backend", "onnxruntime"]
    done = run(thin / "ldm-export", "generate", sd2_bundle.folder, "A café, 日!", *options, "-o", images[0])
    assert done.returncode == 0, done.stderr
    command = ["generate", str(sd2_bundle.folder), "A café, 日!", *options, "-o", str(images[1]), "--quiet"]
    assert cli.main(command) == 0
    one, other = (np.asarray(Image.open(image), np.int64) for image in images)
    assert np.abs(one - other).max() <= 1 and one.std() > 5


def test_a_image_from_a_bundle_built_beforehand(thin: Path, shapes_bundle: Path, tmp_path: Path) -> None:
    thin_image, full_image = tmp_path / "thin.png", tmp_path / "full.png"
    options = ["--seed", "3", "--steps", "20"]
    done = run(thin / "ldm-export", "generate", shapes_bundle, PROMPT, *options, "-o", thin_image)
    assert done.returncode == 0, done.stderr
    assert cli.main(["generate", str(shapes_bundle), PROMPT, *options, "-o", str(full_image), "--quiet"]) == 0
    pair = [np.asarray(Image.open(path)).astype(int) for path in (thin_image, full_image)]
    assert pair[0].shape == (64, 64, 3) and np.abs(pair[0] - pair[1]).max() <= 1 and pair[0].std() > 5


def test_a_bundle_is_timed(thin: Path, shapes_bundle: Path) -> None:
    options = ["--batch", "1", "--steps", "2", "--runs", "1", "--json"]
    done = run(thin / "ldm-export", "bench", shapes_bundle, *options)
    assert done.returncode == 0, done.stderr
    assert {measure["part"] for measure in json.loads(done.stdout)["measures"]} >= {"unet", "image"}


def test_inspect_without_onnx(thin: Path, shapes_bundle: Path) -> None:
    done = run(thin / "ldm-export", "inspect", shapes_bundle, "--check", "--json")
    assert done.returncode == 0, done.stderr
    components = set(json.loads(done.stdout)["components"])
    assert components >= {"text_encoder", "cross_attention_kv", "time_embedding", "unet", "decoder"}


def test_report_without_torch_and_onnx(thin: Path, shapes_bundle: Path, tmp_path: Path) -> None:
    done = run(thin / "ldm-export", "report", shapes_bundle, "--steps", "2", "-o", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<img ") == 4
