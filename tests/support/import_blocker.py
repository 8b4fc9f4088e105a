"""A pytest plugin, used as ``pytest -p tests.support.import_blocker``, that hides packages as if not installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

HIDDEN = frozenset(
    {
        "torch",
        "diffusers",
        "transformers",
        "safetensors",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "onnxruntime",
        "openvino",
        "tensorrt",
        "tensorrt_rtx",
        "cuda",
        "tritonclient",
        "ldm_export",
        "ldm_calibration",
    }
)
"""Packages that a server with the runtime alone does not have, and the two packages of the exporter."""


class ImportBlocker(MetaPathFinder):
    """Refuses to import the packages in ``HIDDEN``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raise ModuleNotFoundError for a hidden package; leave every other to the usual finders."""
        if fullname.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {fullname!r} (hidden by the test)", name=fullname)
        return None


assert not HIDDEN & set(sys.modules), "hidden packages are loaded already"
sys.meta_path.insert(0, ImportBlocker())
