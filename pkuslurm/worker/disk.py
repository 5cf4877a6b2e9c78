"""Whether a run's disk takes anything more: asked after a failure, for many programs do not say that it was that."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# what filled a disk or a quota may have left some bytes of it
_TRIED = 1 << 20


def lack(folder: Path) -> str | None:
    """``<folder>: No space left on device``, or another such reason; None: there is room.

    By trying, since no number tells a quota.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIED))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    return None
