"""The OpenAPI description has the endpoints and fields of the server, and the server's answers fit it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from starlette.routing import Route

from ldm_runtime.http.app import OPENAPI, make_app
from ldm_runtime.http.image_request import DELIVERY, OPTIONS, WITHOUT_EFFECT
from ldm_runtime.http.served_model import ServedModel
from ldm_runtime.http.served_models import ServedModels
from ldm_runtime.http.server_options import ServerOptions
from ldm_runtime.http.webui_images import IMAGE_CHECKED
from ldm_runtime.http.webui_request import CHECKED
from tests.http.conftest import Served

DOCUMENT = json.loads(OPENAPI.read_text())
SCHEMAS = DOCUMENT["components"]["schemas"]
FAST = {"steps": 1, "seed": 1}
REQUESTS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/text", None),
    ("GET", "/v1/models/none", None),
    ("POST", "/v1/images/generations", {"prompt": "a circle", **FAST}),
    ("POST", "/v1/images/generations", {"prompt": "a circle", "response_format": "url", **FAST}),
    ("POST", "/v1/images/generations", {"prompt": "a circle", "budget": 15, "steps": "auto"}),
    ("POST", "/v1/images/generations", {"prompt": "a circle", "steps": 0}),
    ("POST", "/sdapi/v1/txt2img", {"prompt": "a circle", **FAST}),
    ("POST", "/sdapi/v1/txt2img", {"prompt": "a circle", "steps": 0}),
    ("POST", "/sdapi/v1/img2img", {"init_images": ["no image"]}),
    ("GET", "/sdapi/v1/options", None),
    ("POST", "/sdapi/v1/options", {"sd_model_checkpoint": "text"}),
    ("GET", "/sdapi/v1/sd-models", None),
    ("GET", "/sdapi/v1/samplers", None),
    ("GET", "/sdapi/v1/schedulers", None),
    ("GET", "/sdapi/v1/scripts", None),
    ("GET", "/sdapi/v1/progress", None),
    ("GET", "/openapi.json", None),
]


def schema(content: dict[str, Any]) -> Draft202012Validator:
    """A validator of a JSON body, whose references are those of the document."""
    return Draft202012Validator({"components": DOCUMENT["components"], **content["application/json"]["schema"]})


def test_the_endpoints_are_those_of_the_application(models: dict[str, ServedModel]) -> None:
    routes = [route for route in make_app(ServedModels.of(models), ServerOptions()).routes if isinstance(route, Route)]
    served = {(method, route.path) for route in routes for method in (route.methods or set()) - {"HEAD"}}
    described = {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert described == served


def test_the_fields_are_those_of_a_request() -> None:
    fields = {*OPTIONS, *WITHOUT_EFFECT, *DELIVERY}
    assert set(SCHEMAS["ImageRequest"]["properties"]) == fields
    assert set(SCHEMAS["EditRequest"]["properties"]) == {*fields, "image", "mask"}


def test_requests_of_images_have_the_fields_of_requests_of_texts() -> None:
    texts, images = (SCHEMAS[name]["properties"] for name in ("WebuiRequest", "WebuiImageRequest"))
    assert set(texts) >= set(CHECKED) and {name: images[name] for name in texts} == texts
    assert set(images) - set(texts) == {*IMAGE_CHECKED, "init_images", "mask"}


def test_every_schema_is_valid_and_used() -> None:
    for name, one in SCHEMAS.items():
        Draft202012Validator.check_schema(one)
        assert json.dumps(DOCUMENT).count(f'"#/components/schemas/{name}"'), f"nothing refers to {name}"


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
def test_answers_fit_the_description(served: Served, method: str, path: str, body: dict[str, Any] | None) -> None:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    described = DOCUMENT["paths"]["/v1/models/{name}" if path.startswith("/v1/models/") else path][method.lower()]
    request = urllib.request.Request(served.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            status, answer = response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        status, answer = error.code, json.loads(error.read())
    entry = described["responses"][str(status)]
    if "$ref" in entry:
        entry = DOCUMENT["components"]["responses"][entry["$ref"].rpartition("/")[2]]
    faults = [fault.message for fault in schema(entry["content"]).iter_errors(answer)]
    assert not faults, faults
    if body is not None and status == 200:
        assert not list(schema(described["requestBody"]["content"]).iter_errors(body))
