"""Builds the source archive and the wheel of a release into dist/: ``make release``.

1. Check that pyproject.toml and CITATION.cff have the same version, and that CHANGELOG.md has a section for it or for
   "Unreleased".
2. Build source archive and wheel twice, with the time of the last commit. Both builds must give the same bytes.
3. Check the description with twine.
4. Write the digests to ``dist/SHA256SUMS``, and the section of the changelog to ``dist/NOTES.md``.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"


def main() -> None:
    """Build and check the packages."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    notes = changes(version)
    digests = build(DIST)
    with tempfile.TemporaryDirectory() as folder:
        again = build(Path(folder))
    if digests != again:
        sys.exit(f"the two builds differ, expected the same bytes:\n{digests}\n{again}")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, sorted(DIST.iterdir()))], check=True)
    (DIST / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))
    (DIST / "NOTES.md").write_text(notes)
    print(f"ldm-export {version}: both builds have the same bytes\n{(DIST / 'SHA256SUMS').read_text()}", end="")


def changes(version: str) -> str:
    """Return the section of the changelog for a version, or the unreleased one if it has none yet."""
    if f"\nversion: {version}\n" not in (ROOT / "CITATION.cff").read_text():
        sys.exit(f"CITATION.cff: expected version {version}, as in pyproject.toml")
    sections = re.split(r"^## \[(.*?)\].*\n", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    found = dict(zip(sections[::2], sections[1::2], strict=True))
    text = found.get(version, found.get("Unreleased", "")).strip()
    if not text:
        sys.exit(f"CHANGELOG.md: expected a section [{version}] with the changes")
    return f"{text}\n"


def build(folder: Path) -> dict[str, str]:
    """Build source archive and wheel into an empty folder and return name -> SHA-256."""
    shutil.rmtree(folder, ignore_errors=True)
    command = ["git", "log", "-1", "--format=%ct"]
    time = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": time}, stdout=subprocess.DEVNULL)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


if __name__ == "__main__":
    main()
