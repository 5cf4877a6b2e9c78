"""What was installed where each job ran, as its nodes told: kept in run.json, once nothing else writes it."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import RunDir, read_json, write_json
from pkuslurm.submit.alone import alone
from pkuslurm.submit.local import with_versions


def keep(whole: RunDir, runs: Iterable[RunDir]) -> None:
    """jobs.<kind>.versions in run.json of ``runs`` (``whole``, or the points of that sweep), from their state files.

    For the last job, when the others have ended. Where another command has the run just now it is said, and not done:
    the state files have it.
    """
    try:
        with alone(whole):
            for run in runs:
                document = read_json(run.run_json)
                if document is not None:
                    with_versions(run, document)
                    write_json(run.run_json, document)
    except PkuslurmError as error:
        print(f"versions are not in run.json: {error}", file=sys.stderr)
