"""Files for contributors: valid against their schemas, and in agreement with the Makefile and pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.support.documentation import ROOT

GITHUB = ROOT / ".github"
FILES = {
    "vendor.github-workflows": sorted((GITHUB / "workflows").glob("*.yml")),
    "vendor.github-issue-forms": [GITHUB / "ISSUE_TEMPLATE" / name for name in ("bug.yml", "model.yml")],
    "vendor.github-issue-config": [GITHUB / "ISSUE_TEMPLATE/config.yml"],
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
}
MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("schema", FILES)
def test_files_fit_their_schema(schema: str) -> None:
    command = [Path(sys.executable).parent / "check-jsonschema", "--builtin-schema", schema, *FILES[schema]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_runs_targets_of_the_makefile() -> None:
    jobs = yaml.safe_load((GITHUB / "workflows/tests.yml").read_text())["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = {target for run in runs for target in re.findall(r"^make (\w+)", run, re.MULTILINE)}
    assert targets == {"lint", "test", "release", "docs"}
    assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets)
    folders = [folder for run in runs for folder in re.findall(r"tests/\w+", run)]
    assert len(folders) > 2 and all((ROOT / folder).is_dir() for folder in folders)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for version in jobs["versions"]["strategy"]["matrix"]["python"]:
        assert f"Programming Language :: Python :: {version}" in project["classifiers"]


def test_the_hooks_are_the_linters_of_the_makefile() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    programs = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert lint and programs == set(re.findall(r"\$\(BIN\)/([\w-]+)", lint[1]))


def test_the_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
