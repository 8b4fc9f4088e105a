"""The Dockerfile: linted, its rules kept, and its commands run in folders that stand for the images."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from ldm_export.cli import main
from ldm_export.demo import demo_checkpoint
from tests.support.dockerfile import FILE, ROOT, Image, stages
from tests.support.snapshot import contents
from tests.support.triton_server import TritonServer

STAGES = stages()
PROMPT = "a large red circle in the center on a white background"
ENGINE = ("--backend", "onnxruntime", "--precision", "fp32")
HEAVY = ("torch", "diffusers", "transformers", "onnx", "tritonclient")


def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    hadolint = [Path(sys.executable).parent / "hadolint", "--failure-threshold", "style", "--no-color"]
    done = subprocess.run([*hadolint, FILE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout
    (tmp_path / "Dockerfile").write_text(FILE.read_text() + "USER root\n")  # which it would see
    done = subprocess.run([*hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1


def test_every_image_is_pinned_and_none_runs_as_root() -> None:
    assert all(re.search(r":\d+\.\d+\S*@sha256:[0-9a-f]{64}$", stage.image) for stage in STAGES.values())
    for name in ("runtime", "build", "serve"):
        assert STAGES[name].values("USER") == ["10001:10001"]
    kinds = [kind for kind, _ in STAGES["serve"].steps]
    assert "ADD" not in kinds and "RUN" not in kinds  # Triton's image as it is, and a folder


def test_no_image_holds_secrets_or_more_of_the_folder_than_it_needs() -> None:
    ignored = (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        word
        for stage in STAGES.values()
        for value in stage.values("COPY")
        if "--from" not in value
        for word in value.split()[:-1]
    }
    assert "*" in ignored and copied <= allowed and allowed - copied == {"requirements"}  # which is only mounted
    arguments = {name for stage in STAGES.values() for name in stage.arguments}
    assert arguments == {"PIP_INDEX_URL", "EXTRA"}
    for name in ("runtime", "build", "serve"):  # an index may hold a password: it may be in no image that is kept
        assert "PIP_INDEX_URL" not in " ".join(STAGES[name].values("ENV"))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = Image(tmp_path_factory.mktemp("wheel"))
    image.build(STAGES["wheel"])
    return image.path("/wheels")


@pytest.fixture(scope="module")
def packages(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the serving image has in /opt/ldm, for the Python that runs the tests."""
    image = Image(tmp_path_factory.mktemp("packages"), wheels)
    image.build(STAGES["packages"])
    return image.path("/opt/ldm")


def test_the_wheel_has_the_three_packages(wheels: Path) -> None:
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.partition("/")[0] for name in archive.namelist()}
    assert {"ldm_export", "ldm_runtime", "ldm_calibration"} <= folders


@pytest.mark.slow
def test_the_runtime_image_draws(wheels: Path, shapes_bundle: Path, tmp_path: Path) -> None:
    image = Image(tmp_path / "image", wheels)
    image.build(STAGES["runtime"])
    (entry,) = STAGES["runtime"].command("ENTRYPOINT")
    done = run([image.bin / entry, "generate", shapes_bundle, PROMPT, "--steps", "5", "--seed", "1", *ENGINE], tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "out.png", shapes_bundle, tmp_path / "here.png")
    assert not installed(image.bin / "python") & set(HEAVY)


def test_the_build_image_is_installed_as_the_runtime_image_is() -> None:
    """By the same command, but for the extra, whose lock file tests/docker/test_locks.py checks."""
    build, runtime = STAGES["build"], STAGES["runtime"]
    assert build.values("RUN") == runtime.values("RUN") and build.image == runtime.image
    assert (build.arguments["EXTRA"], runtime.arguments["EXTRA"]) == ("export", "onnxruntime")


