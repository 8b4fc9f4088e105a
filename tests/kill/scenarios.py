"""Commands to kill: how their folder starts, what they run, and what the folder may be whenever they are killed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ldm_calibration.settings import CalibrationSettings
from ldm_export.bundle.add_int8 import calibrate
from ldm_export.bundle.build import build
from ldm_export.cli import main
from ldm_export.families import open_checkpoint
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import BUILD_LOG, CALIBRATION_RECORD, MANIFEST
from tests.support.checkpoints import edit_json
from tests.support.configs_only import write_configs
from tests.support.small_bundle import write_small_bundle
from tests.support.small_models import bundle_of, unconditional_model
from tests.support.snapshot import contents

__all__ = ["SCENARIOS", "Scenario"]


@dataclass(frozen=True)
class Scenario:
    """A command that changes files in a folder.

    Attributes:
        prepare: Writes inputs into the first folder, and what the command finds into the second.
        run: Runs the command, with the same two folders.
        check: Asserts that a folder after a kill is sound: the folder, as it started, and as a finished command
            leaves it.
        check_finished: The same for a folder in which the command ran again after the kill.
    """

    prepare: Callable[[Path, Path], object]
    run: Callable[[Path, Path], object]
    check: Callable[[Path, Path, Path], None]
    check_finished: Callable[[Path, Path], None]


def _command(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def _visible(folder: Path) -> dict[str, object]:
    """Files and folders by path, without hidden ones and without the log of a build, which has times."""
    names = contents(folder)
    return {
        name: content
        for name, content in names.items()
        if not any(part.startswith(".") for part in Path(name).parts) and Path(name).name != BUILD_LOG
    }


def _check_finished(place: Path, after: Path) -> None:
    assert _visible(place) == _visible(after)
    assert [name for name in contents(place) if "/." in f"/{name}"] == []


def _check_bundle(place: Path, before: Path, after: Path) -> None:
    bundle = Bundle.open(place / "bundle")
    bundle.check()
    assert (place / "bundle" / MANIFEST).read_bytes() in [
        (folder / "bundle" / MANIFEST).read_bytes() for folder in (before, after)
    ]


def _prepare_images(inputs: Path, place: Path) -> None:
    write_small_bundle(inputs / "bundle")
    _generate(inputs, place, seed=1)


def _generate(inputs: Path, place: Path, seed: int = 2) -> None:
    options = ["--count", 3, "--each", "--seed", seed, "--steps", 1, "--backend", "onnxruntime", "--threads", 1]
    _command("generate", inputs / "bundle", *options, "--quiet", "-o", place / "out.png")


def _check_images(place: Path, before: Path, after: Path) -> None:
    files = _visible(place).items()
    assert files <= _visible(before).items() or files <= _visible(after).items()


def _prepare_report(inputs: Path, place: Path) -> None:
    write_small_bundle(place / "bundle").with_measured({"x": 1}, {"report/a.html": b"old", "report/b.html": b"same"})


def _report(inputs: Path, place: Path) -> None:
    Bundle.open(place / "bundle").with_measured({"x": 2}, {"report/a.html": b"new", "report/c.html": b"new"})


def _check_report(place: Path, before: Path, after: Path) -> None:
    bundle = Bundle.open(place / "bundle")
    bundle.check()
    assert bundle.manifest.measured["x"] in (1, 2)


def _prepare_calibration(inputs: Path, place: Path) -> None:
    settings = CalibrationSettings(({},), ({},), steps=2, samples=2, trial_steps=2, sensitivity="results", min_psnr=5.0)
    for bundle in (place / "bundle", inputs / "calibrated"):
        bundle_of(unconditional_model(inputs / f"model of {bundle.name}"), bundle, ("unet", "decoder"))
    calibrate(inputs / "calibrated", settings)
    shutil.copyfile(inputs / "calibrated" / CALIBRATION_RECORD, inputs / "record.json")


def _calibrate(inputs: Path, place: Path) -> None:
    calibrate(place / "bundle", inputs / "record.json")


def _prepare_build(inputs: Path, place: Path) -> None:
    checkpoint = write_configs(inputs / "checkpoint")
    build(open_checkpoint(checkpoint, random_weights=True), place / "bundle")
    edit_json(checkpoint / "scheduler" / "scheduler_config.json", beta_end=0.013)


def _build(inputs: Path, place: Path) -> None:
    _command("build", inputs / "checkpoint", "--random-weights", "--quiet", "-o", place / "bundle")


def _prepare_versions(versions: int) -> Callable[[Path, Path], None]:
    def prepare(inputs: Path, place: Path) -> None:
        write_small_bundle(inputs / "bundle")
        for _ in range(versions):
            _serve(inputs, place)

    return prepare


def _serve(inputs: Path, place: Path) -> None:
    _command("triton", inputs / "bundle", "--backend", "onnxruntime", "--quiet", "-o", place / "repository")


def _versions(repository: Path) -> dict[str, dict[int, dict[str, object]]]:
    """Model -> version -> its files."""
    return {
        model.name: {int(one.name): contents(one) for one in model.iterdir() if one.name.isdecimal()}
        for model in (repository.iterdir() if repository.exists() else ())
    }


def _check_repository(place: Path, before: Path, after: Path) -> None:
    found, complete = _versions(place / "repository"), _versions(after / "repository")
    for name, versions in found.items():
        whole = next(iter(complete[name].values()))  # every version is of the same bundle
        assert versions and all(files == whole for files in versions.values())
        config = (place / "repository" / name / "config.pbtxt").read_bytes()
        assert config == (after / "repository" / name / "config.pbtxt").read_bytes()
    assert not (before / "repository").exists() or found.keys() == complete.keys()


def _check_finished_repository(place: Path, after: Path) -> None:
    _check_repository(place, after, after)
    newest = {max(versions) for versions in _versions(place / "repository").values()}
    assert len(newest) == 1 and all(len(one) <= 2 for one in _versions(place / "repository").values())
    assert [name for name in contents(place) if "/." in f"/{name}"] == []


SCENARIOS = {
    "generate": Scenario(_prepare_images, _generate, _check_images, _check_finished),
    "report": Scenario(_prepare_report, _report, _check_report, _check_finished),
    "calibrate": Scenario(_prepare_calibration, _calibrate, _check_bundle, _check_finished),
    "build": Scenario(_prepare_build, _build, _check_bundle, _check_finished),
    "triton": Scenario(_prepare_versions(0), _serve, _check_repository, _check_finished_repository),
    "triton, second version": Scenario(_prepare_versions(1), _serve, _check_repository, _check_finished_repository),
    "triton, third version": Scenario(_prepare_versions(2), _serve, _check_repository, _check_finished_repository),
}
