"""The folder of one door: its sockets, and what its engines are told. Short, private, and gone when it ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "pkuslurm-serve-"
# younger ones may be another door's that has not locked its own yet
_OLD_SECONDS = 60.0


@contextmanager
def folder() -> Iterator[Path]:
    """A new one, locked as long as this process lives; what doors that were killed have left is removed first."""
    place = _place()
    for left in Path(place).glob(f"{PREFIX}*"):
        with suppress(OSError):
            _remove_left(left)
    made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))  # 0700
    lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(lock)


def _place() -> str:
    """The node's /tmp: a socket's path has room for 107 characters, and containers know the folder."""
    return "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else tempfile.gettempdir()


def _remove_left(left: Path) -> None:
    """``left``, if it is ours and nobody's any more."""
    facts = left.lstat()
    if facts.st_uid != os.geteuid() or time.time() - facts.st_mtime < _OLD_SECONDS:
        return
    lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(left, ignore_errors=True)
    finally:
        os.close(lock)
