"""Asks a server whether a picture can be made now: ``python3 -m ldm_runtime.triton.check http://127.0.0.1:8000``.

For a container's health check and Kubernetes' probes: exit code 0 for yes, 1 for no with the reason in one line.
Triton's own ``/v2/health/ready`` tells that the models were loaded; it stays true where an engine fails or hangs later.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from http.client import HTTPException

from ldm_runtime.triton.tensors import CHECK

BODY = {
    "parameters": {CHECK: True},
    "inputs": [{"name": "PROMPT", "shape": [1], "datatype": "BYTES", "data": [CHECK]}],
}


def check(url: str, model: str = "ldm", seconds: float = 8.0) -> str | None:
    """None where the server can make a picture, else why not. It answers at once, without queueing.

    Args:
        url: of its HTTP endpoint.
        model: `ldm` or `ldm_stream`.
        seconds: to wait for an answer.
    """
    headers = {"Content-Type": "application/json"}
    address = f"{url.rstrip('/')}/v2/models/{model}/infer"
    try:
        request = urllib.request.Request(address, json.dumps(BODY).encode(), headers)
        with urllib.request.urlopen(request, timeout=seconds):
            return None
    except urllib.error.HTTPError as error:
        return f"{url}: {error.code}: {error.read(10_000).decode(errors='replace')}"
    except (OSError, HTTPException, ValueError) as error:
        return f"{url}: {getattr(error, 'reason', error)}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python3 -m {__spec__.name} URL")
    sys.exit(" ".join(refusal.split()) if (refusal := check(sys.argv[1])) else 0)
