"""By accounting, which lags, and which no file of a run has a part in: which jobs there were under which key."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from tests.cluster.fixture import Cluster

USER = "pkalice"


def accounted(slurm: Cluster, runs: Sequence[str]) -> dict[str, set[str]]:
    """The job ids of each key of ``runs`` (their names)."""
    for _ in range(30):
        rows = _rows(slurm, runs)
        going = [row for row in rows if row[2] in ("PENDING", "RUNNING")]
        if not going:
            return _ids(rows)
        time.sleep(1)
    raise AssertionError(f"accounting has jobs that go on: {going}")


def completed(slurm: Cluster, runs: Sequence[str], wanted: int) -> dict[str, set[str]]:
    """Those that did their work, whichever try (``-r2``) it was; once there are ``wanted`` keys, or in half a minute.

    Of a controller that is killed accounting does not hear all, and what that one has forgotten stays PENDING there.
    """
    found: dict[str, set[str]] = {}
    for _ in range(30):
        rows = [
            [re.sub(r"-r\d+$", "", key), number] for key, number, state in _rows(slurm, runs) if state == "COMPLETED"
        ]
        if len(found := _ids(rows)) >= wanted:
            break
        time.sleep(1)
    return found


def _rows(slurm: Cluster, runs: Sequence[str]) -> list[list[str]]:
    told = slurm.ask("sacct", "-X", "-P", "-n", "-D", "-u", USER, "-o", "JobName,JobID,State").splitlines()
    return [row.split("|") for row in told if row.startswith(tuple(runs))]


def _ids(rows: Sequence[Sequence[str]]) -> dict[str, set[str]]:
    ids: dict[str, set[str]] = {}
    for key, number, *_ in rows:
        ids.setdefault(key, set()).add(number)
    return ids
