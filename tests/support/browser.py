"""A real browser without a window: Chromium opens a page, takes its image, and tells what became of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZE = (1200, 1600)


def screenshot(page: Path, image: Path) -> Image.Image:
    """The upper part of a page as it is shown, 1200 × 1600 pixels."""
    _browse(page, f"--window-size={SIZE[0]},{SIZE[1]}", "--hide-scrollbars", f"--screenshot={image}")
    return Image.open(image).convert("RGB")


def shown(page: Path) -> str:
    """The document as HTML after the browser has read it and run whatever it may."""
    return _browse(page, "--dump-dom")


def _browse(page: Path, *options: str) -> str:
    result = [path for name in NAMES if (path := shutil.which(name))]
    if not result:
        pytest.fail("no Chromium to look at the page with; `apt-get install chromium`")
    command = [result[0], "--headless", "--no-sandbox", "--disable-gpu", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
