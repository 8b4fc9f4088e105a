"""A real browser without a window: Chromium opens a page, takes its picture, and tells what became of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZE = (1200, 1600)


def screenshot(page: Path, picture: Path) -> Image.Image:
    """The upper part of a page as it is shown, 1200 × 1600 pixels."""
    _browse(page, f"--window-size={SIZE[0]},{SIZE[1]}", "--hide-scrollbars", f"--screenshot={picture}")
    return Image.open(picture).convert("RGB")


def shown(page: Path) -> str:
    """The document as HTML after the browser has read it and run whatever it may."""
    return _browse(page, "--dump-dom")


def _browse(page: Path, *options: str) -> str:
    found = [path for name in NAMES if (path := shutil.which(name))]
    if not found:
        pytest.fail("no Chromium to look at the page with; `apt-get install chromium`")
    command = [found[0], "--headless", "--no-sandbox", "--disable-gpu", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
