"""Errors as OpenAI's API sends them: a status and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from ldm_runtime.errors import CancelledError, DeadlineError, LdmError, QueueFullError, SpecError

__all__ = ["FIELD_NAMES", "ApiError", "api_error"]

FIELD_NAMES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "prompt": "prompts",
    "prompt_2": "prompts_2",
    "n": "images_per_prompt",
}
"""Field of the API -> field of ``Request``, where the names differ."""
_API_NAMES = {name: field for field, name in FIELD_NAMES.items()}


class ApiError(Exception):
    """An error that is sent to the client.

    Args:
        status: HTTP status.
        message: One line.
        kind: Type of the error as OpenAI names it.
        code: Machine-readable code.
        param: Name of the field that is wrong.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response. 429 and 503 have the header Retry-After."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), self.status, headers)


def api_error(error: LdmError) -> ApiError:
    """Convert an error of the runtime. A field name at the start of the message is replaced by its name in the API."""
    message = str(error)
    if isinstance(error, SpecError):
        name, colon, rest = message.partition(": ")
        if not colon or not name.isidentifier():
            return ApiError(400, message, code="invalid_value")
        param = _API_NAMES.get(name, name)
        return ApiError(400, f"{param}: {rest}", code="invalid_value", param=param)
    if isinstance(error, QueueFullError):
        full = "full" in message
        return ApiError(
            429 if full else 503,
            message,
            kind="rate_limit_error" if full else "server_error",
            code="queue_full" if full else "not_ready",
        )
    if isinstance(error, DeadlineError):
        return ApiError(504, message, kind="server_error", code="timeout")
    if isinstance(error, CancelledError):
        return ApiError(503, message, kind="server_error", code="cancelled")
    return ApiError(500, message, kind="server_error", code="engine_error")
