"""KServe's own types, read from its Python SDK's models without importing them (they would need all of the SDK)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

MODELS = Path(__file__).parents[2] / ".venv-kserve/kserve/models"


@cache
def fields(name: str) -> dict[str, str] | None:
    """JSON field → type of a class of the SDK; None where the SDK has no such class."""
    files = {file.stem.replace("_", ""): file for file in MODELS.glob("*.py")}
    file = files.get(name.lower())
    if file is None:
        return None
    result = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            result[node.targets[0].id] = node.value
    kinds, names = ast.literal_eval(result["openapi_types"]), ast.literal_eval(result["attribute_map"])
    return {names[field]: kind for field, kind in kinds.items()}


def faults(value: Any, kind: str, path: str) -> Iterator[str]:
    """Fields that a type does not have, and values of another kind; Kubernetes' own types are not looked into."""
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            yield f"{path}: is no list"
            return
        for index, item in enumerate(value):
            yield from faults(item, inner[1], f"{path}[{index}]")
    elif kind.startswith(("V1alpha1", "V1beta1")) and (known := fields(kind)) is not None:
        for name, item in value.items():
            if name not in known:
                yield f"{path}.{name}: no such field of {kind}"
            else:
                yield from faults(item, known[name], f"{path}.{name}")
    elif kind in ("str", "int", "bool") and type(value).__name__ != kind:
        yield f"{path}: {value!r} is no {kind}"
