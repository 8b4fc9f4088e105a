"""Shell commands of the documentation: the command line takes them, and the files, targets and extras exist."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest

from ldm_export.cli import make_parser
from tests.support.documentation import PAGES, ROOT, blocks

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([\w/.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(page: str) -> list[str]:
    """Lines of the shell blocks of a page, and commands in its text."""
    lines = []
    for block in blocks(page):
        if block.language in ("", "bash"):
            lines += block.text.replace("\\\n", " ").splitlines()
    text = re.sub(r"\s+", " ", (ROOT / page).read_text())
    lines += re.findall(r"(?<!`)`((?:ldm-export|make|pip install) [^`]+)`(?!`)", text)
    return [line.strip() for line in lines]


def test_the_documentation_has_commands() -> None:
    every = [command for page in PAGES for command in commands(page)]
    assert sum(command.startswith("ldm-export ") for command in every) > 80
    assert sum(command.startswith("make ") for command in every) > 10


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])  # which names renamed options
def test_the_command_line_takes_every_command(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(page):
        words = shlex.split(command, comments=True) if command.startswith("ldm-export ") else []
        words = words[1 : next((i for i, word in enumerate(words) if word in ("|", ">", "&&")), len(words))]
        if len(words) < 2 or words[0] == "VERB":  # "ldm-export build" names a verb
            assert not words or words[0] in ("VERB", *VERBS), command
            continue
        try:
            args, more = make_parser().parse_known_args(words)
        except SystemExit as ended:
            assert ended.code == 0 or incomplete(capsys.readouterr().err), f"{page}: {command}"
        else:  # prompts may also follow options
            assert not any(word.startswith("-") for word in more), f"{page}: {command}"
            assert not more or hasattr(args, "prompts"), f"{page}: {command}"


VERBS = re.findall(r"^    ([\w-]+) ", make_parser().format_help(), re.MULTILINE)


def incomplete(error: str) -> bool:
    """True if a command in a sentence only leaves out what it works on."""
    return "the following arguments are required" in error


@pytest.mark.parametrize("page", PAGES)
def test_files_targets_and_extras_exist(page: str) -> None:
    for command in commands(page):
        for target in re.findall(r"^make ([a-z][\w/.-]*)", command):
            assert target in TARGETS, f"{page}: {command}"
        for file in re.findall(r"(?:^|\s)python3? ((?:benchmarks|demo)/\S+\.py)", command):
            assert (ROOT / file).is_file(), f"{page}: {command}"
        for extras in re.findall(r"""^pip install ["']?\S*?\[([\w,-]+)\]""", command):
            unknown = set(extras.split(",")) - set(PROJECT["optional-dependencies"])
            assert not unknown, f"{page}: {command}"
