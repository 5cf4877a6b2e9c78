"""Ends the tree of a worker that was itself killed -9, so that no rank goes on holding a device.

The ranks of a killed worker belong to init and cannot be found as anybody's descendants. A second process, started
as ``python -I guard.py TOKEN``, waits at a pipe that closes when the worker is gone, and then kills whatever has the
tree's token in its environment.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

VARIABLE = "PKUSLURM_TREE"


class Guard:
    """The worker's side. A guard that cannot be started is done without."""

    def __init__(self, token: str) -> None:
        # nothing of the worker's environment: the guard must not look like a part of the tree
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        self.popen: subprocess.Popen[bytes] | None = None
        with suppress(OSError):
            self.popen = subprocess.Popen(
                [sys.executable, "-I", __file__, token],
                env=kept,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def pid(self) -> int | None:
        return self.popen.pid if self.popen else None

    def dismiss(self) -> None:
        """Close the pipe; the guard finds nothing to do and goes."""
        if self.popen is not None and self.popen.stdin is not None:
            self.popen.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(timeout=2)


def _members(mark: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _guard(token: str) -> None:
    # whoever ends the step ends the worker too; only the worker's own end counts
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    while sys.stdin.buffer.read(1):
        pass
    deadline = time.monotonic() + 10
    while (pids := _members(f"{VARIABLE}={token}".encode())) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    _guard(sys.argv[1])
