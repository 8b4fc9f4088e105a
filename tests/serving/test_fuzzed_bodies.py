"""Bodies of requests, changed at random, to a real server: it answers each, and goes on."""

from __future__ import annotations

from tests.fuzz.kinds.bodies import REQUEST, attempt_at
from tests.fuzz.outcome import try_inputs
from tests.support.triton_client import post
from tests.support.triton_server import TritonServer


def test_bodies_are_accepted_or_refused(triton_server: TritonServer) -> None:
    counts = try_inputs(attempt_at(triton_server.http), 0, 100)
    assert counts.failures == []
    assert counts.accepted and counts.refused
    assert post(triton_server.http, "/v2/models/ldm/infer", REQUEST)[0] in (200, 400)
