"""The kernel's lock on an open file, whatever the disk on which it lies."""

from __future__ import annotations

import fcntl
import time

POLL_SECONDS = 0.1


def lock(handle: int, seconds: float = 0.0) -> bool:
    """Whether this process has it, at the latest after ``seconds``; it goes when ``handle`` is closed.

    On a shared disk without locks everybody has it: what must never happen twice needs more than this.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        except OSError:
            return True
        else:
            return True
