"""Install commands in messages: each installs from where this copy came from, as pip records it (PEP 610)."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm_runtime import installation
from ldm_runtime.installation import install_command

METADATA = """Metadata-Version: 2.4
Name: ldm-export
Version: 9.9
Requires-Dist: numpy<3,>=1.26
Requires-Dist: cuda-python>=12.6; extra == 'gpu'
Requires-Dist: onnxruntime-gpu[cuda,cudnn]>=1.31; extra == 'gpu'
Requires-Dist: onnxruntime>=1.20; extra == 'onnxruntime'
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the current one, with files to install from."""
    for folder in ("checkout", "a $1 checkout", "site"):
        (tmp_path / folder).mkdir()
    (tmp_path / "x.whl").touch()
    monkeypatch.chdir(tmp_path / "site")
    return tmp_path


def installed_from(here: Path, monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None) -> None:
    """Put metadata of an installed ldm-export, as pip writes them, in front of the real ones."""
    folder = here / "site" / "ldm_export-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    if origin is not None:
        (folder / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(here / "site")


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (
            {"url": "file://{}/checkout", "dir_info": {"editable": True}},
            'pip install -e "{}/checkout[gpu]"',
        ),
        ({"url": "file://{}/checkout", "dir_info": {}}, 'pip install "{}/checkout[gpu]"'),
        ({"url": "file://{}/a%20$1%20checkout", "dir_info": {}}, r'pip install "{}/a \$1 checkout[gpu]"'),
        ({"url": "file://{}/site", "dir_info": {"editable": True}}, 'pip install -e ".[gpu]"'),
        ({"url": "file://{}/x.whl", "archive_info": {}}, 'pip install "{}/x.whl[gpu]"'),
        (
            {"url": "file://{}/deleted.whl", "archive_info": {}},
            'pip install "cuda-python>=12.6" "onnxruntime-gpu[cuda,cudnn]>=1.31"',
        ),
        ({"url": "https://host/x.whl", "archive_info": {}}, 'pip install "ldm-export[gpu] @ https://host/x.whl"'),
        (
            {"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": "1a2b"}},
            'pip install "ldm-export[gpu] @ git+https://host/x.git@1a2b"',
        ),
        (None, 'pip install "ldm-export[gpu]"'),
    ],
)
def test_an_extra_is_installed_from_where_the_package_came_from(
    here: Path, monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None, command: str
) -> None:
    if origin is not None:
        origin = {**origin, "url": origin["url"].format(here)}
    installed_from(here, monkeypatch, origin)
    assert install_command("gpu") == command.format(here)


def test_the_command_for_this_environment_can_be_run() -> None:
    command = shlex.split(install_command("openvino"))
    assert command[:2] == ["pip", "install"]
    options = ["--dry-run", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    done = subprocess.run([sys.executable, "-m", *command, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Would install ldm-export-" in done.stdout


def test_source_folders_without_metadata_name_their_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = Path(installation.__file__).parents[2]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [])  # no metadata is found
    assert install_command("gpu") == f'pip install -e "{checkout}[gpu]"'
