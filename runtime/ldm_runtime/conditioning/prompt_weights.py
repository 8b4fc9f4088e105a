"""Weights in prompts: ``(word:1.3)``, ``(two words)1.3``, ``(two words)+`` and ``word--``, as in the package compel.

Each ``+`` multiplies the weight by 1.1 and each ``-`` by 0.9. Weights of nested parentheses are multiplied; parentheses
without a weight have weight 1. A backslash before ``(``, ``)``, ``:``, ``+``, ``-`` or a backslash makes it plain text.
"""

from __future__ import annotations

import re
from itertools import groupby

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import shown

__all__ = ["MAX_WEIGHT", "Fragment", "weighted_fragments"]

Fragment = tuple[str, float]
"""A part of a prompt and its weight."""
MAX_WEIGHT = 10.0
"""Largest weight of a fragment. Above about 1.6, most models generate nothing useful."""
MAX_DEPTH = 100
_PLUS, _MINUS = 1.1, 0.9
_NUMBER = r"\d+\.\d*|\.\d+|\d+"
_MARKS = r"\++|-+"
_BREAK = r'\s(),."=+\-'
_TOKEN = re.compile(
    rf"""\\(?P<escaped>[()+\-:\\])
    |(?P<open>\()
    |\)(?P<after>{_MARKS}|{_NUMBER}|)
    |:\s*(?P<inside>{_NUMBER})\s*\)
    |(?P<word>(?:[^{_BREAK}\\]|[+\-](?![{_BREAK}]|$))+)(?P<marks>{_MARKS})(?=[\s(),."=]|$)
    |(?P<text>\s+|[^\s()\\:]+|[:\\])""",
    re.VERBOSE,
)
_OPERATOR = re.compile(r"""[)"\w]\.(?:and|add|blend|swap|attend)\s*\(|\b(?:with|use)Lora\(""")


def weighted_fragments(prompt: str) -> tuple[Fragment, ...]:
    """Split a prompt into fragments; adjacent ones of equal weight are joined. An empty prompt has one empty fragment.

    Raises:
        SpecError: Parentheses do not match, a weight is above ``MAX_WEIGHT``, or the prompt has an operator of compel
            that is not supported.
    """
    if found := _OPERATOR.search(prompt):
        raise SpecError(f"prompt: {found[0]!r} is not supported; weights are written (word:1.3), (word)+ or word-")
    stack: list[list[Fragment]] = [[("", 1.0)]]
    for token in _TOKEN.finditer(re.sub(r",(\S)", r", \1", prompt)):
        if token["open"]:
            stack.append([("", 1.0)])
            if len(stack) > MAX_DEPTH:
                raise SpecError(f"prompt: got more than {MAX_DEPTH} parentheses in one another, expected fewer")
        elif token["after"] is not None or (token["inside"] and len(stack) > 1):
            _close(stack, prompt, _weight(token["after"] if token["inside"] is None else token["inside"]))
        elif token["word"]:
            stack[-1] += [(token["word"], _weight(token["marks"])), ("", 1.0)]
        else:
            text, weight = stack[-1].pop()
            stack[-1].append((text + (token["escaped"] or token[0]), weight))
    if len(stack) > 1:
        raise SpecError(f"prompt: a '(' is not closed in {shown(prompt)}; close it, or write \\( for a text")
    return _joined(stack[0])


def _close(stack: list[list[Fragment]], prompt: str, weight: float) -> None:
    if len(stack) == 1:
        raise SpecError(f"prompt: a ')' closes nothing in {shown(prompt)}; open it, or write \\) for a text")
    closed = [(text, own * weight) for text, own in stack.pop()]
    stack[-1] += [*closed, ("", 1.0)]


def _weight(text: str) -> float:
    if text[:1] == "+":
        return float(_PLUS ** len(text))
    return float(_MINUS ** len(text)) if text[:1] == "-" else float(text or 1)


def _joined(fragments: list[Fragment]) -> tuple[Fragment, ...]:
    kept = [(text.strip(), weight) for text, weight in fragments if text.strip()]
    if heavy := [weight for _, weight in kept if weight > MAX_WEIGHT]:
        raise SpecError(f"prompt: got weight {heavy[0]:g}, expected at most {MAX_WEIGHT:g}")
    groups = groupby(kept, key=lambda fragment: fragment[1])
    return tuple((" ".join(text for text, _ in group), weight) for weight, group in groups) or (("", 1.0),)
