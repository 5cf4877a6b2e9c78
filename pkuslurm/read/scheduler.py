"""One question to Slurm for all the jobs that are looked at, however many runs they belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pkuslurm.slurm import commands
from pkuslurm.slurm.parse import ALIVE, Row


@dataclass(frozen=True)
class Asked:
    """What Slurm said. A job that is in ``missing`` is unknown to it; others without a row were not asked for.

    Those in ``forgotten`` the controller no longer knows, and accounting has told how they ended: that stays so.
    """

    rows: Mapping[str, Row] = field(default_factory=dict)
    missing: frozenset[str] = frozenset()
    forgotten: frozenset[str] = frozenset()
    problem: str = ""

    def row(self, job_id: str | None, key: str | None) -> Row | None:
        """The row of ``job_id``, if it is still ours: an id alone can be another job's by now (``key``: its name)."""
        found = self.rows.get(job_id or "")
        return found if found is not None and _plain(found.name) == _plain(key or "") else None

    def knows(self, job_id: str | None) -> bool:
        """Whether Slurm has answered about it, be it that there is no such job."""
        return job_id in self.rows or job_id in self.missing


def _plain(name: str) -> str:
    """Accounting's database often has no Chinese: it keeps a ? for each such character."""
    return re.sub(r"[^\x00-\x7f?]+|\?+", "?", name)


def ask(job_ids: Sequence[str]) -> Asked:
    """The controller first, accounting for what it has forgotten. No id: no call."""
    if not job_ids:
        return Asked()
    now = commands.queue(job_ids)
    rows, problem = dict(now.rows), now.problem
    left = [job_id for job_id in job_ids if job_id not in rows]
    missing: set[str] = set()
    if left:
        # where there is no accounting the controller's word is all there is
        then = commands.accounting(left)
        for job_id in left:  # of an array accounting tells also what the controller has told better
            row = then.rows.get(job_id)
            # one whose end accounting missed runs there for ever; the controller knows better
            if row is not None and not (now.complete and row.state in ALIVE):
                rows[job_id] = row
        if now.complete:
            missing = {job_id for job_id in left if job_id not in rows}
        problem = problem or then.problem
    forgotten = () if problem else (job_id for job_id in left if job_id in rows)
    return Asked(rows, frozenset(missing), frozenset(forgotten), problem)
