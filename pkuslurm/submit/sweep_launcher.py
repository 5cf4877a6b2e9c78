"""Who runs a sweep on this machine: told in sweep.json, one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import read_json, write_json
from pkuslurm.submit.local import Cancel
from pkuslurm.submit.lock import lock
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
    handle = os.open(sweep.own.submitting, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        if not lock(handle, LOCK_SECONDS):
            raise PkuslurmError(
                f"{sweep.sweep_id}: another command is changing it just now; wait until that one has ended"
            )
        document = read_json(sweep.sweep_json)
        if document is None:
            raise PkuslurmError(f"{sweep.sweep_json}: it cannot be read as a sweep's description")
        yield document
        write_json(sweep.sweep_json, document)
    finally:
        os.close(handle)
