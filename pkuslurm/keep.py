"""sweep.keep_merged: which points of a sweep keep their merged model; the others' can be made again.

They go in prune's way: recorded first, so that a point stays COMPLETED, and only from complete runs of this user's own.
"""

from __future__ import annotations

from pathlib import Path

from pkuslurm import prune
from pkuslurm.errors import PkuslurmError
from pkuslurm.read import pruned, values
from pkuslurm.read.report import leaderboard
from pkuslurm.read.report.leaderboard import Row, best
from pkuslurm.read.sweep import SweepStatus
from pkuslurm.read.text import size
from pkuslurm.rundir import RunDir

__all__ = ["best", "best_folder", "keep_merged"]
MOST_REASONS = 3


def keep_merged(now: SweepStatus) -> list[str]:
    """Remove what sweep.keep_merged does not keep; says what was done, and what was not and why. Raises nothing."""
    which = values.text(now.document.get("keep_merged"))
    if which not in ("best", "none"):
        return []
    if waiting := sum(run.state in ("RUNNING", "PENDING") for run in now.runs):
        return [f"sweep.keep_merged={which}: {_points(waiting)} still to end; until then all merged models are kept"]
    found = leaderboard.board(now)
    first = best(found.rows)
    # with none to rank by, the models are all that there is to compare
    if first is None:
        note = found.note
        why = "no point is complete" if note is None else note[1]
        return [f"sweep.keep_merged={which}: {why}; all merged models are kept"]
    kept = first if which == "best" else None
    going = [row.path for row in found.rows if row is not kept and _removable(row)]
    items, refused = prune.of_merged(going)
    failed = prune.remove(items)
    gone = [item for item in items if item.path not in failed]
    told = []
    if gone:
        freed = size(sum(item.frees for item in gone))
        rest = "" if kept is None else f"; kept: {_name(kept)}"
        told.append(
            f"sweep.keep_merged={which}: {len(gone)} merged model{'s' * (len(gone) != 1)} removed ({freed}){rest}; "
            f"`pkuslurm merge {now.sweep_id}/<n>` makes one again"
        )
    reasons = [f"{RunDir(path).run_id}: {refused[path]}" for path in going if path in refused]
    reasons += [f"{path}: {why}" for path, why in failed.items()]
    if reasons:
        more = f" and {len(reasons) - MOST_REASONS} more" if len(reasons) > MOST_REASONS else ""
        told.append(f"sweep.keep_merged={which}: not removed: {'; '.join(reasons[:MOST_REASONS])}{more}")
    return told


def best_folder(now: SweepStatus) -> Path:
    """The merged folder of the best point. Raises PkuslurmError, in words, where there is none."""
    found = leaderboard.board(now)
    first = best(found.rows)
    if first is not None:
        return leaderboard.merged(first)
    complete = sum(row.state == "COMPLETED" for row in found.rows)
    if complete == 0:
        raise PkuslurmError(f"{now.sweep_id}: none of its {_points(len(found.rows))} is complete, so none is the best")
    why = found.note[1] if found.note else f"no complete point has a finite {found.metric}"
    raise PkuslurmError(f"{now.sweep_id}: {why}")


def _removable(row: Row) -> bool:
    run = RunDir(row.path)
    # what somebody has made again since it was removed, they want
    return row.state == "COMPLETED" and run.merged.is_dir() and "merged" not in pruned.read(run)


def _points(count: int) -> str:
    return f"{count} point{'s' * (count != 1)}"


def _name(row: Row) -> str:
    return f"{RunDir(row.path).run_id} ({row.label})"
