"""Pickles are read as data: nothing is imported or called, whatever they ask for."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import pickletools
import struct
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from ldm_export.originals.pickle_machine import Global, PickleRecord
from ldm_export.originals.pickle_reader import read_pickle
from ldm_runtime.errors import CheckpointError

CALLS: list[Any] = []


class Caller:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


class Stateful:
    def __setstate__(self, state: Any) -> None:
        CALLS.append(state)

    def __getstate__(self) -> Any:
        return {"a": 1}


def read(data: bytes) -> Any:
    return read_pickle(io.BytesIO(data), "model.ckpt")


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_and_ordered_dicts_come_back(protocol: int) -> None:
    value = {"a": [1, 2.5, None, True], "b": ("x", b"y", -(2**70)), "c": OrderedDict(d=1), 7: "seven"}
    if protocol < 3:
        value["b"] = ("x", -(2**70))
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(6))
def test_calls_are_recorded_and_not_made(protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = read(pickle.dumps({"state_dict": Caller()}, protocol))["state_dict"]
    assert isinstance(content, PickleRecord) and content.function in {"posix.system", "nt.system"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("protocol", range(6))
def test_states_of_objects_are_dropped(protocol: int) -> None:
    CALLS.clear()
    assert isinstance(read(pickle.dumps(Stateful(), protocol)), PickleRecord)
    assert not CALLS


def test_classes_are_not_imported() -> None:
    content = read(b"cantigravity_absent\nClass\n.")
    assert isinstance(content, Global) and content.name == "antigravity_absent.Class"
    assert isinstance(read(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R."), PickleRecord)
    assert "antigravity_absent" not in sys.modules


def test_extension_codes_are_not_looked_up() -> None:
    copyreg.add_extension("os", "system", 0xF0)
    try:
        for data in (b"\x82\xf0(X\x01\x00\x00\x00xtR.", b"\x83\xf0\x00.", b"\x84\xf0\x00\x00\x00."):
            content = read(b"\x80\x02" + data)
            assert getattr(content, "name", None) != "os.system" and getattr(content, "function", None) != "os.system"
    finally:
        copyreg.remove_extension("os", "system", 0xF0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a pickle"),
        (b"\x80\x02}", "not a pickle"),
        (b"\x80\x02.", "pop from empty list"),
        (b"\x80\x02h\x05.", "KeyError"),
        (b"\x80\x02(u.", "out of range"),
        (b"\x80\x02](.", "mark"),
        (b"X\xff\xff\xff\x7fabc.", "a piece of"),
        (b"\x8d" + struct.pack("<Q", 2**62) + b"a.", "piece"),
        (b"c" + b"a" * 2**21, "a line without end"),
        (b"\x80\x05\x97.", "buffers"),
        (b"K\x01b.", "no object"),
        (b"L" + b"9" * 5000 + b"L\n.", "not a pickle"),
    ],
)
def test_damage_is_one_line(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=r"^model.ckpt: not a pickle of torch.save") as error:
        read(data)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_huge_memo_index_takes_no_memory() -> None:
    assert read(b"\x80\x02K\x01r\xff\xff\xff\xff0j\xff\xff\xff\xff.") == 1


def test_deep_and_shared_structures_take_little_time() -> None:
    began = time.process_time()
    data = b"(" * 100_000 + b"t" * 100_000 + b"."
    assert isinstance(read(data), tuple)
    laughs = b"\x80\x02K\x01" + b"".join(b"2\x86" for _ in range(200))  # DUP, TUPLE2: 2**200 leaves
    content = read(b"\x80\x02}" + laughs[2:] + b"K\x01s.")  # a key whose hash would never be finished
    assert list(content.values()) == [1] and time.process_time() - began < 10


def test_every_opcode_is_handled_or_refused() -> None:
    for opcode in pickletools.opcodes:
        try:
            read(opcode.code.encode("latin-1") + b"\x00" * 16 + b".")
        except CheckpointError:
            continue


def test_random_bytes_end_in_an_error_or_a_value() -> None:
    import random

    source = pickle.dumps({"state_dict": OrderedDict(a=[1, 2, ("x", 3)])}, 2)
    generator = random.Random(0)
    for _ in range(3000):
        data = bytearray(source)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            read(bytes(data))
        except CheckpointError:
            continue
