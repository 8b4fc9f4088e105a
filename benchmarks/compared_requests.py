"""Requests of ``quantizers.py``: those of the calibration, and others on which int8 UNets are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_calibration.inputs import INPUTS, InputFile, loaded, read_inputs
from ldm_calibration.model import ImageRequest
from ldm_calibration.record import read_record
from ldm_calibration.settings import CalibrationSettings
from ldm_export_demo.grammar import held_out_prompts
from ldm_runtime.bundle import Bundle

__all__ = ["batches", "prompts_of", "read_requests"]

BATCH = 10
"""Prompts in one call. Other inputs are generated one at a time."""


def read_requests(
    bundle: Bundle, inputs: Path | None, others: Path | None, count: int
) -> tuple[CalibrationSettings, list[ImageRequest]]:
    """Return the settings of the calibration with its inputs, and ``count`` other requests.

    Args:
        bundle: A bundle with a calibration record.
        inputs: Folder of the calibration's inputs; None for the demo model's prompts.
        others: Folder of inputs to compare; None takes those of ``inputs`` that the calibration did not use.
        count: The number of compared requests, or fewer if the folder has fewer inputs.
    """
    document = read_record(bundle.file("calibration.json")).document["settings"]
    if inputs is None:
        prompts = held_out_prompts(count // 3, count - count // 3)
        return CalibrationSettings(**document), [{"prompts": prompt} for prompt in prompts]
    (kind,) = (entry.kind for entry in bundle.manifest.conditioning if entry.kind in INPUTS)
    found = read_inputs(inputs, kind)
    files = {value.sha256: value for request in found for value in request.values() if isinstance(value, InputFile)}
    settings = CalibrationSettings(
        **{**document, **{name: _with_files(document[name], files) for name in ("requests", "trial_requests")}}
    )
    used = {digest for request in (*settings.requests, *settings.trial_requests) for digest in _digests(request)}
    compared = read_inputs(others or inputs, kind)
    return settings, [request for request in compared if not used & _digests(request)][:count]


def _digests(request: ImageRequest) -> set[str]:
    return {value.sha256 for value in request.values() if isinstance(value, InputFile)}


def _with_files(requests: Sequence[Mapping[str, Any]], files: Mapping[str, InputFile]) -> tuple[dict[str, Any], ...]:
    """Put the files of a folder in place of their names and digests."""
    return tuple(
        {name: files[value["sha256"]] if isinstance(value, Mapping) else value for name, value in request.items()}
        for request in requests
    )


def prompts_of(requests: Sequence[ImageRequest]) -> list[str] | None:
    """Return the prompts of requests; None if they have other inputs."""
    prompts = [request.get("prompts") for request in requests]
    return None if None in prompts else [str(prompt) for prompt in prompts]


def batches(requests: Sequence[ImageRequest]) -> Iterator[dict[str, Any]]:
    """Yield the fields of each call; image ``i`` of all calls has seed ``i``."""
    size = 1 if prompts_of(requests) is None else BATCH
    for start in range(0, len(requests), size):
        some = requests[start : start + size]
        fields = loaded(some[0]) if size == 1 else {"prompts": prompts_of(some)}
        yield {**fields, "seed": list(range(start, start + len(some)))}
