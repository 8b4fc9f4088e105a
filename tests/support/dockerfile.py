"""The repository's Dockerfile: its stages, and running a stage's commands in a folder that stands for the image."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path

import pip
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker/Dockerfile"
FOLDERS = ("/source", "/wheels", "/opt/ldm", "/requirements")
"""Paths inside the images that commands name; they become paths below the folder that stands for the image."""


@dataclass(frozen=True)
class Stage:
    """One ``FROM … AS name`` and what follows: (instruction, value) pairs."""

    name: str
    image: str
    steps: tuple[tuple[str, str], ...]

    def values(self, instruction: str) -> list[str]:
        """Of all such instructions, in order."""
        return [value for kind, value in self.steps if kind == instruction]

    def command(self, instruction: str) -> list[str]:
        """The one CMD, ENTRYPOINT or HEALTHCHECK in exec form."""
        (value,) = self.values(instruction)
        return [str(word) for word in json.loads(value[value.index("[") :])]

    @property
    def arguments(self) -> dict[str, str]:
        """ARG names with their defaults, "" for none."""
        return {name: default for name, _, default in (value.partition("=") for value in self.values("ARG"))}


def stages() -> dict[str, Stage]:
    """All stages, their images with the global ARGs filled in."""
    parser = DockerfileParser(fileobj=None, path=str(FILE))
    steps = [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]
    first = next(index for index, (kind, _) in enumerate(steps) if kind == "FROM")
    images = dict(value.split("=", 1) for kind, value in steps[:first] if kind == "ARG")
    result: dict[str, Stage] = {}
    for kind, value in steps[first:]:
        if kind == "FROM":
            image, name = re.fullmatch(r"(\S+) AS (\S+)", value).groups()
            image = re.sub(r"\$\{(\w+)\}", lambda match: images[match[1]], image)
            result[name] = Stage(name, image, ())
        else:
            result[name] = Stage(name, result[name].image, (*result[name].steps, (kind, value)))
    return result


class Image:
    """A folder and a fresh virtual environment that stand for an image's file system and its Python."""

    def __init__(self, folder: Path, wheels: Path | None = None):
        self.folder, self.bin = folder, folder / "venv/bin"
        venv.create(folder / "venv", symlinks=True)
        (packages,) = (folder / "venv").glob("lib/python3*/site-packages")
        (packages / "pip").symlink_to(Path(pip.__file__).parent)  # the image's own pip, which takes long to install
        self._paths = {path: folder / path.lstrip("/") for path in FOLDERS}
        self._paths["/requirements"] = ROOT / "requirements"
        if wheels is not None:
            self._paths["/wheels"] = wheels

    def path(self, inside: str) -> Path:
        """Where a path of the image is."""
        return self._paths[inside]

    def build(self, stage: Stage, **arguments: str) -> None:
        """COPY what is copied from the context, and RUN what is run, with the ARGs' defaults or ``arguments``."""
        place = self.folder
        for kind, value in stage.steps:
            if kind == "WORKDIR" and value in self._paths:
                place = self.path(value)
                place.mkdir(parents=True, exist_ok=True)
            elif kind == "COPY" and "--from" not in value:
                copy(value.split(), place)
            elif kind == "RUN":
                self._run(value, place, {**stage.arguments, **arguments})

    def _run(self, command: str, place: Path, arguments: dict[str, str]) -> None:
        command = re.sub(r"--mount=\S+\s+", "", command)
        pattern = "|".join(re.escape(path) for path in sorted(self._paths, key=len, reverse=True))
        command = re.sub(rf"(?<![\w/])(?:{pattern})\b", lambda match: shlex.quote(str(self._paths[match[0]])), command)
        nonempty = {name: value for name, value in arguments.items() if value}
        environment = {**os.environ, **nonempty, "PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.folder)}
        environment["PIP_NO_COMPILE"] = "1"  # most of what is installed is never imported here
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            ["/bin/sh", "-c", command], cwd=place, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def copy(words: list[str], place: Path) -> None:
    """COPY SOURCE… TARGET from the context: a folder's content into the target, files into the target folder."""
    *sources, target = words
    for source in sources:
        if (ROOT / source).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, place / target, dirs_exist_ok=True, ignore=ignore)
        else:
            shutil.copy(ROOT / source, place / target)
