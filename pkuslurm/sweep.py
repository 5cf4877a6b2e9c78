"""A sweep that exists: run here, followed, gone on with, cancelled. The jobs on Slurm do not need us."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pkuslurm.errors import PartlySubmitted, PkuslurmError
from pkuslurm.paths import command
from pkuslurm.plan.chains import Chain
from pkuslurm.read import proof
from pkuslurm.read import sweep as reading
from pkuslurm.read.job import JobStatus
from pkuslurm.read.present_sweep import line
from pkuslurm.read.report import leaderboard
from pkuslurm.read.rules import ENDED
from pkuslurm.read.still_open import open_points, open_shares
from pkuslurm.read.sweep import SweepStatus
from pkuslurm.read.text import safe
from pkuslurm.render.render import worker_command
from pkuslurm.rundir import SHARED
from pkuslurm.submit import queue
from pkuslurm.submit.alone import alone, check_original, check_place
from pkuslurm.submit.attempt_numbers import once_more
from pkuslurm.submit.owner import check_owner
from pkuslurm.sweepdir import SweepDir, load, save

# so many looks in a row at which nothing is told, before it is given up: a controller may be away for a while
MOST_UNKNOWN = 20
# so many looks after the last that was worth it, whether more points fit is tried all the same
TRY_EVERY = 5


def run_here(home: SweepDir, at_once: int) -> int:
    """Run what is not complete on this machine, then the report over all. The command's exit code."""
    from pkuslurm.submit.local_sweep import run_sweep

    sweep = load(home) or {"points": []}
    points = [int(point["n"]) for point in sweep["points"]]
    code = run_sweep(home, at_once, points, lambda line: print(line, file=sys.stderr, flush=True))
    if code != 130:
        _report_here(home)
    with suppress(OSError):
        closing(reading.read(home.path))
        print(home.path, flush=True)
    return code


def _report_here(home: SweepDir) -> None:
    """The sweep's own job, as Slurm would run it."""
    once_more(home.own, "report")
    log = home.own.log("report", "local-1", 0)
    with log.open("ab") as stream:
        subprocess.run(worker_command(sys.executable, home.own, "report"), stdout=stream, stderr=stream, check=False)


def closing(now: SweepStatus) -> None:
    """The end of a sweep on the screen."""
    with suppress(OSError):
        print(line(now), file=sys.stderr)
        found = leaderboard.board(now)
        first = leaderboard.best(found.rows)
        if first is not None:
            value = "" if first.metric is None else f", {found.metric} {first.metric:.4g}"
            print(f"best     {now.sweep_id}/{first.n}  {safe(first.label)}{value}", file=sys.stderr)
        if found.note is not None:
            print(f"note: {found.note[1]}", file=sys.stderr)
        if now.path.joinpath("report.html").exists():
            print(f"report   {safe(now.path / 'report.html')}", file=sys.stderr)
        verb = "status" if now.state == "COMPLETED" else "retry"
        print(f"next     {command(verb, now.sweep_id)}", file=sys.stderr)


def submitted(sweep: Mapping[str, Any]) -> str:
    """What went to Slurm last, in one line."""
    kinds: dict[str, list[str]] = {}
    for group in sweep.get("groups", ()):
        for kind, job in group["jobs"].items():
            if job.get("job_id") and group["members"]:
                kinds.setdefault(kind, []).append(str(job["job_id"]))
    told = [f"{kind} {ids[0] if len(ids) == 1 else f'{len(ids)} jobs'}" for kind, ids in kinds.items()]
    if report := sweep.get("jobs", {}).get("report", {}).get("job_id"):
        told.append(f"report {report}")
    return f"submitted {', '.join(told) or 'nothing'}; they go on by themselves"


def unsent(sweep: Mapping[str, Any]) -> list[int]:
    """The points that were never submitted."""
    known = {member for group in sweep.get("groups", ()) for member in group["members"]}
    if not {*sweep.get("pipeline", ())} - {"prepare"}:
        return []
    points = [point for point in sweep.get("points", ()) if not point.get("apart")]
    return [point["n"] for point in points if str(point["n"]) not in known]


def not_all(home: SweepDir, left: Sequence[Chain]) -> str:
    """Why not all is in the queue, and what to do."""
    points = sum(not name.startswith(SHARED) for chain in left for name in chain.members)
    return (
        f"{home.sweep_id}: {points} points are over the limit on how many jobs you may have in the queue, and not yet "
        f"submitted; `pkuslurm retry {home.sweep_id}` goes on when there is room, wait=true by itself"
    )


