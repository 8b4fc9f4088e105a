"""Hook of MkDocs: replaces ``<!-- generated: NAME -->`` in reference pages by what the code says."""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"<!-- generated: ([\w-]+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page."""
    return MARK.sub(lambda match: GENERATORS[match[1]](), markdown)


def command_line() -> str:
    """Usage and options of every verb, from the parser."""
    from ldm_export.cli import make_parser

    (verbs,) = (action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return "\n\n".join("\n".join(_verb(name, verb)) for name, verb in verbs.choices.items())


def _verb(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## {name}\n\n{parser.description}\n"
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if actions:
            title = {"positional arguments": "arguments"}.get(group.title or "", group.title or "")
            yield f"**{title}**\n\n| name | meaning |\n|---|---|"
            yield from (f"| {_form(action)} | {_cell(_help(action))} |" for action in actions)
            yield ""


def _form(action: argparse.Action) -> str:
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    value = action.metavar or choices
    text = " ".join(value) if isinstance(value, tuple) else value
    more = {"+": " …", "*": " …"}.get(str(action.nargs), "")
    if not action.option_strings:
        return f"`{_cell(text)}{more}`"
    shown = "" if action.nargs == 0 else f" {text}{more}"
    return ", ".join(f"`{option}{_cell(shown)}`" for option in action.option_strings)


def _help(action: argparse.Action) -> str:
    return (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def manifest() -> str:
    """The fields of the manifest, from its JSON Schema."""
    schema = json.loads((ROOT / "docs/reference/manifest.schema.json").read_text())
    return _sections({"manifest.json": schema, **schema["$defs"]})


def _sections(schemas: Mapping[str, Any]) -> str:
    """A section for each schema of an object."""
    objects = {name: schema for name, schema in schemas.items() if "properties" in schema}
    return "\n\n".join("\n".join(_fields(name, schema, schemas)) for name, schema in objects.items())


def _fields(name: str, schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {name}\n\n{schema.get('description', '')}\n\n| field | type | meaning |\n|---|---|---|"
    required = schema.get("required", ())
    for field, value in schema["properties"].items():
        optional = "" if field in required else " (optional)"
        yield f"| `{field}`{optional} | {_type(value, schemas)} | {_cell(value.get('description', ''))} |"


def _type(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    """The type of a JSON Schema in words; a type of ``schemas`` with fields of its own is a link to its section."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        anchor = re.sub(r"[^a-z0-9_-]", "", name.lower())
        return f"[{name}](#{anchor})" if "properties" in schemas[name] else _type(schemas[name], schemas)
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_type(one, schemas) for one in schema["anyOf"])
    kind = schema.get("type", "any")
    if kind == "array" and "items" in schema:
        return f"list of {_type(schema['items'], schemas)}"
    if kind == "object" and isinstance(more := schema.get("additionalProperties"), Mapping):
        return f"object of {_type(more, schemas)}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def http() -> str:
    """Endpoints and fields of the HTTP server, from its OpenAPI description."""
    document = json.loads((ROOT / "runtime/ldm_runtime/http/openapi.json").read_text())
    schemas, answers = document["components"]["schemas"], document["components"]["responses"]
    endpoints = (
        "\n".join(_endpoint(f"{method.upper()} {path}", facts, schemas, answers))
        for path, methods in document["paths"].items()
        for method, facts in methods.items()
    )
    return "\n\n".join((*endpoints, _sections(schemas)))


def _endpoint(
    title: str, facts: Mapping[str, Any], schemas: Mapping[str, Any], answers: Mapping[str, Any]
) -> Iterator[str]:
    yield f"## {title}\n\n{facts['summary']}\n"
    for content, body in facts.get("requestBody", {}).get("content", {}).items():
        yield f"Body: `{content}`, {_type(body['schema'], schemas)}\n"
    yield "| status | answer |\n|---|---|"
    for status, answer in facts["responses"].items():
        answer = answers[answer["$ref"].rpartition("/")[2]] if "$ref" in answer else answer
        kinds = [_type(body["schema"], schemas) for body in answer.get("content", {}).values() if "schema" in body]
        yield f"| {status} | {': '.join((_cell(answer['description']), *kinds))} |"


def versions() -> str:
    """What each extra accepts, from pyproject.toml, and the version that the tests run with, from constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().lower().splitlines())
    lines = ["| extra | package | accepted | tested |", "|---|---|---|---|"]
    for extra, requirements in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for requirement in requirements:
            name, accepted = re.fullmatch(r"([\w-]+)(?:\[[\w,]*\])?(.*)", requirement).groups()  # type: ignore[union-attr]
            if name != project["name"]:
                lines.append(f"| {extra or 'always'} | {name} | {_cell(accepted)} | {tested.get(name, 'not tested')} |")
    return "\n".join(lines)


GENERATORS: Mapping[str, Callable[[], str]] = {
    "command-line": command_line,
    "manifest": manifest,
    "http": http,
    "versions": versions,
}
"""Name of a mark -> what it becomes."""
