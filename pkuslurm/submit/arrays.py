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
from typing import Any

from pkuslurm.errors import PartlySubmitted, PkuslurmError
from pkuslurm.plan.chains import Chain, after_shares
from pkuslurm.rundir import SHARED, RunDir, read_json, write_json, write_text
from pkuslurm.slurm import commands
from pkuslurm.submit import slurm
from pkuslurm.submit.attempt_numbers import once_more
from pkuslurm.submit.slurm import Array, Full, Refused, Submission, hand_in
from pkuslurm.submit.sweep_queue import Living, save
from pkuslurm.sweepdir import SweepDir, share_of
from pkuslurm.worker import marker, unpack

# of which no more than cluster.array_parallelism work at once
CAPPED = "train"
Group = dict[str, Any]


@dataclass
class _Sending:
    """``sweep``: what ``sweepdir.load`` gives; ours alone, and kept up to date.

    ``lanes``: jobs that must end before the next of CAPPED begin, one lane after the other. ``begun``: groups of this
    launch or retry.
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

    def save(self, group: Group) -> None:
        write_json(self.home.group(self.groups.index(group)), group)


def send(home: SweepDir, sweep: dict[str, Any], wanted: Sequence[Chain], there: Sequence[Living]) -> list[Chain]:
    """Submit what an earlier launcher began, then ``wanted``, and the report after all; returns what did not fit.

    ``there``: what of the sweep waits or runs now. Raises PartlySubmitted where it can go on later (``retry``); Refused
    where Slurm will not have it, and then nothing of ``wanted`` is in the queue.
    """
    sending = _Sending(home, sweep, _lanes(sweep, there))
    left: list[Chain] = []
    try:
        for group in sending.groups:
            if group["members"] and not all(job.get("job_id") for job in group["jobs"].values()):
                _submit(sending, group)
        todo = deque(wanted)
        while todo and not left:
            left = _fit(sending, todo)
        if not left:
            _report(sending, there)
        _release(sending)
    except (PkuslurmError, OSError, KeyboardInterrupt) as error:
        if isinstance(error, Refused) and _take_back(sending, sending.begun):
            raise
        points = sum(len(group["members"]) for group in sending.groups if CAPPED in group["jobs"])
        raise PartlySubmitted(
            f"{home.sweep_id}: {slurm.why(error)}; of {len(sweep['points'])} points {points} were submitted, "
            f"and are held until all are; go on with: pkuslurm retry {home.sweep_id}"
        ) from None
    return left


def _lanes(sweep: Mapping[str, Any], there: Sequence[Living]) -> deque[list[str]]:
    """No more than array_parallelism train at once: arrays one after another, single jobs in as many lanes."""
    most = sweep.get("array_parallelism")
    if not most:
        return deque()
    lanes: list[list[str]] = [[] for _ in range(1 if sweep.get("arrays", True) else most)]
    for index, job_id in enumerate(sorted({one.whole for one in there if one.kind == CAPPED})):
        lanes[index % len(lanes)].append(job_id)
    return deque(lanes)


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
        write_text(sending.home.table(len(sending.groups) - 1), "".join(f"{name}\n" for name in chain.members))
    sending.save(group)
    try:
        _submit(sending, group)
    except Full:
        if not _take_back(sending, [group]):
            raise
        if len(chain.members) == 1:
            return [chain, *todo]
        todo.extendleft(reversed(chain.halves()))
    return []


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
        link = "aftercorr" if sending.arrays else "afterok"
        waits = [_after_shares(sending, runs) if before is None else f"{link}:{before}"]
        lane = sending.lanes.popleft() if sending.lanes and CAPPED in own else None
        waits += [f"afterany:{':'.join(lane)}"] if lane else []
        submission = Submission(
            key=_key(sending, group, jobs),
            jobs=jobs,
            dependency=",".join(filter(None, waits)),
            hold=before is None,
            array=_array(sending, group, CAPPED in own) if sending.arrays else None,
        )
        hand_in(submission, entries, lambda: sending.save(group))
        before = str(entries[0]["job_id"])
        if lane is not None:
            sending.lanes.append([before])


def _key(sending: _Sending, group: Group, jobs: Sequence[Mapping[str, Any]]) -> str:
    """Each only once: of arrays of a kind the second ends in -g1, a single job submitted once more in -r1."""
    name = "pack" if jobs[0]["request"].get("pack") else jobs[0]["kind"]
    earlier = sending.groups[: sending.groups.index(group)]
    if sending.arrays:
        number = sum(jobs[0]["kind"] in one["jobs"] for one in earlier)
        return f"{sending.home.sweep_id}-{name}" + (f"-g{number}" if number else "")
    member = group["members"][0]
    before = sum(member in [*one["members"], *one.get("dropped", ())] for one in earlier)
    return f"{sending.home.sweep_id}/{member}-{name}" + (f"-r{before}" if before else "")


def _array(sending: _Sending, group: Group, capped: bool) -> Array:
    most = sending.sweep.get("array_parallelism") if capped else None
    table = sending.home.table(sending.groups.index(group))
    return Array(sending.home.path, table, len(group["members"]), most)


def _after_shares(sending: _Sending, runs: Sequence[RunDir]) -> str:
    """Of points' first jobs: after their shares' prepare, unless that is complete."""
    if not runs[0].is_point or "prepare" not in sending.sweep["pipeline"]:
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


def _report(sending: _Sending, there: Sequence[Living]) -> None:
    """The sweep's own last job, after all that waits or runs; one that waits for less than that makes room."""
    entry: dict[str, Any] = sending.sweep["jobs"]["report"]
    waiting = [one.job_id for one in there if one.kind == "report" and one.member == ""]
    if not sending.begun and (waiting or marker.doubt(sending.home.own, sending.home.sweep_id, "report") is None):
        return
    if entry.get("job_id") or (waiting and entry.get("asked")):
        commands.cancel(waiting)
        entry.setdefault("earlier", []).append({name: entry.get(name) for name in ("job_id", "key", "first_attempt")})
        entry.update(job_id=None, asked=None)
        once_more(sending.home.own, "report")
    job = job_file(sending.home.own, "report")
    entry["first_attempt"] = job["first_attempt"]
    ids = {one.whole for one in there if one.member} | {
        str(list(group["jobs"].values())[-1]["job_id"]) for group in sending.begun if group["members"]
    }
    again = len(entry.get("earlier", ()))
    key = f"{sending.home.sweep_id}-report" + (f"-r{again}" if again else "")
    after = f"afterany:{':'.join(sorted(ids))}" if ids else ""
    hand_in(Submission(key, [job], after), [entry], lambda: save(sending.home, sending.sweep))


def _release(sending: _Sending) -> None:
    """Let go whatever is held, last of all the ones that others wait for."""
    for group in reversed(sending.groups):
        for job in group["jobs"].values():
            if group["members"] and job.get("held") and job.get("job_id"):
                commands.release(str(job["job_id"]))
                job["held"] = False
                sending.save(group)


def _take_back(sending: _Sending, groups: Iterable[Group]) -> bool:
    """Cancel what of ``groups`` is in the queue, all of it held; their numbers are not used again."""
    for group in list(groups):
        if not slurm.take_back(group["jobs"].values()):
            return False
        group["dropped"], group["members"] = group["members"], []
        sending.save(group)
        sending.begun.remove(group)
    return True


def job_file(run: RunDir, kind: str) -> dict[str, Any]:
    """The job file, also of a point that has not begun yet. Raises PkuslurmError."""
    job = read_json(run.job(kind))
    if job is None and run.is_point:
        job = json.loads(unpack.texts(run).get(f"jobs/{kind}.json", "null"))
    if job is None:
        raise PkuslurmError(f"{run.job(kind)}: it cannot be read")
    return dict(job)
