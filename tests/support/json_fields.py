"""Changes one field of a JSON document."""

from __future__ import annotations

import copy
from typing import Any

__all__ = ["with_field"]


def with_field(document: Any, path: str, value: Any) -> Any:
    """Return a copy of a document in which the field at ``key key 0`` has a value; ``...`` removes the field."""
    changed = copy.deepcopy(document)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(" ")]
    parent = changed
    for part in parents:
        parent = parent[part]
    if value is ...:
        del parent[last]
    else:
        parent[last] = value
    return changed
