"""``retry RUN``: every job that is not proved complete once more; what is complete is never run again."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import sweep as reading
from pkuslurm.read.closing import closing
from pkuslurm.read.proof import open_kinds
from pkuslurm.read.report import sweep_page
from pkuslurm.rundir import RunDir, read_json, write_json
from pkuslurm.screen import Screen
from pkuslurm.submit.attempt_numbers import next_attempt, renumber
from pkuslurm.submit.local import Nodes, check_owner, launcher_of, run_jobs
from pkuslurm.sweepdir import check_settled, load, save, sweep_of
from pkuslurm.sweepdir import document as read_document

if TYPE_CHECKING:
    from pkuslurm.slurm.parse import Row

# for so long the nodes of a run without a scheduler wait for each other
JOIN_SECONDS = 600.0


def retry(run: RunDir) -> int:
    """The command's exit code. Raises PkuslurmError while an old job may still be alive."""
    from pkuslurm.submit.alone import check_place

    check_owner(run)
    check_place(run)
    document = read_document(run)
    if document is None or not isinstance(document.get("jobs"), dict):
        raise PkuslurmError(f"{run.run_json}: it cannot be read as a run's description")
    kinds = open_kinds(run, document["jobs"])
    if run.is_point and "prepare" in kinds:
        sweep = run.path.parent.name
        raise PkuslurmError(f"{run.run_id}: its prepare is done for several points: pkuslurm retry {sweep}")
    if (home := sweep_of(run)) is not None and launcher_of(RunDir(home.path), load(home) or {}) is not None:
        raise PkuslurmError(f"{run.run_id}: its sweep is still running; wait, or cancel it first")
    if not kinds:
        print(f"{run.run_id}: every job is complete; nothing to do", file=sys.stderr)
        print(run.path)
        return 0
    if document.get("executor") == "slurm":
        return _on_slurm(run, kinds)
    nodes = max(document["jobs"][kind].get("num_nodes", 1) for kind in kinds)
    return _together(run, kinds, nodes) if document.get("executor") == "meet" else _here(run, kinds)


def go_on(run: RunDir) -> None:
    """The same for who follows a run on Slurm: nothing is printed to stdout."""
    _send_again(run, open_kinds(run, (read_document(run) or {"jobs": {}})["jobs"]))


def _together(run: RunDir, kinds: list[str], nodes: int) -> int:
    """Without a scheduler: this command is typed on every node, whose folder of the run is where they meet."""
    from pkuslurm.submit.meet import say, together
    from pkuslurm.submit.meet_where import again, role

    own = role(os.environ, nodes) if nodes > 1 else None
    if own is None:
        if (os.environ.get("NODE_RANK") or os.environ.get("RANK") or "0") != "0":
            say(f"{run.run_id}: what is left of it is done by node 0 alone")
            return 0
        return _here(run, kinds)
    command = again(["retry", run.run_id], "pkuslurm")
    same = ("retry", run.run_id, *kinds)
    return together(run.meeting, own, nodes, same, command, JOIN_SECONDS, lambda there: _here(run, kinds, there))


def _here(run: RunDir, kinds: list[str], nodes: Nodes | None = None) -> int:
    attempts = {kind: next_attempt(run, kind) for kind in kinds}

    def begin() -> None:
        for kind, attempt in attempts.items():
            renumber(run, kind, attempt, None)

    code = run_jobs(run, kinds, Screen(run, tuple(kinds)), begin=begin, nodes=nodes)
    if (home := sweep_of(run)) is not None:
        sweep_page.write(reading.read(home.path))  # it ranks this point, too
    passed = closing(run, sys.stderr)
    print(run.path)
    return 1 if code == 0 and passed is False else code


def _on_slurm(run: RunDir, kinds: list[str]) -> int:
    _send_again(run, kinds)
    print(run.path)
    return 0


