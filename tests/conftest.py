"""Checkpoints and bundles that several folders of tests share.

Nothing here imports torch, diffusers, Triton's client or ``ldm_export`` until a test asks for a fixture that needs it:
the tests of the runtime that need NumPy alone also run in an environment that has nothing else.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tests.support.scheduling import SERVING, ModuleScheduling
from tests.support.shared import SharedFolders
from tests.support.snapshot import contents

if TYPE_CHECKING:
    from ldm_runtime.bundle import Bundle

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it once; each worker of pytest-xdist has a core
# Every run has the same examples; `--hypothesis-profile random` draws others.
hypothesis.settings.register_profile("ldm", deadline=None, derandomize=True)
hypothesis.settings.register_profile("few", deadline=None, derandomize=True, max_examples=10)
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.load_profile("ldm")


def pytest_configure(config: pytest.Config) -> None:
    """Let all processes of the run share traces: each structure of a module is traced once."""
    if "LDM_EXPORT_TRACE_CACHE" not in os.environ:
        os.environ["LDM_EXPORT_TRACE_CACHE"] = tempfile.mkdtemp(prefix="ldm-export-traces-")
        config.add_cleanup(partial(shutil.rmtree, os.environ["LDM_EXPORT_TRACE_CACHE"]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ModuleScheduling:
    """Give each worker whole modules, in the order of collection."""
    config.option.loadscopereorder = False
    return ModuleScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the serving tests, which one worker runs and which take longest, so that no worker waits for them.

    The tests of the runtime come last: the second worker, which starts from the end, needs no built bundle for them.
    """
    items.sort(key=lambda item: (not item.nodeid.startswith(SERVING), item.nodeid.startswith("tests/runtime/")))


def pytest_collection_finish() -> None:
    """Let the garbage collector leave out what the imports made, and run less often: it took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def worker_of(config: pytest.Config) -> str:
    """Id of this process as a worker of pytest-xdist, "" if it is none; processes started by tests are none."""
    return str(getattr(config, "workerinput", {}).get("workerid", ""))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[SharedFolders]:
    """Folders that the workers of a run share; the run fails if a test has changed one."""
    folders = SharedFolders.of_run(tmp_path_factory, worker_of(pytestconfig))
    yield folders
    changed = folders.changed()
    assert not changed, f"shared folders were changed by a test: {', '.join(changed)}; let it change a copy"


@pytest.fixture(scope="module", autouse=True)
def one_process(shared: SharedFolders, request: pytest.FixtureRequest) -> None:
    """Fail if another worker runs tests of the same module: its fixtures would be built twice."""
    own = worker_of(request.config)
    assert shared.first_worker(request.path, own) == own, f"{request.path}: several processes run this module"


@pytest.fixture(autouse=True)
def root_logger() -> None:
    """Give the root logger its default level, which the command line changes for its process, in fixtures too."""
    logging.getLogger().setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def tiny_checkpoint(shared: SharedFolders) -> Path:
    """A tiny checkpoint with random weights; read-only."""
    from tests.support.checkpoints import random_checkpoint

    return shared.once("tiny", random_checkpoint)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, shared: SharedFolders) -> Path:
    """The fp32 bundle of ``tiny_checkpoint``; read-only."""
    from tests.support.bundles import build_bundle

    return shared.once("tiny_bundle", lambda folder: build_bundle(tiny_checkpoint, folder))


@pytest.fixture(scope="session")
def shapes_bundle(shared: SharedFolders) -> Path:
    """The fp32 bundle of the checkpoint that ships; read-only."""
    from tests.support.bundles import build_shapes

    return shared.once("shapes_bundle", build_shapes)


@pytest.fixture(scope="session")
def shapes_engines(shapes_bundle: Path, shared: SharedFolders) -> Bundle:
    """``shapes_bundle`` with fp16 graphs and TensorRT for RTX engines for two GPUs; read-only."""
    from ldm_runtime.bundle import Bundle
    from tests.support.bundles import add_engines

    return Bundle.open(shared.once("shapes_engines", lambda folder: add_engines(shapes_bundle, folder)))


@pytest.fixture(scope="session")
def shapes_cuda(shapes_bundle: Path, shared: SharedFolders) -> Bundle:
    """``shapes_bundle`` with fp16 graphs, also those for ONNX Runtime on CUDA; read-only."""
    from ldm_export.demo import demo_checkpoint
    from ldm_runtime.bundle import Bundle
    from tests.support.bundles import add_cuda

    folder = shared.once("shapes_cuda", lambda folder: add_cuda(demo_checkpoint(), shapes_bundle, folder))
    return Bundle.open(folder)


@pytest.fixture(scope="session")
def sd2_checkpoint(shared: SharedFolders) -> Path:
    """A small random checkpoint like Stable Diffusion 2, whose UNet attends less on the way up; read-only."""
    from tests.support.stable_diffusion import stable_diffusion_checkpoint

    return shared.once("sd2", lambda folder: stable_diffusion_checkpoint(folder, 2, up="UpBlock2D"))


@pytest.fixture(scope="session")
def sd2_bundle(sd2_checkpoint: Path, shared: SharedFolders) -> Bundle:
    """The bundle of ``sd2_checkpoint`` in fp32 and fp16; read-only."""
    from ldm_export.bundle.build import build
    from ldm_export.families import open_checkpoint
    from ldm_runtime.bundle import Bundle

    return Bundle.open(shared.once("sd2_bundle", lambda folder: build(open_checkpoint(sd2_checkpoint), folder, "fp16")))


@pytest.fixture(scope="session")
def xl_checkpoint(shared: SharedFolders) -> Path:
    """A small random checkpoint like Stable Diffusion XL; read-only."""
    from tests.support.stable_diffusion_xl import stable_diffusion_xl_checkpoint

    return shared.once("sdxl", stable_diffusion_xl_checkpoint)


@pytest.fixture(scope="session")
def xl_bundle(xl_checkpoint: Path, shared: SharedFolders) -> Bundle:
    """The bundle of ``xl_checkpoint`` in fp32; read-only."""
    from ldm_export.bundle.build import build
    from ldm_export.families import open_checkpoint
    from ldm_runtime.bundle import Bundle

    return Bundle.open(shared.once("sdxl_bundle", lambda folder: build(open_checkpoint(xl_checkpoint), folder)))


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of ``tiny_bundle`` in the test's own folder, to be changed at will."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run a command in the test's folder: exit code 1, one line that contains ``message``, and the folder unchanged."""
    from ldm_export.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, message: str) -> None:
        before = contents(tmp_path)
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 1
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("ldm-export: error: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert message in err
        assert contents(tmp_path) == before

    return run
