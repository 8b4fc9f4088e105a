"""Creates virtual environments for the runtimes that ``peers.py`` measures, and runs scripts in them.

One environment has torch and diffusers, the other optimum with ONNX Runtime and OpenVINO.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent / "peer_workers"
ROOT = Path(__file__).parent.parent
PYTHONPATH = os.pathsep.join(str(ROOT / part) for part in ("export", "runtime", "calibration", "demo"))
PACKAGES = {
    "torch": ("torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0"),
    "optimum": (
        *("torch==2.13.0", "optimum-intel==1.27.0", "optimum-onnx==0.1.0", "diffusers==0.39.0"),
        *("transformers==4.57.6", "openvino==2026.4.1", "nncf==3.4.0", "onnx==1.23.2", "onnxruntime==1.32.0"),
    ),
}


def environment_python(work: Path, name: str) -> Path:
    """Return the Python of an environment below ``work``; create the environment if it does not exist."""
    folder = work / f"venv-{name}"
    python, stamp = folder / "bin/python", folder / ".made"
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[name]], check=True)
        stamp.touch()
    return python


def run(work: Path, name: str, arguments: list[str]) -> None:
    """Run a script of ``peer_workers`` in an environment; its output is shown only if it fails."""
    script, *rest = arguments
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    command = [str(environment_python(work, name)), str(HERE / script), *rest]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
