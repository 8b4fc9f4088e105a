"""The rows of one UNet call of a batch: which images, members and conditioning rows they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.guidance import StepBranches

__all__ = ["CallRows", "Span", "call_rows"]

Index = NDArray[np.intp]


@dataclass(frozen=True)
class Span:
    """Position of a member in the arrays of its batch.

    Attributes:
        row: First conditioning row; the unconditional rows of a guided member come first.
        rows: Number of conditioning rows.
        image: First image.
        images: Number of images.
    """

    row: int
    rows: int
    image: int
    images: int

    @property
    def row_slice(self) -> slice:
        """The member's conditioning rows."""
        return slice(self.row, self.row + self.rows)

    @property
    def image_slice(self) -> slice:
        """The member's images."""
        return slice(self.image, self.image + self.images)


@dataclass(frozen=True, eq=False)
class CallRows:
    """Layout of one UNet call. Rows beyond ``used`` are padding and repeat image 0.

    Attributes:
        used: Number of rows in use.
        conditioning: Selects the conditioning rows of the call; a slice, which copies nothing, if they are contiguous.
        image, member: Image and member of each row, intp [rows].
        conditional: For each image, its row with the conditional prediction, intp [images].
        guided: Images that are evaluated in both branches.
        unconditional: For each of ``guided``, its row with the unconditional prediction.
        reused: Images that reuse their guidance direction.
    """

    used: int
    conditioning: slice | Index
    image: Index
    member: Index
    conditional: Index
    guided: Index
    unconditional: Index
    reused: Index


def call_rows(
    spans: Sequence[Span], branches: Sequence[StepBranches], padded: Callable[[int], int], max_rows: int
) -> CallRows:
    """Lay out a UNet call: members side by side, each with its unconditional rows first, as a pipeline orders them.

    Args:
        spans: The members.
        branches: What each member's step evaluates; one that does not evaluate both has only its conditional rows.
        padded: Number of rows of a call in which so many are used.
        max_rows: Length of the conditioning arrays.
    """
    chosen, image, member = list[int](), list[int](), list[int]()
    conditional, guided, unconditional, reused = list[int](), list[int](), list[int](), list[int]()
    for number, (span, evaluated) in enumerate(zip(spans, branches, strict=True)):
        images = range(span.image, span.image + span.images)
        both = evaluated is StepBranches.BOTH and span.rows > span.images
        if both:
            unconditional += range(len(image), len(image) + span.images)
            guided += images
            image += images
        elif evaluated is StepBranches.REUSED:
            reused += images
        conditional += range(len(image), len(image) + span.images)
        image += images
        own = span.rows if both else span.images
        chosen += range(span.row + span.rows - own, span.row + span.rows)
        member += [number] * own
    used = len(chosen)
    padding = [0] * (padded(used) - used)
    contiguous = chosen[-1] - chosen[0] == used - 1 and chosen[0] + used + len(padding) <= max_rows
    return CallRows(
        used=used,
        conditioning=slice(chosen[0], chosen[0] + used + len(padding)) if contiguous else _index(chosen + padding),
        image=_index(image + padding),
        member=_index(member + padding),
        conditional=_index(conditional),
        guided=_index(guided),
        unconditional=_index(unconditional),
        reused=_index(reused),
    )


def _index(values: list[int]) -> Index:
    return np.array(values, np.intp)
