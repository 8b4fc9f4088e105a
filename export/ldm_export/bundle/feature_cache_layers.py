"""Number of layers of a build's shallow UNet: given, or measured on the bundle that is written again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BuildError

__all__ = ["FEATURE_CACHE", "feature_cache_layers"]

FEATURE_CACHE = "feature_cache"
"""Key of the figures in the manifest's ``measured``."""


def feature_cache_layers(asked: int | str, previous: Bundle | None, target: Path) -> tuple[int, dict[str, Any]]:
    """Return the number of layers, and the figures that the new manifest keeps.

    Args:
        asked: The number, or "auto".
        previous: The bundle that is replaced, if there is one.
        target: Its folder, for the message.

    Raises:
        BuildError: "auto", and nothing was measured.
    """
    if isinstance(asked, int):
        return asked, {}
    facts = None if previous is None else previous.manifest.measured.get(FEATURE_CACHE)
    layers = facts.get("layers") if isinstance(facts, dict) else None
    if isinstance(layers, bool) or not isinstance(layers, int):
        raise BuildError(
            f"feature cache: got auto, but {target} has no measured layers; build it with a number, measure with "
            f"`ldm-export bench {target} --quality --split-levels --save`, and build it again"
        )
    return layers, {FEATURE_CACHE: facts}
