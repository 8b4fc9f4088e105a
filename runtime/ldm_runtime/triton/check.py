"""Asks a server whether it can generate images now: ``python3 -m ldm_runtime.triton.check http://127.0.0.1:8000``.

It is made for a container's health check and Kubernetes' probes. The exit code is 0 if it can, otherwise 1 with the
reason in one line. Triton's ``/v2/health/ready`` only says that the models were loaded; it stays true if an engine
fails later.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

from ldm_runtime.triton.tensors import CHECK

__all__ = ["check"]

REQUIRED: tuple[dict[str, Any], ...] = (
    {"name": "PROMPT", "shape": [1], "datatype": "BYTES", "data": [CHECK]},
    {"name": "LABEL", "shape": [1], "datatype": "INT32", "data": [0]},
    {"name": "INPUT_IMAGE", "shape": [1, 1, 1, 3], "datatype": "UINT8", "data": [0, 0, 0]},
    {"name": "SEED", "shape": [1], "datatype": "INT64", "data": [0]},
)
"""Possible inputs of a check, which sends the first that the model has: those that models require, then SEED."""


def check(url: str, model: str = "ldm", timeout: float = 8.0) -> str | None:
    """Return None if the server can generate images, else the reason. The server answers at once, without queueing.

    Args:
        url: The server's HTTP endpoint, e.g. "http://127.0.0.1:8000".
        model: `ldm` or `ldm_stream`.
        timeout: Seconds to wait for an answer.
    """
    address, end = f"{url.rstrip('/')}/v2/models/{model}", time.monotonic() + timeout
    try:
        inputs = {tensor["name"] for tensor in _answer(address, None, timeout)["inputs"]}
        body = {
            "parameters": {CHECK: True},
            "inputs": [next(tensor for tensor in REQUIRED if tensor["name"] in inputs)],
        }
        _answer(f"{address}/infer", body, max(0.1, end - time.monotonic()))
    except urllib.error.HTTPError as error:
        return f"{url}: {error.code}: {error.read(10_000).decode(errors='replace')}"
    except (OSError, HTTPException, ValueError, LookupError, TypeError, StopIteration) as error:
        return f"{url}: {getattr(error, 'reason', error)}"
    return None


def _answer(address: str, body: Any, timeout: float) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python3 -m {__spec__.name} URL")
    sys.exit(" ".join(reason.split()) if (reason := check(sys.argv[1])) else 0)
