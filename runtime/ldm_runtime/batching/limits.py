"""Limits of the batch scheduler: rows per UNet call, queue length and timeouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import integer, seconds, shown
from ldm_runtime.specs import ComponentSpec

__all__ = ["MAX_COUNT", "Limits", "rows_of_call"]

MAX_COUNT = 2**31 - 1
MAX_ROWS = 32
"""Default maximum of rows per UNet call, if the UNet takes that many."""


@dataclass(frozen=True)
class Limits:
    """Limits of the batch scheduler.

    Attributes:
        max_rows: Maximum rows of one UNet call. An image takes one row, with guidance two.
        row_buckets: Row counts a call is padded to, ascending, ending with ``max_rows``. None means no padding.
        max_queue: Maximum number of waiting requests.
        max_sizes: Maximum number of combinations of image size and prompt length in progress. Their batches take turns;
            requests of other sizes wait.
        aging_seconds: For each priority level below the most urgent, a request waits at most this much longer.
        self_test_after: Idle seconds after which the scheduler generates a test image to confirm that it still works.
        stall_timeout: Seconds without a finished UNet call, while there is work, after which the scheduler is not
            ready.

    Raises:
        SpecError: A count is not a whole number from 1, a time is not a number of seconds above 0, or the buckets do
            not ascend to ``max_rows``.
    """

    max_rows: int = 32
    row_buckets: Sequence[int] | None = None
    max_queue: int = 256
    max_sizes: int = 4
    aging_seconds: float = 10.0
    self_test_after: float = 120.0
    stall_timeout: float = 300.0

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_queue", "max_sizes"):
            object.__setattr__(self, name, integer(f"limits: {name}", getattr(self, name), 1, MAX_COUNT))
        for name in ("aging_seconds", "self_test_after", "stall_timeout"):
            object.__setattr__(self, name, seconds(f"limits: {name}", getattr(self, name)))
        if self.row_buckets is None:
            return
        counts = self.row_buckets
        if isinstance(counts, str) or not isinstance(counts, Sequence | np.ndarray):
            raise SpecError(f"limits: row_buckets: got {shown(counts)}, expected a list of counts")
        buckets = [integer("limits: row_buckets", count, 1, MAX_COUNT) for count in counts]
        if not buckets or buckets != sorted(set(buckets)) or buckets[-1] != self.max_rows:
            expected = f"ascending counts that end with max_rows, {self.max_rows}"
            raise SpecError(f"limits: row_buckets: got {shown(buckets)}, expected {expected}")
        object.__setattr__(self, "row_buckets", buckets)

    def padded(self, rows: int) -> int:
        """Rows of a UNet call in which ``rows`` rows (1..max_rows) are in use."""
        return rows if self.row_buckets is None else next(size for size in self.row_buckets if size >= rows)


def rows_of_call(unet: ComponentSpec, wanted: int | None, whose: str) -> int:
    """Return the maximum rows of one UNet call.

    Args:
        unet: Spec of the UNet.
        wanted: Number that the user requests; None takes ``MAX_ROWS``, or fewer if the UNet takes fewer.
        whose: Name of the UNet in error messages.

    Raises:
        SpecError: The UNet does not take that many rows.
    """
    most = min(tensor.bounds("max")[0] for tensor in unet.inputs)
    rows = min(MAX_ROWS, most) if wanted is None else wanted
    if not 1 <= rows <= most:
        raise SpecError(f"max-rows: got {shown(rows)}, expected 1..{most}, which {whose} takes")
    return rows
