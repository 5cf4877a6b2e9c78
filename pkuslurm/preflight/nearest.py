"""Of a path that is not there: how far it goes, and what lies there instead. Reads only."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path


def nearest_to(path: Path) -> str:
    """``; …`` for the end of a message: the first part that is missing, and the nearest name beside it; "" if neither.

    ``path`` is absolute.
    """
    with suppress(OSError):  # a folder that is not ours to look into
        missing = path
        while not missing.parent.exists():
            missing = missing.parent
        # at the root, nothing is told: the whole path is another machine's
        if missing.parent != missing.parent.parent and not path.exists():
            near = difflib.get_close_matches(missing.name, [other.name for other in missing.parent.iterdir()], 1, 0.75)
            first = "" if missing == path else f"; {missing} is missing already"
            return first + (f"; did you mean {near[0]}?" if near else "")
    return ""


def existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there. ``path`` is absolute."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
