"""Who runs a sweep on this machine: told in sweep.json, one process at a time."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import read_json, write_json
from pkuslurm.submit.local import POLL_SECONDS, Cancel
from pkuslurm.submit.owner import claim
from pkuslurm.sweepdir import SweepDir
from pkuslurm.worker.state import now

# Another command has sweep.json for as long as it takes to write it.
LOCK_SECONDS = 10.0


@contextmanager
def launching(sweep: SweepDir, cancel: Cancel) -> Iterator[Mapping[str, Any]]:
    """sweep.json, which says until the end that this process runs the sweep; refused where somebody else does.

    Where it ends because it was ``cancel``led, it says that too.
    """
    with _changing(sweep) as document:
        document["launcher"] = claim(sweep.own, document)
        document["cancelled"] = None
    try:
        yield document
    finally:
        with _changing(sweep) as ended:
            ended["launcher"] = None
            if cancel.number is not None:
                ended["cancelled"] = now()


@contextmanager
def _changing(sweep: SweepDir) -> Iterator[dict[str, Any]]:
    """sweep.json, read and written under the lock that submissions take."""
    handle = os.open(sweep.path / ".submitting", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        _lock(handle, sweep)
        document = read_json(sweep.sweep_json)
        if document is None:
            raise PkuslurmError(f"{sweep.sweep_json}: it cannot be read as a sweep's description")
        yield document
        write_json(sweep.sweep_json, document)
    finally:
        os.close(handle)


def _lock(handle: int, sweep: SweepDir) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise PkuslurmError(
                    f"{sweep.sweep_id}: another command is changing it just now; wait until that one has ended"
                ) from None
        except OSError:
            return None  # a shared disk without locks
        time.sleep(POLL_SECONDS)
