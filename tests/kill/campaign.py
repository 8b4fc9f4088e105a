"""Kills every command at each of its changes: ``python -m tests.kill.campaign``. Results are added to a JSON file."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.kill.scenarios import SCENARIOS
from tests.kill.trials import prepare

__all__: list[str] = []


def main() -> int:
    """Run the campaign. Returns 1 if a kill left a folder that is not sound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--json", type=Path, required=True, help="results; those in the file are continued")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    until = time.monotonic() + args.seconds
    for name in SCENARIOS:
        result = results.setdefault(name, {"changes": -1, "killed": 0, "failures": []})
        if result["killed"] == result["changes"] or time.monotonic() > until:
            continue
        with tempfile.TemporaryDirectory(prefix="kill") as folder:
            prepared = prepare(name, Path(folder) / "scenario")
            result["changes"] = prepared.changes
            for number in range(result["killed"], prepared.changes):
                if time.monotonic() > until:
                    break
                try:
                    prepared.kill(number)
                except Exception as error:
                    result["failures"].append(f"change {number}: {type(error).__name__}: {str(error)[:300]}")
                result["killed"] = number + 1
                args.json.write_text(json.dumps(results, indent=1) + "\n")
    for name, result in results.items():
        print(f"{name}: killed at {result['killed']} changes, {len(result['failures'])} failed")
    return int(any(result["failures"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
