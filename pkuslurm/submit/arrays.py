"""A sweep's jobs in Slurm: an array for each kind of job and group of points; without arrays, a chain for each point.

Everything is submitted held and let go at the end, so that a refusal leaves nothing behind. What is asked for is
written down before it is asked (groups/<i>.json), and found again by its key. A limit on how many jobs one may have is
met: what fits goes with its whole chain, and the rest is told.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkuslurm.errors import PartlySubmitted, PkuslurmError
from pkuslurm.paths import command
from pkuslurm.plan.chains import Chain, after_shares
from pkuslurm.rundir import SHARED, RunDir, read_json, write_json, write_text
from pkuslurm.slurm import commands
from pkuslurm.submit import identity, slurm
from pkuslurm.submit.attempt_numbers import once_more
from pkuslurm.submit.slurm import Array, Full, Refused, Submission, hand_in
from pkuslurm.submit.sweep_queue import Living
from pkuslurm.sweepdir import SweepDir, save, share_of, unfinished
from pkuslurm.worker import marker, unpack

# of which no more than cluster.array_parallelism work at once
CAPPED = "train"
Group = dict[str, Any]
Jobs = Sequence[Mapping[str, Any]]


@dataclass
class _Sending:
    """``sweep``: what ``sweepdir.load`` gives; ours alone, and kept up to date.

    ``lanes``: jobs that must end before the next of CAPPED begin, one lane after the other. ``begun``: groups that this
    launch or retry has submitted something of.
    """

    home: SweepDir
    sweep: dict[str, Any]
    lanes: deque[list[str]]
    begun: list[Group] = field(default_factory=list)
    proved: dict[int, bool] = field(default_factory=dict)

    @property
    def arrays(self) -> bool:
        return bool(self.sweep.get("arrays", True))

    @property
    def groups(self) -> list[Group]:
        groups: list[Group] = self.sweep["groups"]
        return groups

    def number(self, group: Group) -> int:
        return next(number for number, one in enumerate(self.groups) if one is group)

    def save(self, group: Group) -> None:
        write_json(self.home.group(self.number(group)), group)


def send(home: SweepDir, sweep: dict[str, Any], wanted: Sequence[Chain], there: Sequence[Living]) -> list[Chain]:
    """Submit what an earlier launcher began, then ``wanted``, and the report after all; returns what did not fit.

    ``there``: what of the sweep waits or runs now. Raises PartlySubmitted where it can go on later (``retry``); Refused
    where Slurm will not have it, and then nothing of ``wanted`` is in the queue.
    """
    sending = _Sending(home, sweep, _lanes(sweep, there))
    todo = deque(wanted)
    left: list[Chain] = []
    try:
        for group in list(sending.groups):
            if group["members"] and not all(job.get("job_id") for job in group["jobs"].values()):
                left += _resume(sending, group)
        if todo and not sweep["jobs"]["report"].get("owed"):
            sweep["jobs"]["report"]["owed"] = True  # until it has been submitted after all that is submitted now
            save(home, sweep)
        while todo and not left:
            left = _fit(sending, todo)
        report = [] if left else _report(sending, there)
        # also of what an earlier launcher has submitted, and did not live to let go
        held = [job for group in sending.groups if unfinished(group) for job in group["jobs"].values()]
        identity.check_there([*held, *report])
        _release(sending)
    except (PkuslurmError, OSError, KeyboardInterrupt) as error:
        if isinstance(error, Refused) and _take_back(sending, sending.begun):
            raise
        points = {name for group in sending.groups for name in group["members"] if not name.startswith(SHARED)}
        raise PartlySubmitted(
            f"{home.sweep_id}: {slurm.why(error)}; of {len(sweep['points'])} points {len(points)} are submitted, the "
            f"last ones held until all are; go on with: {command('retry', home.sweep_id)}"
        ) from None
    return [*left, *todo]


def _lanes(sweep: Mapping[str, Any], there: Sequence[Living]) -> deque[list[str]]:
    """No more than array_parallelism train at once: arrays one after another, single jobs in as many lanes."""
    most = sweep.get("array_parallelism")
    if not most:
        return deque()
    lanes: list[list[str]] = [[] for _ in range(1 if sweep.get("arrays", True) else most)]
    for index, job_id in enumerate(sorted({one.whole for one in there if one.kind == CAPPED})):
        lanes[index % len(lanes)].append(job_id)
    return deque(lanes)


def _resume(sending: _Sending, group: Group) -> list[Chain]:
    """Go on with what an earlier launcher began; what is left of it where there is no room now."""
    sending.begun.append(group)
    chain = Chain(tuple(group["members"]), tuple(group["jobs"]))
    return [] if _submitted(sending, group) else [chain]


def _fit(sending: _Sending, todo: deque[Chain]) -> list[Chain]:
    """Submit the next chain, or half of it where it is too much for a limit; what is left where not one point fits."""
    chain = todo.popleft()
    if not sending.arrays and len(chain.members) > 1:
        todo.extendleft(Chain((name,), chain.kinds) for name in reversed(chain.members))
        return []
    group: Group = {
        "members": list(chain.members),
        "jobs": {kind: {} for kind in chain.kinds},
        "array": sending.arrays,
    }
    sending.groups.append(group)
    sending.begun.append(group)
    if sending.arrays:
        write_text(sending.home.table(sending.number(group)), "".join(f"{name}\n" for name in chain.members))
    sending.save(group)
    if _submitted(sending, group):
        return []
    if len(chain.members) == 1:
        return [chain]
    todo.extendleft(reversed(chain.pieces((len(chain.members) + 1) // 2)))
    return []


def _submitted(sending: _Sending, group: Group) -> bool:
    """False: it is too much for a limit, and nothing of it is in the queue."""
    lanes = deque(list(lane) for lane in sending.lanes)
    try:
        _submit(sending, group)
    except Full:
        if not _take_back(sending, [group]):
            raise
        sending.lanes = lanes
        return False
    return True


def _submit(sending: _Sending, group: Group) -> None:
    """Those of a group's jobs that have no id yet, each after the one before it."""
    runs = [RunDir(sending.home.path / name) for name in group["members"]]
    before: str | None = None
    for jobs in slurm.groups([job_file(runs[0], kind) for kind in group["jobs"]]):
        own = [job["kind"] for job in jobs]
        entries = [group["jobs"][kind] for kind in own]
        if entries[0].get("job_id"):
            before = str(entries[0]["job_id"])
            continue
        lane = sending.lanes.popleft() if sending.lanes and CAPPED in own else None
        submission = submission_of(
            key=entries[0].get("key") or _key(sending, group, jobs),
            jobs=jobs,
            before=before,
            first="" if before else _after_shares(sending, runs, jobs),
            lane=lane or (),
            array=_array(sending, group, own) if sending.arrays else None,
        )
        hand_in(submission, entries, lambda: sending.save(group))
        before = str(entries[0]["job_id"])
        if lane is not None:
            sending.lanes.append([before])


