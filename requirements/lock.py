"""Writes the lock files of all environments, which pin every package by version and SHA-256: ``make lock``.

Versions are those of constraints.txt. torch has two files of its own: PyTorch's CPU build, and PyPI's build with the
CUDA libraries that it needs on Linux.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
HEADER = "# Written by `make lock`.\n"
CPU_TORCH = "torch==2.13.0+cpu --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b\n"
"""PyTorch's CPU build for Python 3.11 on x86-64. It is not on PyPI; PyTorch's own index and mirrors have it."""
CUDA = re.compile(r"torch$|nvidia-|cuda-|triton$")
"""Names of torch and of packages that PyPI's torch needs on Linux but PyTorch's CPU build does not."""
TENSORRT = "tensorrt==11.2.1.2\n"
"""Version of the Triton image in docker/Dockerfile, whose plans it runs."""
NUMPY_1 = "1.26.4"
"""Version of NumPy for Triton's Python backend, which needs NumPy 1."""
ENGINES = {
    "onnxruntime": "",
    "openvino": "",
    "gpu": "",
    "tensorrt-rtx": "",
    "tensorrt": TENSORRT,
    "tensorrt-lean": "",
}
"""Extra of an engine -> requirements that are locked with it."""
DEV = ("export", "openvino", "tensorrt-rtx", "tensorrt-lean", "polygraphy", "client", "serve")


def main() -> None:
    """Write all lock files."""
    write("build", requirements="hatchling\neditables\n")
    for engine, more in ENGINES.items():
        write(engine, extras=(engine,), requirements=more)
        write(f"{engine}-numpy1", extras=(engine,), requirements=more, numpy=NUMPY_1)
    write("serve", extras=("onnxruntime", "serve"))
    write("serve-numpy1", extras=("onnxruntime", "serve"), numpy=NUMPY_1)
    write("triton", extras=("onnxruntime",), requirements="nvidia-pytriton\n", numpy=NUMPY_1)
    write("kserve", requirements="kserve==0.21.0\n", alone=True)
    write("trained-unet", requirements="adaptive-terrain-diffusion==0.4.2\n", alone=True)  # asks for onnxruntime-gpu
    write("clip-vocabulary", requirements="open-clip-torch==3.3.0\n", alone=True)  # only its vocabulary is read
    cuda = write("export", extras=("export", "serve"))
    write("docs", extras=("serve",), requirements=f"--group {ROOT / 'pyproject.toml'}:docs")
    write("release", requirements=f"--group {ROOT / 'pyproject.toml'}:release")
    write("dev", extras=DEV, requirements=f"--group {ROOT / 'pyproject.toml'}:dev")
    (FOLDER / "torch-cpu.txt").write_text(HEADER + CPU_TORCH)
    (FOLDER / "torch-cuda.txt").write_text(HEADER + "".join(cuda))


def write(
    name: str, *, extras: tuple[str, ...] = (), requirements: str = "", numpy: str = "", alone: bool = False
) -> list[str]:
    """Write the lock file of an environment and return what it leaves out: torch and its CUDA libraries."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--python-version", "3.11", "-q"]
    command += (
        ["--python-platform", "x86_64-manylinux_2_35"] if numpy else ["--universal"]
    )  # NumPy 1 lacks wheels of later Pythons
    constraints = (ROOT / "constraints.txt").read_text()
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--constraint", "constraints.in"]
    command += [word for extra in extras for word in ("--extra", extra)] + (["--no-deps"] if alone else [])
    sources = [str(ROOT / "pyproject.toml")] if extras else []
    if requirements.startswith("--"):
        command += requirements.split()
    elif requirements:
        sources.append("more.in")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "constraints.in").write_text(
            re.sub(r"^numpy==.*", f"numpy=={numpy}", constraints, flags=re.M) if numpy else constraints
        )
        Path(folder, "more.in").write_text(requirements)
        done = subprocess.run([*command, *sources], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")
    text = done.stdout
    entries = re.findall(r"^\S.*\n(?: .*\n)*", text, re.M)
    names = [entry.partition("==")[0] for entry in entries]
    wanted = set() if "torch" not in names else {package for package in names if CUDA.match(package)}
    if "cuda-python" in names:  # TensorRT for RTX needs it, and its parts
        wanted -= {package for package in names if package.startswith("cuda-") and package != "cuda-toolkit"}
    cuda = [entry for entry, package in zip(entries, names, strict=True) if package in wanted]
    kept = [entry for entry in entries if entry not in cuda]
    (FOLDER / f"{name}.txt").write_text(HEADER + "".join(kept))
    return cuda


if __name__ == "__main__":
    main()
