"""The manifest's description of a TensorRT engine, from which an unsuitable engine is rejected before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm_runtime.errors import ManifestError
from ldm_runtime.json_fields import require_object, require_str

__all__ = ["EngineFacts", "Profile", "Shape", "engine_from_json"]

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""Input name -> (min, opt, max) shapes."""
MAX_PROFILES, MAX_RANK = 64, 8


@dataclass(frozen=True)
class EngineFacts:
    """One engine of a component.

    Attributes:
        file: Path in the bundle.
        package: The package that built it: "tensorrt-rtx" or "tensorrt".
        version: Version of that package. Only the same version loads the engine, unless it is version-compatible.
        compute_capabilities: Compute capabilities of the GPUs it runs on, e.g. ("8.6", "8.9"). An engine that
            "tensorrt" built runs only on the kind of GPU on which it was built.
        precision: Precision of the graph from which it was built.
        graph: SHA-256 of that graph's file.
        profiles: Input shapes that it takes. The first profile that fits is used, so narrower profiles come first.
        proof: How the precision of its matrix products was determined, and the result.
        structure: SHA-256 of the graph without the values of its weights, if the engine can be refitted; otherwise "".
        version_compatible: Later versions of the same major number load the plan too, and so does TensorRT's lean
            runtime.
    """

    file: str
    package: str
    version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    graph: str
    profiles: tuple[Profile, ...]
    proof: Mapping[str, Any] = field(default_factory=dict)
    structure: str = ""
    version_compatible: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the JSON-able description."""
        shapes = [{name: [list(s) for s in bounds] for name, bounds in one.items()} for one in self.profiles]
        return {
            "file": self.file,
            "package": self.package,
            "version": self.version,
            "compute_capabilities": list(self.compute_capabilities),
            "precision": self.precision,
            "graph": self.graph,
            "profiles": shapes,
            "proof": dict(self.proof),
            "structure": self.structure,
            "version_compatible": self.version_compatible,
        }

    def fitting(self, shapes: Mapping[str, Shape]) -> int | None:
        """Return the index of the first profile that takes inputs of these shapes; None if no profile does."""
        for index, one in enumerate(self.profiles):
            if set(one) == set(shapes) and all(
                _within(shapes[name], low, high) for name, (low, _, high) in one.items()
            ):
                return index
        return None


def engine_from_json(where: str, value: Any) -> EngineFacts:
    """Read the result of ``to_json``. Every field is checked, except that the path stays inside the bundle.

    Raises:
        ManifestError: Names the field, its value and what is expected.
    """
    entry = require_object(where, value)
    capabilities = _list(f"{where}.compute_capabilities", entry.get("compute_capabilities"))
    profiles = _list(f"{where}.profiles", entry.get("profiles"))
    if not 1 <= len(profiles) <= MAX_PROFILES:
        raise ManifestError(f"{where}.profiles: got {len(profiles)}, expected 1..{MAX_PROFILES}")
    return EngineFacts(
        **{
            name: require_str(f"{where}.{name}", entry.get(name))
            for name in ("file", "package", "version", "precision", "graph")
        },
        compute_capabilities=tuple(require_str(f"{where}.compute_capabilities", item) for item in capabilities),
        profiles=tuple(_profile(f"{where}.profiles", item) for item in profiles),
        proof=require_object(f"{where}.proof", entry.get("proof")),
        structure=require_str(f"{where}.structure", entry.get("structure", "")),
        version_compatible=_flag(f"{where}.version_compatible", entry.get("version_compatible", False)),
    )


def _profile(where: str, value: Any) -> Profile:
    shapes_by_input: dict[str, tuple[Shape, Shape, Shape]] = {}
    for name, bounds in require_object(where, value).items():
        shapes = [_shape(f"{where}.{name}", shape) for shape in _list(f"{where}.{name}", bounds)]
        if len(shapes) != 3 or not _within(shapes[1], shapes[0], shapes[2]):
            raise ManifestError(f"{where}.{name}: got {bounds!r:.80}, expected min, opt and max shapes in this order")
        shapes_by_input[name] = (shapes[0], shapes[1], shapes[2])
    return shapes_by_input


def _shape(where: str, value: Any) -> Shape:
    sizes = _list(where, value)
    if len(sizes) > MAX_RANK or any(type(size) is not int or not 0 < size < 2**31 for size in sizes):
        raise ManifestError(f"{where}: got {value!r:.80}, expected a shape of at most {MAX_RANK} positive sizes")
    return tuple(sizes)


def _within(shape: Shape, low: Shape, high: Shape) -> bool:
    same = len(shape) == len(low) == len(high)
    return same and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ManifestError(f"{where}: got {value!r:.60}, expected true or false; rebuild the bundle")
    return value


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ManifestError(f"{where}: got {value!r:.60}, expected a list; rebuild the bundle")
    return value
