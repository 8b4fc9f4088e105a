"""The rows of the UNet calls of a step: which images, members and conditioning rows they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.guidance import StepBranches

__all__ = ["Call", "CallRows", "Span", "call_rows"]

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
class Call:
    """One UNet call. Rows beyond ``used`` are padding and repeat image 0.

    Attributes:
        shallow: True for a call that reuses deep features.
        used: Number of rows in use.
        conditioning: Selects the conditioning rows of the call; a slice, which copies nothing, if they are contiguous.
        image, member: Image and member of each row, intp [rows].
    """

    shallow: bool
    used: int
    conditioning: slice | Index
    image: Index
    member: Index

    @property
    def rows(self) -> slice | Index:
        """Selects the conditioning rows without padding."""
        if isinstance(self.conditioning, slice):
            return slice(self.conditioning.start, self.conditioning.start + self.used)
        return self.conditioning[: self.used]


@dataclass(frozen=True, eq=False)
class CallRows:
    """Layout of the UNet calls of one step: a whole call, a shallow call, or both, with rows numbered across both.

    Attributes:
        calls: The calls.
        conditional: For each image, its row with the conditional prediction, intp [images].
        guided: Images that are evaluated in both branches, ascending.
        unconditional: For each of ``guided``, its row with the unconditional prediction.
        reused: Images that reuse their guidance direction.
    """

    calls: tuple[Call, ...]
    conditional: Index
    guided: Index
    unconditional: Index
    reused: Index


def call_rows(
    spans: Sequence[Span],
    evaluated: Sequence[tuple[StepBranches, bool]],
    padded: Callable[[int], int],
    max_rows: int,
) -> CallRows:
    """Lay out a step: members side by side, each with its unconditional rows first, as a pipeline orders them.

    Args:
        spans: The members.
        evaluated: For each member, the branches that its step evaluates and whether it reuses deep features. A member
            that does not evaluate both branches has only its conditional rows.
        padded: Maps the number of used rows to the number of rows of the call.
        max_rows: Length of the conditioning arrays.
    """
    calls = list[Call]()
    conditional = np.zeros(spans[-1].image + spans[-1].images, np.intp)
    guided, unconditional, reused, before = list[int](), list[int](), list[int](), 0
    for phase in (False, True):
        chosen, image, member = list[int](), list[int](), list[int]()
        for number, (span, (branches, shallow)) in enumerate(zip(spans, evaluated, strict=True)):
            if shallow is not phase:
                continue
            images, start = range(span.image, span.image + span.images), before + len(image)
            both = branches is StepBranches.BOTH and span.rows > span.images
            if both:
                unconditional += range(start, start + span.images)
                guided += images
                image += images
                start += span.images
            elif branches is StepBranches.REUSED:
                reused += images
            conditional[span.image_slice] = range(start, start + span.images)
            image += images
            own = span.rows if both else span.images
            chosen += range(span.row + span.rows - own, span.row + span.rows)
            member += [number] * own
        if chosen:
            calls.append(_call(phase, chosen, image, member, padded(len(chosen)), max_rows))
            before += len(chosen)
    order = np.argsort(guided, kind="stable")
    return CallRows(tuple(calls), conditional, _index(guided)[order], _index(unconditional)[order], _index(reused))


def _call(shallow: bool, chosen: list[int], image: list[int], member: list[int], rows: int, max_rows: int) -> Call:
    used = len(chosen)
    padding = [0] * (rows - used)
    contiguous = chosen[-1] - chosen[0] == used - 1 and chosen[0] + rows <= max_rows
    conditioning = slice(chosen[0], chosen[0] + rows) if contiguous else _index(chosen + padding)
    return Call(shallow, used, conditioning, _index(image + padding), _index(member + padding))


def _index(values: list[int]) -> Index:
    return np.array(values, np.intp)
