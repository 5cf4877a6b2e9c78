"""What of a sweep is to be submitted, once more or for the first time: all that is not complete, nor in the queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.plan.chains import Chain, asks, chains
from pkuslurm.read.proof import open_kinds
from pkuslurm.read.still_open import open_of, open_points, open_shares
from pkuslurm.rundir import SHARED, RunDir, read_json, write_json
from pkuslurm.slurm import commands
from pkuslurm.submit import owner, queue, slurm
from pkuslurm.submit.arrays import drop, job_file
from pkuslurm.submit.attempt_numbers import next_attempt, renumber
from pkuslurm.submit.sweep_queue import Living, apart, living
from pkuslurm.sweepdir import SweepDir, document, share_of, unfinished
from pkuslurm.worker import marker
from pkuslurm.worker.unpack import unpack


def settle(home: SweepDir, sweep: Mapping[str, Any], there: Sequence[Living], again: bool = True) -> list[Living]:
    """See to what a launcher left half done, or Slurm has lost: what cannot go on is taken away, points that were being
    submitted by themselves are submitted. What waits or runs then. Raises PkuslurmError.

    ``again``: for who retries, not for who feeds the rest in: what is held for another reason is let go, too, and what
    waits for a job that is no more is taken away.
    """
    half = {str(job.get("job_id")) for group in sweep["groups"] if unfinished(group) for job in group["jobs"].values()}
    stopped = _groups(home, sweep, there)
    alone = [own for run in apart(home, sweep) if (own := _alone(run, sweep, again)) is not None]
    for own in alone:
        half |= own.ids
        stopped |= own.stopped
    if alone:
        there = living(home, sweep)  # with what was submitted just now
    there = [one for one in there if one.whole not in stopped]
    if not again:
        return there
    # let go before, and the controller forgot that; or a bad node has sent it back. A whole array takes one call
    for whole in dict.fromkeys(one.whole for one in there if one.row.held and one.whole not in half):
        commands.release(whole)
    lost = {one.job_id for one in _orphans(home, sweep, there)}
    commands.cancel(sorted(lost))
    return [one for one in there if one.job_id not in lost]


def _groups(home: SweepDir, sweep: Mapping[str, Any], there: Sequence[Living]) -> set[str]:
    """Give up groups that were never let go and of which a job is no more; the ids of what was cancelled for that."""
    known: dict[tuple[str, str, str], list[Living]] = {}
    for one in there:
        known.setdefault((one.kind, one.whole, one.row.name), []).append(one)
    stopped: set[str] = set()
    for number, group in enumerate(sweep["groups"]):
        sent = {kind: (str(job["job_id"]), str(job["key"])) for kind, job in group["jobs"].items() if job.get("job_id")}
        if not unfinished(group) or not sent:
            continue  # of one without an id sbatch may never have been asked: send does it now, under its key
        rows = [known.get((kind, *one), []) for kind, one in sent.items()]
        if all(rows):
            continue
        rest = [one for found in rows for one in found]
        all_sent = len(sent) == len(group["jobs"])
        if rest and (any(one.row.state != "PENDING" for one in rest) or _began(home, group)):
            if not all_sent:
                continue
            rest = []  # it was let go: its launcher did not live to say so
        for job in group["jobs"].values():
            job["held"] = False
        ids = {one.whole for one in rest}
        commands.cancel(sorted(ids))
        stopped |= ids
        if rest or not all_sent:
            drop(home, sweep, group)
        else:
            write_json(home.group(number), group)
    return stopped


def _began(home: SweepDir, group: Mapping[str, Any]) -> bool:
    """Whether the first job of the group, which is held until all are submitted, has been at work."""
    kind = next(iter(group["jobs"]))
    for name in group["members"]:
        run = RunDir(home.path / name)
        attempt = (read_json(run.state(kind)) or {}).get("attempt")
        if isinstance(attempt, int) and attempt >= int(job_file(run, kind).get("first_attempt") or 1):
            return True
    return False


@dataclass(frozen=True)
class _Own:
    """A point's own jobs: all ids, and those that were cancelled."""

    ids: set[str]
    stopped: set[str]


def _alone(run: RunDir, sweep: Mapping[str, Any], again: bool) -> _Own | None:
    """Go on with a point that was being submitted by itself; None: it is not half done. Where one of its jobs is no
    more, the others go, too, and the point is open as any other."""
    value = document(run, sweep)
    entries = {} if value is None else {kind: one for kind, one in value["jobs"].items() if one.get("group") is None}
    if value is None or not any(
        (one.get("asked") and not one.get("job_id")) or one.get("held") for one in entries.values()
    ):
        return None
    queue.adopt(value)
    rows = {kind: row for kind, row in queue.there(value).items() if kind in entries}
    for kind, entry in entries.items():
        # a launcher that was killed after it had let it go did not live to say so
        entry["held"] = kind in rows and (bool(entry.get("held")) or (again and rows[kind].held))
    ids = {str(entry["job_id"]) for entry in entries.values() if entry.get("job_id")}
    kinds = [kind for kind in open_kinds(run, entries) if kind != "prepare"]
    if all(kind in rows or not entries[kind].get("job_id") for kind in kinds):
        slurm.send(run, value, kinds)
        return _Own(ids, set())
    waiting = [row.job_id for row in rows.values() if row.state == "PENDING"]
    stopped = set(waiting) if again and len(waiting) == len(rows) else set()
    commands.cancel(sorted(stopped))
    write_json(run.run_json, value)
    return _Own(ids, stopped)


def _orphans(home: SweepDir, sweep: Mapping[str, Any], there: Sequence[Living]) -> list[Living]:
    """What waits for a job of its own point that is no more: ``kill-on-invalid-dep`` is not everywhere obeyed, and what
    Slurm has lost it knows nothing of."""
    own: dict[str, dict[str, Living]] = {}
    for one in there:
        own.setdefault(one.member, {})[one.kind] = one
    half = {name for group in sweep["groups"] if unfinished(group) for name in group["members"]}
    proved: dict[int, bool] = {}
    found: list[Living] = []
    for point in sweep["points"]:
        run = home.point(point["n"])
        jobs = own.get(run.path.name, {})
        if run.path.name in half or not any(one.row.state == "PENDING" for one in jobs.values()):
            continue
        number = share_of(run, sweep)
        shared = own.get(f"{SHARED}/{number}", {})
        if not shared and number not in proved:
            share = home.shared(number)
            proved[number] = marker.doubt(share, share.run_id, "prepare") is None
        prepared = bool(shared) or proved[number]
        places = sweep["where"].get(run.path.name)
        if prepared and places and not point.get("apart") and {*sweep["groups"][places[-1][0]]["jobs"]} <= {*jobs}:
            continue  # all of it is there: a thousand such points need not be read
        entries = (document(run, sweep) or {"jobs": {}})["jobs"]
        kinds = [kind for kind in (*([] if prepared else ["prepare"]), *open_of(run)) if kind in entries]
        rows = {kind: one.row for kind, one in (shared | jobs).items()}
        found += [jobs[kind] for kind in queue.orphans(entries, kinds, rows)]
    return found


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
    value, known = owner.described(run), owner.whole(run, document(run, sweep))
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
