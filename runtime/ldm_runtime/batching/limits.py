"""Limits of the batch scheduler: rows per UNet call, queue length and timeouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ldm_runtime.errors import SpecError

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Limits of the batch scheduler.

    Attributes:
        max_rows: Maximum rows of one UNet call. An image takes one row, with guidance two.
        row_buckets: Row counts a call is padded to, ascending, ending with ``max_rows``. None means no padding.
        max_queue: Maximum number of waiting requests.
        max_sizes: Maximum number of image sizes in progress. Their batches take turns; requests of further sizes wait.
        aging_seconds: For each priority level below the most urgent, a request waits at most this much longer.
        self_test_after: Idle seconds after which the scheduler generates a test image to confirm that it still works.
        stall_timeout: Seconds without a finished UNet call, while there is work, after which it is not ready.

    Raises:
        SpecError: A count is below 1, or the buckets do not ascend to ``max_rows``.
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
            if type(value := getattr(self, name)) is not int or value < 1:
                raise SpecError(f"limits: {name}: got {value!r:.40}, expected a whole number from 1")
        buckets = list(self.row_buckets or [self.max_rows])
        if buckets != sorted(set(buckets)) or buckets[0] < 1 or buckets[-1] != self.max_rows:
            raise SpecError(
                f"limits: row_buckets: got {buckets}, expected ascending counts that end with max_rows, {self.max_rows}"
            )

    def padded(self, rows: int) -> int:
        """Rows of a UNet call in which ``rows`` rows (1..max_rows) are in use."""
        return rows if self.row_buckets is None else next(size for size in self.row_buckets if size >= rows)
