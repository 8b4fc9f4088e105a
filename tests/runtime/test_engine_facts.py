"""Facts of engines: written and read back, strictly, and which profile takes which shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ldm_runtime.engine_facts import EngineFacts, engine_from_json
from ldm_runtime.errors import ManifestError

ENGINE = EngineFacts(
    file="unet/fp16.tensorrt-rtx-8.9.engine",
    package="tensorrt-rtx",
    version="1.7.1.116",
    compute_capabilities=("8.6", "8.9"),
    precision="fp16",
    graph="0" * 64,
    profiles=(
        {"sample": ((2, 4, 32, 32), (2, 4, 32, 32), (2, 4, 32, 32)), "timestep": ((2,), (2,), (2,))},
        {"sample": ((1, 4, 16, 16), (2, 4, 32, 32), (16, 4, 64, 64)), "timestep": ((1,), (2,), (16,))},
    ),
    proof={"read_from": "program", "matrix_work": {"half": 3}},
)


def test_there_and_back() -> None:
    assert engine_from_json("e", json.loads(json.dumps(ENGINE.to_json()))) == ENGINE


@pytest.mark.parametrize(
    ("shapes", "index"),
    [
        ({"sample": (2, 4, 32, 32), "timestep": (2,)}, 0),
        ({"sample": (1, 4, 32, 32), "timestep": (1,)}, 1),
        ({"sample": (16, 4, 64, 16), "timestep": (16,)}, 1),
        ({"sample": (17, 4, 64, 64), "timestep": (17,)}, None),
        ({"sample": (2, 4, 8, 32), "timestep": (2,)}, None),
        ({"sample": (2, 4, 32), "timestep": (2,)}, None),
        ({"sample": (2, 4, 32, 32)}, None),
    ],
)
def test_the_tightest_profile_that_fits(shapes: dict[str, tuple[int, ...]], index: int | None) -> None:
    assert ENGINE.fitting(shapes) == index


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": None}, r"^e\.file"),
        ({"version": 11}, r"^e\.version"),
        ({"version_compatible": 1}, r"^e\.version_compatible: got 1, expected true or false"),
        ({"compute_capabilities": "8.9"}, r"^e\.compute_capabilities: got '8\.9', expected a list"),
        ({"compute_capabilities": [8.9]}, r"^e\.compute_capabilities"),
        ({"profiles": []}, r"^e\.profiles: got 0, expected 1\.\.64"),
        ({"profiles": [{}] * 65}, r"^e\.profiles: got 65"),
        ({"profiles": [{"x": [[1], [2]]}]}, r"^e\.profiles\.x: .*expected min, opt and max"),
        ({"profiles": [{"x": [[2], [1], [3]]}]}, r"^e\.profiles\.x: .*in this order"),
        ({"profiles": [{"x": [[1], [1], [0]]}]}, r"^e\.profiles\.x: got \[0\], expected a shape"),
        ({"profiles": [{"x": [[1], [1], [2**31]]}]}, r"^e\.profiles\.x: got .*, expected a shape"),
        ({"profiles": [{"x": [[1, 1], [1], [1]]}]}, r"^e\.profiles\.x"),
        ({"profiles": [{"x": [[True], [True], [True]]}]}, r"^e\.profiles\.x"),
        ({"proof": []}, r"^e\.proof"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        engine_from_json("e", {**ENGINE.to_json(), **changes})
