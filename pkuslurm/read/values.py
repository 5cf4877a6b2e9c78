"""Values from files that anybody may have written: of the right kind, or None."""

from __future__ import annotations

import math
from datetime import datetime


def unix(moment: object) -> float | None:
    """Unix time of an ISO 8601 time; None for anything else."""
    try:
        return datetime.fromisoformat(moment).timestamp() if isinstance(moment, str) else None
    except (ValueError, OverflowError, OSError):
        return None


def number(value: object) -> float | int | None:
    """A finite number; JSON has no word for others (a loss that became NaN)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer of four hundred digits
        return None


def moment(value: object) -> str | None:
    """ISO 8601 with zone: a time that lacks one is taken for this machine's."""
    if not isinstance(value, str) or unix(value) is None:
        return None
    parsed = datetime.fromisoformat(value)
    return value if parsed.tzinfo else parsed.astimezone().isoformat()


def whole(value: object) -> int | None:
    """An integer; True is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def text(value: object) -> str | None:
    """A string."""
    return value if isinstance(value, str) else None