def _send_again(run: RunDir, kinds: list[str]) -> None:
    from pkuslurm.slurm import commands
    from pkuslurm.submit import queue, slurm
    from pkuslurm.submit.alone import alone

    with alone(run) as document:
        jobs = document["jobs"]
        unsent = [kind for kind in kinds if jobs[kind].get("job_id") is None]
        queue.adopt(document)
        living = queue.there(document)
        # complete, and Slurm wants to start it again (its node went away as it ended), or holds it
        needed = {living[kind].job_id for kind in kinds if kind in living}  # of a pack it is the same one
        idle = [
            kind
            for kind, row in living.items()
            if row.state == "PENDING" and not (kind in kinds or row.job_id in needed)
        ]
        orphans = _orphans(jobs, kinds, living, idle)
        there = {kind: row for kind, row in living.items() if kind in kinds and kind not in orphans}
        again = [kind for kind in kinds if kind not in there]
        packed = bool((read_json(run.job(kinds[0])) or {}).get("request", {}).get("pack"))
        for kind, row in there.items():
            # also what was let go and the controller forgot that, and what a bad node has sent back
            jobs[kind]["held"] = bool(jobs[kind].get("held")) or row.held
        if there and not unsent and not any(jobs[kind].get("held") for kind in kinds):
            names = ", ".join(f"{kind} ({row.job_id})" for kind, row in there.items())
            raise PkuslurmError(f"{run.run_id}: {names} still waits or runs; let it end, or cancel it first")
        commands.cancel(living[kind].job_id for kind in (*orphans, *idle))
        set_apart(run, document, again)
        for kind in again:
            if jobs[kind].get("job_id") is None and not document.get("cancelled"):
                continue  # never submitted: it goes under its first key
            renew(run, jobs[kind], kind, packed)
        document["cancelled"] = None
        write_json(run.run_json, document)
        slurm.send(run, document, kinds)
    print(f"{run.run_id}: submitted {', '.join(again) or 'nothing new'}", file=sys.stderr)


def _orphans(
    jobs: Mapping[str, Any], kinds: Sequence[str], living: Mapping[str, Row], idle: Sequence[str]
) -> list[str]:
    """Those that wait for a job of ``kinds`` that is no more: it failed, or Slurm has lost it and may have given its id
    to another; or for one of ``idle``, which is about to be taken away. ``jobs`` are in the order of the chain."""
    gone = [*idle, *(kind for kind in kinds if kind not in living and jobs[kind].get("asked"))]
    found: list[str] = []
    for kind, entry in jobs.items():
        waits = kind in living and living[kind].state == "PENDING"
        if waits and any(parent in (*gone, *found) for parent in entry.get("parents") or ()):
            found.append(kind)
    return found


def set_apart(run: RunDir, document: dict[str, Any], kinds: Sequence[str]) -> None:
    """Before jobs of a sweep's point are submitted by themselves: in sweep.json, which then looks into its run.json,
    and in ``document``, whose ids are no longer those of a group. Raises PkuslurmError where the group is half sent."""
    home = sweep_of(run)
    sweep = None if home is None else load(home, strict=True)
    if home is None or sweep is None:
        return
    check_settled(run, sweep)
    for point in sweep["points"]:
        if str(point["n"]) == run.path.name and not point.get("apart"):
            point["apart"] = True
            save(home, sweep)
    for kind in kinds:
        document["jobs"][kind].pop("group", None)
        document["jobs"][kind]["after_group"] = len(sweep["groups"]) - 1


def renew(run: RunDir, entry: dict[str, Any], kind: str, packed: bool = False, attempt: int | None = None) -> None:
    """Give a job that was submitted before its next attempt and key, in run.json's ``entry`` and in its job file."""
    attempt = attempt or next_attempt(run, kind)
    number = len(entry.setdefault("earlier", [])) + 1
    # nothing is lost: also the ids of what went before
    entry["earlier"].append({name: entry.get(name) for name in ("job_id", "key", "first_attempt")})
    base = f"{run.run_id}-{'pack' if packed else kind}"
    taken = {one.get("key") for one in entry["earlier"]}
    if (home := sweep_of(run)) is not None:
        from pkuslurm.submit.arrays import keys_of

        taken |= keys_of(run.path, load(home) or {"groups": []})
    key = next(key for again in itertools.count(number) if (key := f"{base}-r{again}") not in taken)
    entry.update(job_id=None, asked=None, held=False, key=key, first_attempt=attempt)
    renumber(run, kind, attempt, key)
