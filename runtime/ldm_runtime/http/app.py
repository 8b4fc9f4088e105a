"""The web application: image APIs, health checks, metrics, and the web page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ldm_runtime.http.access import Access
from ldm_runtime.http.api_error import ApiError
from ldm_runtime.http.image_store import ImageStore
from ldm_runtime.http.images_api import ImagesApi
from ldm_runtime.http.served_models import ServedModels
from ldm_runtime.http.server_metrics import server_metrics
from ldm_runtime.http.server_options import ServerOptions
from ldm_runtime.http.web_page import PAGE_HEADERS, page_html
from ldm_runtime.http.webui_api import WebuiApi

__all__ = ["make_app"]

OPENAPI = Path(__file__).parent / "openapi.json"
"""OpenAPI 3.1 description of all endpoints."""
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_app(models: ServedModels, options: ServerOptions, log: Callable[[str], None] = lambda line: None) -> Starlette:
    """Return the application. It does not close the models.

    Args:
        models: The bundles; requests without a model take the first.
        options: Limits and access control.
        log: Called with each line of the access log.
    """

    async def page(request: Request) -> Response:
        return Response(page_html(), media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    async def alive(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def ready(request: Request) -> Response:
        failed, unloaded = models.not_ready(), [one.name for one in models.bundles.values() if one.current is None]
        text = f"not ready: {', '.join(failed)}\n" if failed else "ready\n"
        if unloaded:
            text += f"not loaded: {', '.join(unloaded)}\n"
        return PlainTextResponse(text, 503 if failed else 200)

    async def metrics(request: Request) -> Response:
        return Response(server_metrics(models), media_type=METRICS_TYPE)

    async def description(request: Request) -> Response:
        return Response(OPENAPI.read_bytes(), media_type="application/json")

    return Starlette(
        routes=[
            Route("/", page),
            Route("/healthz", alive),
            Route("/readyz", ready),
            Route("/metrics", metrics),
            Route("/openapi.json", description),
            *ImagesApi(models, options, ImageStore()).routes(),
            *WebuiApi(models, options).routes(),
        ],
        middleware=[Middleware(Access, options=options, log=log)],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _unexpected},
    )


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = ApiError(
        error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}", code="http_error"
    )
    return JSONResponse(answer.body(), error.status_code, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    return ApiError(
        500, "server: an unexpected error; its log has the traceback", kind="server_error", code="internal_error"
    ).response()
