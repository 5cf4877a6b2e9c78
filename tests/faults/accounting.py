"""By accounting, which lags, and which no file of a run has a part in: which jobs there were under which key."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tests.cluster.fixture import Cluster

USER = "pkalice"


def accounted(slurm: Cluster, runs: Sequence[str], begun: bool = False) -> dict[str, set[str]]:
    """The job ids of each key of ``runs`` (their names). ``begun``: of those that have ever begun."""
    for _ in range(30):
        told = slurm.ask("sacct", "-X", "-P", "-n", "-D", "-u", USER, "-o", "JobName,JobID,State,NodeList").splitlines()
        rows = [row.split("|") for row in told if row.startswith(tuple(runs))]
        if begun:
            rows = [row for row in rows if row[3] not in ("None assigned", "")]
        going = [row for row in rows if row[2] in ("PENDING", "RUNNING")]
        if not going:
            break
        time.sleep(1)
    else:
        raise AssertionError(f"accounting has jobs that go on: {going}")
    ids: dict[str, set[str]] = {}
    for key, number, *_ in rows:
        ids.setdefault(key, set()).add(number)
    return ids
