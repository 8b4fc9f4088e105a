"""The denoising loop that a pipeline runs on a device, and the replacement of its engine if it cannot start."""

from __future__ import annotations

from contextlib import suppress

from ldm_runtime.backends.factory import OpenModel
from ldm_runtime.device_loop import DeviceLoop
from ldm_runtime.errors import BackendError, DisplacedError

__all__ = ["ReplaceableLoop"]


class ReplaceableLoop:
    """The device loop of a pipeline, which changes if the engine is replaced.

    Attributes:
        current: The loop; None runs it in NumPy.
        opened: The model whose engine is replaced. None replaces nothing, because the caller has opened the components.
    """

    def __init__(self, current: DeviceLoop | None):
        self.current = current
        self.opened: OpenModel | None = None
        self._started: DeviceLoop | None = None
        self._former: list[DeviceLoop] = []

    def started(self, loop: DeviceLoop) -> None:
        """Record that a loop runs on this machine, so that a later failure does not replace the engine."""
        self._started = loop

    def failed(self, loop: DeviceLoop, error: BackendError) -> None:
        """Replace the engine of a loop that failed before its first step.

        Raises:
            BackendError: ``error``, if the loop has run before or no other engine may run the model.
        """
        if self.opened is None or self._started is loop or isinstance(error, DisplacedError):
            raise error
        with suppress(BackendError):
            loop.close()
        self.opened.loop_failed(loop, error)

    def replace(self, loop: DeviceLoop | None) -> None:
        """Use another loop. The present one is freed by ``close``, because another thread may be running it."""
        if self.current is not None:
            self._former.append(self.current)
        self.current = loop

    def close(self) -> None:
        """Free the loop and those that were replaced."""
        loop = self.current  # another thread may replace it
        while True:
            try:
                former = self._former.pop()
            except IndexError:  # none is left, or another thread has closed the last one
                break
            with suppress(BackendError):  # its engine has failed before
                former.close()
        if loop is not None:
            loop.close()
