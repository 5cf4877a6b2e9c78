"""Values as typed, in Hydra's grammar: what it refuses is quoted, what it accepts keeps its meaning."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

_OPENING, _CLOSING = "([{", ")]}"


def quoted_where_needed(value: str, mapping: bool = False) -> str:
    """``value`` so that Hydra reads it: whole, or the elements of a plain ``[a,b]`` (of ``{a: b}``: ``mapping``)."""
    if parsed(value) is not None:
        return value
    if value.startswith("[") and value.endswith("]"):
        elements = _elements(value[1:-1])
        if elements is not None:
            listed = "[" + ",".join(_part(item) for item in elements) + "]"
            if parsed(listed) is not None:
                return listed
    if mapping and value.startswith("{") and value.endswith("}"):
        pairs = [item.partition(":") for item in _elements(value[1:-1]) or []]
        listed = "{" + ",".join(f"{_part(key)}:{_part(item)}" for key, _, item in pairs) + "}"
        if pairs and all(colon for _, colon, _ in pairs) and parsed(listed) is not None:
            return listed
    return quote(value)


def _part(text: str) -> str:
    bare = text.strip()
    return bare if _is_element(bare) else quote(bare)


def quote(value: str) -> str:
    """In single quotes by Hydra's rules: a quote is escaped, and so are the backslashes before one."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"'{escaped}'"


@lru_cache(4096)
def parsed(value: str) -> Any:
    """Hydra's override ``key=value``, or None where its grammar refuses the value."""
    try:
        return OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return None


def number_of(value: str) -> int | float | None:
    """The number that Hydra takes an unquoted ``value`` for."""
    override = parsed(value)
    read = override.value() if override is not None and not override.is_sweep_override() else None
    if isinstance(read, bool | QuotedString) or not isinstance(read, int | float):
        return None
    return read


def _is_element(item: str) -> bool:
    override = parsed(f"[{item}]")
    return override is not None and len(override.value()) == 1


def _elements(inside: str) -> list[str] | None:
    """The elements between the brackets: split at commas outside quotes and brackets; None where it is no list."""
    elements, open_at_end, closed_early = split(inside)
    if closed_early:
        return None  # [a-z]+[0-9]: the first bracket was closed before the last
    if open_at_end:
        elements = [item.strip() for item in inside.split(",")]
    if not elements[-1]:
        elements.pop()
    # a comma that is escaped is text: Hydra reads it so where it reads the element at all
    return [item if item[:1] in "'\"" or _is_element(item) else item.replace("\\,", ",") for item in elements]


def split(text: str) -> tuple[list[str], bool, bool]:
    """``text`` at its commas outside quotes and brackets; whether one is left open; whether a ] closes none."""
    parts, start, quoted, depth, closed_early = [], 0, "", 0, False
    for at, char in enumerate(text):
        if quoted:
            if char == quoted and not _escaped(text, at):
                quoted = ""
        elif char in "'\"" and _opens(text[start:at], depth) and _closes(text, at, depth):
            quoted = char
        elif char in _OPENING:
            depth += 1
        elif char in _CLOSING:
            closed_early = closed_early or (char == "]" and depth == 0)
            depth = max(0, depth - 1)
        elif char == "," and depth == 0 and not _escaped(text, at):
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()], depth > 0, closed_early


def _opens(before: str, depth: int) -> bool:
    """Whether a quote begins an element, or one of a list within."""
    return not before.strip() or (depth > 0 and before.rstrip()[-1] in ",:([{")


def _closes(text: str, at: int, depth: int) -> bool:
    """Whether a quote that opens an element also ends it: '90s music is text."""
    end = r"[],:)}]|$" if depth else ",|$"
    return re.match(rf"(?:\\.|[^\\])*?(?<!\\){text[at]}\s*({end})", text[at + 1 :], re.DOTALL) is not None


def _escaped(text: str, at: int) -> bool:
    before = text[:at]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1
