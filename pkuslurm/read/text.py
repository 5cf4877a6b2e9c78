"""Text from models, data and logs, made harmless and measured in terminal columns."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from datetime import datetime

# Control (Cc), direction and invisible (Cf), lone surrogates (Cs), line and paragraph separators.
_UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")


def unsafe(character: str) -> bool:
    """Whether a terminal or a page would obey ``character`` or hide it instead of showing it."""
    return unicodedata.category(character) in _UNSAFE


def escaped(character: str) -> str:
    """``character`` as Python writes it: ``\\x1b``, ``\\u202e``."""
    return character.encode("unicode_escape").decode("ascii")


def safe(text: object, keep: str = "") -> str:
    """``text`` with control and direction characters shown instead of obeyed (a model may print escape sequences)."""
    # nearly all lines of a log are harmless as a whole, and asking for each character takes long
    return "".join(
        line if line.isprintable() else "".join(_shown(character, keep) for character in line)
        for line in re.split("(\n)", str(text))
    )


def _shown(character: str, keep: str) -> str:
    return escaped(character) if character not in keep and unsafe(character) else character


def width(text: str) -> int:
    """Columns of ``text`` on a terminal: Chinese takes two a character, a combining mark none."""
    if text.isascii():
        return len(text)
    return sum(
        0
        if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf")
        else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )


def aligned(rows: Sequence[Sequence[str]], gap: int = 2) -> list[str]:
    """One line a row, columns under each other; nothing is wrapped or cut, no line ends in spaces."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (cell + " " * (size - width(cell) + gap) for cell, size in zip(row, widths, strict=True))
        lines.append("".join(cells).rstrip())
    return lines


def duration(seconds: float) -> str:
    """``12 s``, ``3 min 05 s``, ``2 h 04 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def between(started: str | None, finished: str | None) -> float | None:
    """Seconds from one ISO time to the other (now, where it has not ended); None where it never began."""
    try:
        begin = datetime.fromisoformat(started or "")
        end = datetime.fromisoformat(finished) if finished else datetime.now().astimezone()
        return (end - begin).total_seconds()
    except (ValueError, TypeError):
        return None


def size(count: float) -> str:
    """``512 B``, ``1.5 KiB``, ``3.1 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