def test_the_runtime_image_is_installed_as_the_packages_of_the_serving_image_are() -> None:
    """By the same command, but for NumPy's version and the place; the serving image's is run and serves below."""
    packages, runtime = STAGES["packages"], STAGES["runtime"]
    (command,) = packages.values("RUN")
    assert command.count(" --target /opt/ldm") == 2 and command.count('"${EXTRA}-numpy1"') == 1
    command = command.replace(" --target /opt/ldm", "").replace('"${EXTRA}-numpy1"', '"${EXTRA}"')
    assert runtime.values("RUN") == [command] and runtime.arguments == packages.arguments
    (entry,) = runtime.command("ENTRYPOINT")
    assert f'\n{entry} = "' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_the_build_image_builds(wheels: Path, tmp_path: Path) -> None:
    image = Image(tmp_path / "image", wheels)
    image.build(STAGES["build"])
    done = run([image.bin / "ldm-export", "build", demo_checkpoint(), "-o", "bundle", "--quiet"], tmp_path)
    assert done.returncode == 0 and (tmp_path / "bundle/manifest.json").exists(), done.stderr


def test_the_serving_images_server_generates_and_stops_on_sigterm(
    packages: Path, shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton with the image's options and packages: healthy, right images, nothing written to its repository."""
    assert main(["triton", str(shapes_bundle), "-o", str(tmp_path / "models"), *ENGINE, "--quiet"]) == 0
    before, serve = contents(tmp_path / "models"), STAGES["serve"]
    options = [option for option in serve.command("CMD") if option != "--model-repository=/models"]
    assert len(options) == len(serve.command("CMD")) - 1
    python = environment(packages, tmp_path / "venv")
    for name, value in (word.split("=") for line in serve.values("ENV") for word in line.split()):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    server = TritonServer(tmp_path / "models", tmp_path / "log", options, python)
    server.start()
    try:
        _, *check = serve.command("HEALTHCHECK")
        check[-1] = check[-1].replace("127.0.0.1:8000", server.http)
        assert run([python / "bin/python3", *check], tmp_path).returncode == 0
        arguments = [PROMPT, "--steps", "5", "--seed", "1", "-o", str(tmp_path / "out.png"), "--quiet"]
        assert main(["client", *arguments, "--url", server.http]) == 0
    finally:
        code = server.stop(signal.SIGTERM)
    assert code == 0
    assert_same(tmp_path / "out.png", shapes_bundle, tmp_path / "here.png")
    assert contents(tmp_path / "models") == before
    assert run([python / "bin/python3", *check], tmp_path).returncode == 1


def test_the_serving_image_has_numpy_1_and_nothing_heavy(packages: Path, tmp_path: Path) -> None:
    python = environment(packages, tmp_path / "venv") / "bin/python3"
    message = run([python, "-c", "import numpy; print(numpy.__version__, numpy.__file__)"], tmp_path).stdout
    assert message.startswith("1.26.4 ") and str(packages) in message
    assert not installed(python) & set(HEAVY)


def environment(packages: Path, folder: Path) -> Path:
    """An environment whose Python has what the serving image's has, in the way it has it there."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    line = (ROOT / "docker/ldm.pth").read_text()
    assert "/opt/ldm" in line
    (site / "ldm.pth").write_text(line.replace("/opt/ldm", str(packages)))
    return folder


def assert_same(first_image: Path, bundle: Path, here: Path) -> None:
    """The image is that which this environment draws from the bundle."""
    arguments = ["generate", str(bundle), PROMPT, "--steps", "5", "--seed", "1", *ENGINE]
    assert main([*arguments, "-o", str(here), "--quiet"]) == 0
    one, other = (np.asarray(Picture.open(path)).astype(int) for path in (first_image, here))
    assert np.abs(one - other).max() <= 1 and one.std() > 5


def installed(python: Path) -> set[str]:
    """Which of HEAVY an image's Python finds."""
    code = f"import importlib.util, json; print(json.dumps([n for n in {HEAVY} if importlib.util.find_spec(n)]))"
    return set(json.loads(run([python, "-c", code], Path("/")).stdout))


def run(command: list[object], place: Path) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=place, env=variables, capture_output=True, text=True, timeout=300)
