"""``retry RUN``: every job that is not proved complete once more; what is complete is never run again."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import command
from pkuslurm.read import sweep as reading
from pkuslurm.read.closing import closing
from pkuslurm.read.proof import open_kinds
from pkuslurm.read.report import sweep_page
from pkuslurm.rundir import RunDir, read_json, write_json
from pkuslurm.screen import Screen
from pkuslurm.submit.attempt_numbers import next_attempt, renumber, renumbering
from pkuslurm.submit.local import Nodes, run_jobs
from pkuslurm.submit.owner import check_idle, check_owner, launcher_of, whole
from pkuslurm.sweepdir import check_settled, load, save, sweep_of
from pkuslurm.sweepdir import document as read_document
from pkuslurm.worker import beats

# cluster.join_timeout of a run whose config.yaml does not say it
JOIN_SECONDS = 600.0


def retry(run: RunDir) -> int:
    """The command's exit code. Raises PkuslurmError while an old job may still be alive."""
    from pkuslurm.submit.alone import check_place

    check_owner(run)
    check_place(run)
    document = whole(run, read_document(run))
    kinds = _open(run, document["jobs"])
    if (home := sweep_of(run)) is not None and launcher_of(RunDir(home.path), load(home) or {}) is not None:
        raise PkuslurmError(f"{run.run_id}: its sweep is still running; wait, or cancel it first")
    if not kinds or document.get("executor") == "slurm":
        if kinds:
            _send_again(run)
        else:
            _nothing(run)
        print(run.path)
        return 0
    nodes = max(document["jobs"][kind].get("num_nodes", 1) for kind in kinds)
    return _together(run, kinds, nodes) if document.get("executor") == "meet" else _here(run, kinds)


def go_on(run: RunDir) -> None:
    """The same for who follows a run on Slurm: nothing is printed to stdout."""
    _send_again(run)


def _open(run: RunDir, jobs: Mapping[str, Any]) -> list[str]:
    """Raises PkuslurmError where that is not the run's alone."""
    kinds = open_kinds(run, jobs)
    if run.is_point and "prepare" in kinds:
        sweep = run.path.parent.name
        raise PkuslurmError(f"{run.run_id}: its prepare is done for several points: {command('retry', sweep)}")
    return kinds


def _nothing(run: RunDir) -> None:
    print(f"{run.run_id}: every job is complete; nothing to do", file=sys.stderr)


def _together(run: RunDir, kinds: list[str], nodes: int) -> int:
    """Without a scheduler: this command is typed on every node, whose folder of the run is where they meet."""
    from pkuslurm.submit.meet import say, together
    from pkuslurm.submit.meet_settings import again, variables
    from pkuslurm.submit.meet_where import role

    if nodes == 1:
        if (os.environ.get("NODE_RANK") or os.environ.get("RANK") or "0") != "0":
            say(f"{run.run_id}: what is left of it is done by node 0 alone")
            return 0
        return _here(run, kinds)
    # before half a minute, or a partner that never comes, is waited for
    check_idle(run, read_document(run) or {}, beats.GLANCE_SECONDS)
    ranks = max((read_json(run.job(kind)) or {}).get("nproc_per_node") or 1 for kind in kinds)
    own = role(os.environ, nodes, ranks)
    there = variables(own, nodes, os.environ)
    command = "" if there is None else again(["retry", str(run.path)], "pkuslurm", there)
    same = ("retry", run.run_id, *kinds)
    return together(run.meeting, own, nodes, same, command, _join_seconds(run), lambda there: _here(run, kinds, there))


def _join_seconds(run: RunDir) -> float:
    """For so long the nodes of a run without a scheduler wait for each other: cluster.join_timeout, as launched."""
    import yaml

    try:
        cluster = yaml.safe_load(run.config_yaml.read_text(encoding="utf-8"))["cluster"]
        return float(cluster["join_timeout"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return JOIN_SECONDS


def _here(run: RunDir, kinds: list[str], nodes: Nodes | None = None) -> int:
    code = run_jobs(run, kinds, Screen(run, tuple(kinds)), begin=renumbering(run, kinds), nodes=nodes)
    if (home := sweep_of(run)) is not None:
        sweep_page.write(reading.read(home.path))  # it ranks this point, too
    passed = closing(run, sys.stderr)
    print(run.path)
    return 1 if code == 0 and passed is False else code


def _send_again(run: RunDir) -> None:
    from pkuslurm.slurm import commands
    from pkuslurm.submit import queue, slurm
    from pkuslurm.submit.alone import alone

    with alone(run) as document:
        jobs = document["jobs"]
        unsent = {kind for kind, entry in jobs.items() if entry.get("job_id") is None}
        queue.adopt(document)
        living = queue.there(document)
        # not before: what ends while Slurm is asked would be open and no more there, as if Slurm had lost it
        kinds = _open(run, jobs)
        if not kinds:
            return _nothing(run)
        # complete, and Slurm wants to start it again (its node went away as it ended), or holds it; other points wait
        # for what is shared
        needed = {living[kind].job_id for kind in kinds if kind in living}  # of a pack it is the same one
        idle = [
            kind
            for kind, row in living.items()
            if row.state == "PENDING" and not (kind in kinds or row.job_id in needed) and run.home(kind) == run
        ]
        orphans = queue.orphans(jobs, kinds, living, idle)
        there = {kind: row for kind, row in living.items() if kind in kinds and kind not in orphans}
        again = [kind for kind in kinds if kind not in there]
        packed = bool((read_json(run.job(kinds[0])) or {}).get("request", {}).get("pack"))
        for kind, row in there.items():
            # also what was let go and the controller forgot that, and what a bad node has sent back
            jobs[kind]["held"] = bool(jobs[kind].get("held")) or row.held
        if there and not unsent.intersection(kinds) and not any(jobs[kind].get("held") for kind in kinds):
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
