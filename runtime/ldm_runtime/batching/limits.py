"""What an engine room takes, and how long it bears what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ldm_runtime.errors import SpecError


@dataclass(frozen=True)
class Limits:
    """What an engine room takes.

    Attributes:
        rows: of one UNet call: one for each image, two for a guided one.
        call_rows: row counts that calls are filled up to, rising and ending with ``rows``; None: any count.
        queue: requests that may wait.
        heights_and_widths: picture sizes in work at once, which take turns; requests of one more wait.
        patience: seconds that a request waits longer, at most, for each step of priority it is less urgent.
        idle: seconds without work after which a picture is made to see that it still can be.
        stall: seconds without a finished call, with work to do, after which the room is not ready.
    """

    rows: int = 32
    call_rows: Sequence[int] | None = None
    queue: int = 256
    heights_and_widths: int = 4
    patience: float = 10.0
    idle: float = 120.0
    stall: float = 300.0

    def __post_init__(self) -> None:
        for name in ("rows", "queue", "heights_and_widths"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise SpecError(f"engine room: {name}: got {value!r}, expected a whole number from 1")
        sizes = list(self.call_rows or [self.rows])
        if sizes != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] != self.rows:
            raise SpecError(f"engine room: call_rows: got {sizes}, expected rising counts that end with {self.rows}")
