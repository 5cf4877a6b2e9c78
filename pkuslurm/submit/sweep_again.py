"""What of a sweep is to be submitted, once more or for the first time: all that is not complete, nor in the queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.plan.chains import Chain, asks, chains
from pkuslurm.read.proof import open_kinds
from pkuslurm.read.still_open import open_points, open_shares
from pkuslurm.rundir import SHARED, RunDir, read_json, write_json
from pkuslurm.slurm import commands
from pkuslurm.submit import queue, slurm
from pkuslurm.submit.arrays import drop, job_file
from pkuslurm.submit.attempt_numbers import next_attempt, renumber
from pkuslurm.submit.sweep_queue import Living, apart
from pkuslurm.sweepdir import SweepDir, document, unfinished
from pkuslurm.worker.unpack import unpack


def settle(home: SweepDir, sweep: Mapping[str, Any], there: Sequence[Living]) -> None:
    """See to what a launcher left half done: a group that was cancelled meanwhile is given up, points that were being
    submitted by themselves are submitted. Raises PkuslurmError."""
    living = {one.whole for one in there}
    begun = [job for group in sweep["groups"] if unfinished(group) for job in group["jobs"].values()]
    for one in there:
        # let go before, and the controller forgot that; or a bad node has sent it back
        if one.held and one.whole not in {str(job.get("job_id")) for job in begun}:
            commands.release(one.job_id)
    for group in sweep["groups"]:
        ids = {str(job["job_id"]) for job in group["jobs"].values() if job.get("job_id")}
        if not unfinished(group) or not ids or ids & living:
            continue  # of one without an id sbatch may never have been asked: send does it now, under its key
        if len(ids) < len(group["jobs"]):
            drop(home, sweep, group)
        for job in group["jobs"].values():
            job["held"] = False
    for run in apart(home, sweep):
        value = document(run, sweep)
        entries = {} if value is None else {k: v for k, v in value["jobs"].items() if v.get("group") is None}
        if value is not None and any(
            (one.get("asked") and not one.get("job_id")) or one.get("held") for one in entries.values()
        ):
            queue.adopt(value)
            slurm.send(run, value, [kind for kind in open_kinds(run, entries) if kind != "prepare"])


def wanted(home: SweepDir, sweep: Mapping[str, Any], there: Sequence[Living], fresh: bool = False) -> list[Chain]:
    """Chains of all that is open, shares first; jobs that had been submitted before get their next attempt.

    Left out is what waits or runs (``there``), and what a launcher had begun to submit. ``fresh``: only what was never
    submitted, nor cancelled. Raises PkuslurmError, OSError.
    """
    busy = {one.member for one in there}
    busy |= {name for group in sweep["groups"] if unfinished(group) for name in group["members"]}
    known = {member for group in sweep["groups"] for member in group["members"]}
    known |= {run.path.name for run in apart(home, sweep)}
    left_out = busy | known if fresh else busy
    most = most_elements(bool(sweep.get("arrays", True)))
    points = {number: kinds for number, kinds in open_points(home, sweep).items() if str(number) not in left_out}
    if fresh:
        cancelled = {n for n in points if (read_json(home.point(n).run_json) or {}).get("cancelled")}
        points = {n: kinds for n, kinds in points.items() if n not in cancelled}
    shares = [name for number in open_shares(home, sweep) if (name := f"{SHARED}/{number}") not in left_out]
    for name in shares:
        renew(home, sweep, RunDir(home.path / name), ["prepare"])
    members = {}
    for number, kinds in points.items():
        run = home.point(number)
        renew(home, sweep, run, kinds)
        members[str(number)] = (tuple(kinds), asks([job_file(run, kind) for kind in kinds]))
    return [*chains(dict.fromkeys(shares, (("prepare",), "")), most), *chains(members, most)]


def most_elements(arrays: bool) -> int:
    """How many points go into one chain. Raises PkuslurmError where the cluster takes no arrays, or does not answer."""
    if not arrays:
        return 1
    most = commands.most_elements()
    if most is None:
        raise queue.silent("scontrol show config")
    if most < 2:
        raise PkuslurmError("cluster.arrays=true: this cluster takes no job arrays; write cluster.arrays=false")
    return most


def renew(home: SweepDir, sweep: Mapping[str, Any], run: RunDir, kinds: Sequence[str]) -> None:
    """The next attempt of each of ``kinds`` that has had one, in run.json and in its job file."""
    value, known = read_json(run.run_json), document(run, sweep)
    if value is None or known is None:
        raise PkuslurmError(f"{run.run_json}: it cannot be read as a run's description")
    again = [kind for kind in kinds if known["jobs"][kind].get("job_id") or known["jobs"][kind].get("asked")]
    if again and run.is_point:
        unpack(run)
    for kind in again:
        before, entry = known["jobs"][kind], value["jobs"][kind]
        # nothing is lost: also the ids of what went before
        entry.setdefault("earlier", []).append({name: before.get(name) for name in ("job_id", "key", "first_attempt")})
        attempt = next_attempt(run, kind)
        entry.update(first_attempt=attempt, job_id=None, asked=None, held=False)
        renumber(run, kind, attempt, str(job_file(run, kind)["key"]))
    if again or value.get("cancelled"):
        write_json(run.run_json, value | {"cancelled": None})
