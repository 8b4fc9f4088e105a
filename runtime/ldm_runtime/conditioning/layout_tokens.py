"""Tokens of an object layout, as taming-transformers' ``ObjectsBoundingBoxConditionalBuilder`` computes them.

An object has three tokens: its category and the two corners of its box. A corner is a cell of a square grid. The last
token of the vocabulary pads missing objects, and two tokens for the corners of the whole image come last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import as_float, as_integer, shown

__all__ = ["ATTRIBUTES", "LayoutVocabulary"]

ATTRIBUTES = {"group": 1, "occluded": 2, "depiction": 4, "inside": 8}
"""Attributes of an object -> their bit in the modifier of its category."""


@dataclass(frozen=True)
class LayoutVocabulary:
    """Vocabulary of layout tokens of a model.

    Attributes:
        tokens: Tokens of a layout: three for each object and two for the whole image.
        vocabulary: Number of different tokens.
        categories: Name of each category, by number; empty if only numbers are known.
    """

    tokens: int
    vocabulary: int
    categories: Sequence[str] = ()
    _numbers: Mapping[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_numbers", {name: number for number, name in enumerate(self.categories)})

    @property
    def objects(self) -> int:
        """Maximum number of objects in a layout."""
        return (self.tokens - 2) // 3

    def encode(self, layout: Sequence[Any]) -> list[int]:
        """Tokens of a layout.

        Args:
            layout: (category, box) or (category, box, attributes) of each object. The category is a name or a number.
                The box is (x, y, width, height) in shares of the image, (x, y) its upper left corner. The attributes
                are names in ``ATTRIBUTES``.

        Raises:
            SpecError: Too many objects, an unknown category or attribute, or a box outside of the image.
        """
        if len(layout) > self.objects:
            raise SpecError(f"layout: got {len(layout)} objects, expected at most {self.objects}; leave some out")
        found: list[int] = []
        for index, entry in enumerate(layout):
            where = f"layout: object {index}"
            if not isinstance(entry, list | tuple) or len(entry) not in (2, 3):
                raise SpecError(f"{where}: got {shown(entry)}, expected (category, (x, y, width, height))")
            attributes = entry[2] if len(entry) == 3 else ()
            found += [self._category(where, entry[0], attributes), *self._corners(where, entry[1])]
        empty = self.vocabulary - 1
        return [*found, *[empty] * (3 * (self.objects - len(layout))), self._cell(0, 0), self._cell(1, 1)]

    def _category(self, where: str, category: Any, attributes: Any) -> int:
        known = len(self.categories) or self.vocabulary - 1
        if isinstance(category, str):
            if not self.categories:
                raise SpecError(
                    f"{where}: got category {shown(category)}, but the bundle has no category names; give its number, "
                    "or build with --categories FILE"
                )
            number = self._numbers.get(category)
            if number is None:
                raise SpecError(f"{where}: got category {shown(category)}, expected one of the model's {known} names")
        else:
            number = as_integer(category)
            if number is None or not 0 <= number < known:
                raise SpecError(f"{where}: got category {shown(category)}, expected a name or 0 to {known - 1}")
        if not isinstance(attributes, list | tuple) or not all(name in ATTRIBUTES for name in attributes):
            raise SpecError(f"{where}: got {shown(attributes)}, expected some of {', '.join(ATTRIBUTES)}")
        if attributes and not self.categories:
            raise SpecError(f"{where}: got attributes, which need the categories' number; build with --categories FILE")
        token = number + len(self.categories) * sum(ATTRIBUTES[name] for name in set(attributes))
        if token >= self.vocabulary - 1:
            raise SpecError(f"{where}: category {number} with {shown(attributes)} has no token; leave attributes out")
        return token

    def _corners(self, where: str, box: Any) -> tuple[int, int]:
        values = [as_float(value) for value in box] if isinstance(box, list | tuple) else []
        numbers = [value for value in values if value is not None and math.isfinite(value)]
        if len(values) != 4 or len(numbers) != 4:
            raise SpecError(f"{where}: got box {shown(box)}, expected (x, y, width, height) in shares of the image")
        x, y, width, height = numbers
        ends = (x, y, x + width, y + height)
        if min(x, y, width, height) < 0 or max(ends) > 1 + 1e-6 or not (width and height):
            raise SpecError(
                f"{where}: got box {shown(tuple(numbers))}, expected x, y, x + width and y + height from 0 to 1, and "
                "an area; a box is (x, y, width, height) in shares of the image"
            )
        return self._cell(x, y), self._cell(min(1.0, ends[2]), min(1.0, ends[3]))

    def _cell(self, x: float, y: float) -> int:
        sections = math.isqrt(self.vocabulary)
        return round(y * (sections - 1)) * sections + round(x * (sections - 1))
