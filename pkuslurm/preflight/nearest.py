"""Of a path that is not there: how far it goes, and what lies there instead. Reads only."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path


def nearest_to(path: Path, typed: str | None = None) -> str:
    """``; …`` for the end of a message: the first part that is missing, and the nearest name beside it; "" if neither.

    ``path`` is absolute; the name is said as it continues ``typed``, where that is given.
    """
    with suppress(OSError):  # a folder that is not ours to look into
        missing = path
        while not missing.parent.exists():
            missing = missing.parent
        # at the root, nothing is told: the whole path is another machine's
        if missing.parent != missing.parent.parent and not path.exists():
            first = "" if missing == path else f"; {missing} is missing already"
            near = difflib.get_close_matches(missing.name, [other.name for other in missing.parent.iterdir()], 1, 0.75)
            if not near:
                return first
            above = list(Path(typed or near[0]).parents)[len(path.parts) - len(missing.parts) :]
            return f"{first}; did you mean {above[0] / near[0] if above else near[0]}?"
    return ""


def existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there. ``path`` is absolute."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
