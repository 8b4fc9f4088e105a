"""Pages that name what the code has: errors and their messages, metrics, and the fields of the manifest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from ldm_runtime import errors
from ldm_runtime.batching.metrics import COUNTERS, GAUGES
from ldm_runtime.bundle_layout import MANIFEST
from ldm_runtime.errors import LdmError, ManifestError
from ldm_runtime.http.server_metrics import SERVER_COUNTERS, SERVER_GAUGES
from ldm_runtime.manifest_reader import read_manifest
from tests.support.documentation import ROOT
from tests.support.small_models import bundle_of, text_model

TROUBLESHOOTING = (ROOT / "docs/troubleshooting.md").read_text()
METRICS = (ROOT / "docs/reference/metrics.md").read_text()
SCHEMA = json.loads((ROOT / "docs/reference/manifest.schema.json").read_text())


def sources() -> str:
    """The source of the packages; literals that are split over lines are joined."""
    files = [path for folder in ("export", "runtime", "calibration") for path in (ROOT / folder).rglob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in files))


def test_every_error_has_an_entry() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, LdmError)]
    assert len(classes) > 10
    missing = [kind.__name__ for kind in classes if f"`{kind.__name__}`" not in TROUBLESHOOTING]
    assert not missing, f"docs/troubleshooting.md does not name {missing}"


def test_every_symptom_is_a_message_of_the_code() -> None:
    text, code = TROUBLESHOOTING.partition("\n## Triton\n")[0], sources()
    quoted = []
    for header, rows in re.findall(r"^(\|.*)\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE):
        column = [name.strip() for name in header.split("|")].index("symptom")
        quoted += [quote for row in rows.splitlines() for quote in re.findall(r"`([^`]+)`", row.split("|")[column])]
    assert len(quoted) > 30
    for quote in quoted:
        for part in quote.split("…"):
            assert part.strip() in code or re.match(r"--|ldm_stream", quote), f"no message has {quote!r}"


def test_the_page_has_every_metric() -> None:
    rows = re.findall(r"^\| `(ldm_\w+)` \| (gauge|counter) \|", METRICS, re.MULTILINE)
    families = ((GAUGES, "gauge"), (COUNTERS, "counter"), (SERVER_GAUGES, "gauge"), (SERVER_COUNTERS, "counter"))
    assert rows == [(name, kind) for names, kind in families for name in names]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The manifest of a small model of texts."""
    folder = tmp_path_factory.mktemp("manifest")
    bundle = bundle_of(text_model(folder / "model"), folder / "bundle", ())
    return json.loads((bundle.folder / MANIFEST).read_text())


def faults(document: Any) -> list[str]:
    return [error.message for error in Draft202012Validator(SCHEMA).iter_errors(document)]


def test_the_schema_takes_the_manifest_that_is_written(document: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert faults(document) == []
    assert set(SCHEMA["properties"]) == set(document)
    parts = SCHEMA["$defs"]
    unet = document["components"]["unet"]
    for name, example in (
        ("component", unet),
        ("tensor", unet["inputs"][0]),
        ("conditioning", document["conditioning"][0]),
        ("latents", document["latents"]),
        ("defaults", document["defaults"]),
        ("file", next(iter(document["files"].values()))),
    ):
        assert set(parts[name]["properties"]) == set(example), name


@pytest.mark.parametrize("field", sorted(SCHEMA["properties"]))
@pytest.mark.parametrize("change", ["missing", "wrong"])
def test_the_schema_refuses_what_the_reader_refuses(
    document: dict[str, Any], field: str, change: str, tmp_path: Path
) -> None:
    changed = {name: value for name, value in document.items() if name != field}
    if change == "wrong":
        changed[field] = 5.5
    (tmp_path / MANIFEST).write_text(json.dumps(changed))
    if field in SCHEMA["required"] or change == "wrong":
        assert faults(changed)
        with pytest.raises(ManifestError):
            read_manifest(tmp_path)
    else:
        assert faults(changed) == []
        read_manifest(tmp_path)


def test_the_schema_has_the_fields_of_an_engine() -> None:
    from ldm_runtime.engine_facts import EngineFacts

    facts = EngineFacts("a", "tensorrt", "11", ("8.9",), "fp16", "0", ({},)).to_json()
    assert set(SCHEMA["$defs"]["engine"]["properties"]) == set(facts)
