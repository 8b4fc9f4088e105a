"""JSON files of a checkpoint: anything but an object is refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_export.checkpoint.json_files import MAX_JSON, read_json
from ldm_runtime.errors import CheckpointError


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"a": 1,\n "b": }', "line 2, column 7: not JSON"),
        (b"", "line 1, column 1: not JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b'"text"', "holds a JSON str, expected an object"),
        (b"\xff\xfe{}", "is not JSON: .*utf-8"),
        (b"[" * 100_000, "is not JSON: .*recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: .*digits"),
        (b" " * (MAX_JSON + 1), f"is {MAX_JSON + 1} bytes long, expected at most {MAX_JSON}"),
    ],
)
def test_bad_json(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"unet: .*x.json:? {what}"):
        read_json(tmp_path / "x.json", "unet")