def retry(home: SweepDir) -> int:
    """All that is neither complete nor in the queue. The command's exit code."""
    check_owner(home.own)
    sweep = load(home)
    if sweep is None or not isinstance(sweep.get("points"), list):
        raise PkuslurmError(f"{home.sweep_json}: it cannot be read as a sweep's description")
    check_place(home.own)
    if sweep["executor"] != "slurm":
        if open_points(home, sweep) or open_shares(home, sweep) or proof.open_kinds(home.own, ("report",)):
            return run_here(home, int(sweep.get("array_parallelism") or 1))
        return _nothing(home)
    before = [len(sweep["groups"]), sweep["jobs"]["report"].get("job_id")]
    left = go_on(home)
    now = load(home) or sweep
    if left:
        print(home.path, flush=True)
        raise PartlySubmitted(not_all(home, left))
    if [len(now["groups"]), now["jobs"]["report"].get("job_id")] != before:
        print(submitted(now | {"groups": now["groups"][before[0] :]}), file=sys.stderr)
    elif not open_points(home, sweep) and not open_shares(home, sweep):
        return _nothing(home)
    else:
        print("nothing new; what was submitted goes on", file=sys.stderr)
    print(home.path, flush=True)
    return 0


def _nothing(home: SweepDir) -> int:
    print(f"{home.sweep_id}: every point is complete; nothing to do", file=sys.stderr)
    print(home.path)
    return 0


def go_on(home: SweepDir, room: int | None = None) -> list[Chain]:
    """Submit what is to be submitted now; what did not fit.

    ``room``: who feeds the rest in sends only what was never sent nor cancelled, at first so many points at a time.
    """
    from pkuslurm.submit.arrays import send
    from pkuslurm.submit.sweep_again import settle, wanted
    from pkuslurm.submit.sweep_queue import adopt, living

    with alone(home.own) as sweep:
        if room is not None and sweep.get("cancelled"):
            return []
        adopt(home, sweep)
        there = living(home, sweep)
        there = settle(home, sweep, there, again=room is None)
        todo = wanted(home, sweep, there, fresh=room is not None)
        if sweep.get("cancelled"):
            sweep["cancelled"] = None
            save(home, sweep)
        pieces = [piece for chain in todo for piece in chain.pieces(room or len(chain.members))]
        return send(home, sweep, pieces, there)


def cancel(home: SweepDir) -> bool:
    """End all of it. False: nothing of it waited or ran."""
    check_owner(home.own)
    check_original(home.own)
    if (load(home) or {}).get("executor") == "slurm":
        from pkuslurm.submit.sweep_queue import cancel as on_slurm

        return on_slurm(home)
    from pkuslurm.submit.local_sweep import cancel_sweep

    return cancel_sweep(home)


def follow(home: SweepDir, seconds: float) -> int:
    """Until all has ended: 0, or 1 where a point did not complete. 130: Ctrl-C; the jobs go on.

    Points that did not fit are submitted as room appears.
    """
    said, silent, ended, looks = "", 0, -1, 0
    try:
        while True:
            now = reading.read(home.path)
            if (words := line(now)) != said:
                said = words
                with suppress(OSError):
                    print(words, file=sys.stderr, flush=True)
            for number, run in enumerate(now.runs):
                queue.lift(home.point(number), run)
            # the report over all may be what did not fit
            owed = now.document.get("jobs", {}).get("report", {}).get("owed")
            waiting = not now.document.get("cancelled") and (owed or unsent(now.document))
            if not waiting and all(job.state in (*ENDED, "PREEMPTED") for job in _all_jobs(now)):
                closing(now)
                return 0 if now.state == "COMPLETED" else 1
            silent = silent + 1 if now.state == "UNKNOWN" else 0
            over = sum(job.state in ENDED for job in _all_jobs(now))
            looks += 1
            # what has ended may still count for a moment, and room may come of other jobs than these
            if waiting and now.state != "UNKNOWN" and (over > ended or looks % TRY_EVERY == 0):
                silent, ended = _feed(home, max(1, over - max(ended, 0)), silent, over, ended)
            if silent > MOST_UNKNOWN:
                raise PkuslurmError(f"{home.sweep_id}: nothing is known of its jobs any more; see `pkuslurm status`")
            time.sleep(seconds)
    except KeyboardInterrupt:
        with suppress(OSError):
            print("stopped following; the jobs go on (pkuslurm cancel ends them)", file=sys.stderr)
        return 130


def _all_jobs(now: SweepStatus) -> list[JobStatus]:
    return [*now.jobs, *(job for run in now.runs for job in run.jobs)]


def _feed(home: SweepDir, room: int, silent: int, over: int, ended: int) -> tuple[int, int]:
    """Submit more where jobs have ended; how often in a row that could not be, and up to which of them it was done."""
    try:
        go_on(home, room)
    except PkuslurmError as error:  # another command has the sweep, Slurm does not answer: next time
        with suppress(OSError):
            print(f"not yet: {safe(error)}", file=sys.stderr, flush=True)
        return silent + 1, ended
    return 0, over