def submission_of(
    key: str, jobs: Jobs, before: str | None, first: str, lane: Sequence[str], array: Array | None
) -> Submission:
    """One sbatch of a chain. ``before``: the job before it in the chain; ``first``: what the chain's first waits for;
    ``lane``: what must have ended. Pure."""
    link = "aftercorr" if array else "afterok"
    waits = [first if before is None else f"{link}:{before}", f"afterany:{':'.join(lane)}" if lane else ""]
    return Submission(key, jobs, ",".join(filter(None, waits)), hold=before is None, array=array)


def _key(sending: _Sending, group: Group, jobs: Jobs) -> str:
    """A name that no job of the sweep has had: of arrays of a kind, and of a point's jobs, the first has no number."""
    name = "pack" if len(jobs) > 1 else jobs[0]["kind"]
    home, member = sending.home, group["members"][0]
    if sending.arrays:
        base, mark, number = f"{home.sweep_id}-{name}", "g", sending.number(group)
        taken = {job.get("key") for one in sending.groups for job in one["jobs"].values()}
    else:
        base, mark, number = f"{home.sweep_id}/{member}-{name}", "r", 1
        taken = keys_of(home.path / member, sending.sweep)
    key = base
    while key in taken:
        key, number = f"{base}-{mark}{number}", number + 1
    return key


def keys_of(path: Path, sweep: Mapping[str, Any]) -> set[str]:
    """Every name that a job of the run at ``path``, a point or a share, was submitted under."""
    run = RunDir(path)
    name = f"{SHARED}/{run.path.name}" if run.path.parent.name == SHARED else run.path.name
    entries = ((read_json(run.run_json) or {}).get("jobs") or {}).values()
    found = [entry["key"] for entry in entries if entry.get("asked")]
    found += [one.get("key") for entry in entries for one in entry.get("earlier", ())]
    for group in sweep["groups"]:
        if name in group["members"] or name in group.get("dropped", ()):
            found += [job.get("key") for job in group["jobs"].values()]
    return {str(key) for key in found if key}


def _array(sending: _Sending, group: Group, kinds: Sequence[str]) -> Array:
    most = sending.sweep.get("array_parallelism") if CAPPED in kinds else None
    return Array(sending.home.path, sending.home.table(sending.number(group)), len(group["members"]), most)


