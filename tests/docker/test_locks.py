"""The lock files: every package by version and hash, the versions of constraints.txt, and all that an extra needs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.support.dockerfile import ROOT

FOLDER = ROOT / "requirements"
LOCKS = sorted(FOLDER.glob("*.txt"))
TORCH = ("export", "dev")
"""Locks to which torch-cpu.txt or torch-cuda.txt belongs."""


def entries(lock: Path) -> dict[str, tuple[str, list[str]]]:
    """Package -> its version and hashes."""
    text = re.sub(r"\\\n\s*", " ", lock.read_text())
    found = {}
    for line in text.splitlines()[1:]:
        name, version = re.match(r"([\w.-]+)==(\S+)", line).groups()
        found[normal(name)] = (version, re.findall(r"--hash=sha256:([0-9a-f]{64})", line))
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_package_has_a_hash_and_the_version_of_the_constraints(lock: Path) -> None:
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    expected = {normal(name): version for name, version in constraints.items()}
    if lock.stem.endswith("-numpy1") or lock.stem == "triton":
        expected["numpy"] = "1.26.4"
    found = entries(lock)
    assert found
    for name, (version, hashes) in found.items():
        assert hashes, f"{name} has no hash"
        assert version.partition("+")[0] == expected.get(name, version.partition("+")[0]), name


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_has_what_its_extra_needs(lock: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    extra = lock.stem.removesuffix("-numpy1")
    if extra in extras:
        torch = {"torch"} if extra in TORCH else set()
        assert names([*project["dependencies"], *extras[extra]]) - {"ldm-export"} - torch <= entries(lock).keys()


def test_the_locks_are_those_that_images_and_environments_install() -> None:
    page = (ROOT / "docs/guides/triton.md").read_text()
    choices = re.findall(r"`([\w-]+)`", re.search(r"`--build-arg EXTRA=…` selects the engine:\n(.*)", page)[1])
    assert len(choices) == 6
    for extra in choices:
        assert {FOLDER / f"{extra}.txt", FOLDER / f"{extra}-numpy1.txt"} <= set(LOCKS)
    installed = set(re.findall(r"\$\(INSTALL\) \S+ ([\w-]+)", (ROOT / "Makefile").read_text()))
    assert {f"{name}.txt" for name in installed} <= {lock.name for lock in LOCKS}
