"""A run's description, to be changed by one command at a time: submit, retry, merge, infer and cancel all write it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import RunDir, read_json
from pkuslurm.submit.lock import lock
from pkuslurm.submit.owner import check_owner, whole
from pkuslurm.sweepdir import SweepDir, is_sweep, load, sweep_of
from pkuslurm.sweepdir import document as read_document


@contextlib.contextmanager
def alone(run: RunDir) -> Iterator[dict[str, Any]]:
    """run.json, read once the run is ours: two submissions at once would both send its jobs, or lose each other's ids.

    A sweep's directory gives what ``sweepdir.load`` does; a point is ours only with its whole sweep. Raises
    PkuslurmError where another command has it, or where it cannot be read or written.
    """
    check_owner(run)
    sweep = sweep_of(run) or SweepDir(run.path)
    try:
        handle = os.open(sweep.own.submitting, os.O_WRONLY | os.O_CREAT, 0o600)
    except OSError as error:
        raise PkuslurmError(f"{run.path}: {error.strerror or error}") from None
    try:
        if not lock(handle):  # where there are no locks, run.json's keys still find what was sent
            raise PkuslurmError(
                f"{run.run_id}: another command is submitting or cancelling it just now; wait until that one has ended"
            )
        yield whole(run, load(sweep, strict=True) if is_sweep(run.path) else read_document(run))
    finally:
        os.close(handle)


def check_place(run: RunDir) -> None:
    """Raise PkuslurmError where the directory was moved, or copied: its jobs' files name the other place, and would go
    on there."""
    if (other := _written_for(run)) is not None:
        check_original(run)
        raise PkuslurmError(
            f"{run.run_id}: it was moved here from {other}, which its jobs' files and YAMLs name; move it back, "
            "or launch anew"
        )


def check_original(run: RunDir) -> None:
    """Raise PkuslurmError for a copy: the jobs, and the launcher, that it names are those of the run itself."""
    other = _written_for(run)
    if other is None:
        return
    same = SweepDir(other).sweep_json if is_sweep(run.path) else RunDir(other).run_json
    there = False
    with contextlib.suppress(OSError):  # another user's, which this one does not see
        there = same.is_file()
    if there:
        raise PkuslurmError(f"{run.run_id}: it is a copy of {other}, whose jobs it names; name that one")


def _written_for(run: RunDir) -> Path | None:
    """The other place that its jobs' files name, if there is one."""
    for file in sorted(run.path.glob("jobs/*.json")):
        written = (read_json(file) or {}).get("run_dir")
        if not isinstance(written, str):
            continue
        with contextlib.suppress(OSError, ValueError):
            if Path(written).samefile(run.path):
                continue
        return Path(written)
    return None