def _after_shares(sending: _Sending, runs: Sequence[RunDir], jobs: Jobs) -> str:
    """Of points whose first job is what comes after prepare: after their shares' prepare, unless that is complete."""
    if "prepare" not in jobs[0]["parents"]:
        return ""
    return after_shares([_share_id(sending, share_of(run, sending.sweep)) for run in runs])


def _share_id(sending: _Sending, number: int) -> str | None:
    """The job that prepares share ``number``; None: it is complete."""
    run = sending.home.shared(number)
    if number not in sending.proved:
        sending.proved[number] = marker.doubt(run, run.run_id, "prepare") is None
    if sending.proved[number]:
        return None
    name = f"{SHARED}/{number}"
    for group in reversed(sending.groups):
        if name in group["members"] and (job_id := group["jobs"]["prepare"].get("job_id")):
            return f"{job_id}_{group['members'].index(name)}" if group["array"] else str(job_id)
    raise PkuslurmError(f"{run.path}: its prepare was not submitted")


def _report(sending: _Sending, there: Sequence[Living]) -> list[dict[str, Any]]:
    """The sweep's own last job, after all that waits or runs; one that waits for less than that makes room. What was
    submitted."""
    entry: dict[str, Any] = sending.sweep["jobs"]["report"]
    waiting = [one.job_id for one in there if one.kind == "report" and one.member == ""]
    complete = marker.doubt(sending.home.own, sending.home.sweep_id, "report") is None
    if not sending.begun and not entry.get("owed") and (waiting or complete):
        return []
    if entry.get("job_id"):
        commands.cancel(waiting)
        entry.setdefault("earlier", []).append({name: entry.get(name) for name in ("job_id", "key", "first_attempt")})
        entry.update(job_id=None, asked=None)
        once_more(sending.home.own, "report")
    job = job_file(sending.home.own, "report")
    entry.update(first_attempt=job["first_attempt"], owed=True)
    ids = {one.whole for one in there if one.member}
    ids |= {str(job["job_id"]) for group in sending.begun for job in list(group["jobs"].values())[-1:]}
    again = len(entry.get("earlier", ()))
    key = f"{sending.home.sweep_id}-report" + (f"-r{again}" if again else "")
    after = f"afterany:{':'.join(sorted(ids))}" if ids else ""
    try:
        hand_in(Submission(key, [job], after), [entry], lambda: save(sending.home, sending.sweep))
    except Full:
        entry.update(asked=None)  # the points go on; whoever comes next owes it
        save(sending.home, sending.sweep)
        return []
    entry["owed"] = False
    save(sending.home, sending.sweep)
    return [entry]


def _release(sending: _Sending) -> None:
    """Let go whatever is held, points in their order, last of all the shares that others wait for."""
    for group in sorted(sending.groups, key=lambda one: "prepare" in one["jobs"]):
        for job in group["jobs"].values():
            if group["members"] and job.get("held") and job.get("job_id"):
                commands.release(str(job["job_id"]))
                for other in group["jobs"].values():
                    other["held"] = other.get("held") and other["job_id"] != job["job_id"]
                sending.save(group)


def _take_back(sending: _Sending, groups: Iterable[Group]) -> bool:
    """Cancel what of ``groups`` is in the queue, all of it held. Their files go: a limit is met by trying."""
    for group in reversed(list(groups)):
        if not identity.take_back(group["jobs"].values()):
            return False
        drop(sending.home, sending.sweep, group, forget=True)
        sending.begun = [one for one in sending.begun if one is not group]
    return True


def drop(home: SweepDir, sweep: Mapping[str, Any], group: Group, forget: bool = False) -> None:
    """Nothing of the group is in the queue, or ever will be. ``forget``: nor ever was, to speak of."""
    groups: list[Group] = sweep["groups"]
    number = next(number for number, one in enumerate(groups) if one is group)
    if forget and number == len(groups) - 1:
        groups.pop()
        home.group(number).unlink(missing_ok=True)
        home.table(number).unlink(missing_ok=True)
    else:
        group["dropped"], group["members"] = group["members"], []
        write_json(home.group(number), group)


def job_file(run: RunDir, kind: str) -> dict[str, Any]:
    """The job file, also of a point that has not begun yet. Raises PkuslurmError."""
    job = read_json(run.job(kind))
    if job is None and run.is_point:
        job = json.loads(unpack.texts(run).get(f"jobs/{kind}.json", "null"))
    if job is None:
        raise PkuslurmError(f"{run.job(kind)}: it cannot be read")
    return dict(job)
