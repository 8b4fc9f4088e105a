"""Prints the tables of docs/reliability.md from the results of `make fuzz` and `make kill`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "tables"]

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TITLES = {
    "manifests": "manifests of bundles",
    "configs": "configs of checkpoints",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors files",
    "bin": "`.bin` and `.ckpt` files",
    "graphs": "ONNX graphs with external data",
    "records": "calibration records",
    "requests": "requests in Python and from Triton's tensors",
    "answers": "answers of a server to `client`",
    "bodies": "HTTP bodies to a Triton server",
}


def tables() -> list[str]:
    """Lines of both tables."""
    fuzz, kill = (json.loads((RESULTS / name).read_text()) for name in ("fuzz.json", "kill.json"))
    lines = ["| inputs | tried | accepted | refused | failed |", "|---|---|---|---|---|"]
    lines += [_row(TITLES[kind], counts) for kind, counts in fuzz.items()]
    whole = {key: sum(counts[key] for counts in fuzz.values()) for key in ("tried", "accepted", "refused")}
    lines += [_row("all", {**whole, "failures": [one for counts in fuzz.values() for one in counts["failures"]]}), ""]
    lines += ["| command | changes of files | killed | failed |", "|---|---|---|---|"]
    names = {"changes": 0, "killed": 0, "failures": []}
    for name, result in kill.items():
        lines.append(f"| {name} | {result['changes']} | {result['killed']} | {len(result['failures'])} |")
        names = {key: value + result[key] for key, value in names.items()}
    return [*lines, f"| all | {names['changes']} | {names['killed']} | {len(names['failures'])} |"]


def _row(title: str, counts: dict[str, Any]) -> str:
    numbers = (counts["tried"], counts["accepted"], counts["refused"], len(counts["failures"]))
    return f"| {title} | {' | '.join(f'{number:,}' for number in numbers)} |"


if __name__ == "__main__":
    print("\n".join(tables()))
