"""``retry RUN``: every job that is not proved complete once more; what is complete is never run again."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import proof, pruned, status
from pkuslurm.read.closing import closing
from pkuslurm.rundir import RunDir, read_json, write_json
from pkuslurm.screen import Screen
from pkuslurm.submit.local import check_owner, run_jobs


def retry(run: RunDir) -> int:
    """The command's exit code. Raises PkuslurmError while an old job may still be alive."""
    check_owner(run)
    document = read_json(run.run_json)
    if document is None or not isinstance(document.get("jobs"), dict):
        raise PkuslurmError(f"{run.run_json}: it cannot be read as a run's description")
    kinds = _open_kinds(run, document)
    if not kinds:
        print(f"{run.run_id}: every job is complete; nothing to do", file=sys.stderr)
        print(run.path)
        return 0
    if document.get("executor") == "slurm":
        return _on_slurm(run, kinds)
    return _here(run, kinds)


def go_on(run: RunDir) -> None:
    """The same for who follows a run on Slurm: nothing is printed to stdout."""
    _send_again(run, _open_kinds(run, read_json(run.run_json) or {"jobs": {}}))


def _open_kinds(run: RunDir, document: Mapping[str, Any]) -> list[str]:
    """What is not proved complete."""
    gone = pruned.read(run)
    return [kind for kind in document["jobs"] if proof.marker_of(run, run.run_id, kind, gone)[0] is None]


def _here(run: RunDir, kinds: list[str]) -> int:
    attempts = {kind: _next_attempt(run, kind) for kind in kinds}

    def begin() -> None:
        for kind, attempt in attempts.items():
            _renumber(run, kind, attempt, None)

    code = run_jobs(run, kinds, Screen(run, tuple(kinds)), begin=begin)
    passed = closing(run, sys.stderr)
    print(run.path)
    return 1 if code == 0 and passed is False else code


def _on_slurm(run: RunDir, kinds: list[str]) -> int:
    _send_again(run, kinds)
    print(run.path)
    return 0


def _send_again(run: RunDir, kinds: list[str]) -> None:
    from pkuslurm.submit import queue, slurm
    from pkuslurm.submit.alone import alone, check_place

    check_place(run)
    with alone(run) as document:
        jobs = document["jobs"]
        unsent = [kind for kind in kinds if jobs[kind].get("job_id") is None]
        queue.adopt(document)
        living = queue.alive(document)
        again = [kind for kind in kinds if kind not in living]
        packed = bool((read_json(run.job(kinds[0])) or {}).get("request", {}).get("pack"))
        if living and not unsent and not any(jobs[kind].get("held") for kind in kinds):
            names = ", ".join(f"{kind} ({job_id})" for kind, job_id in living.items())
            raise PkuslurmError(f"{run.run_id}: {names} still waits or runs; let it end, or cancel it first")
        for kind in again:
            if jobs[kind].get("job_id") is None and not document.get("cancelled"):
                continue  # never submitted: it goes under its first key
            renew(run, jobs[kind], kind, packed)
        document["cancelled"] = None
        write_json(run.run_json, document)
        slurm.send(run, document, kinds)
    print(f"{run.run_id}: submitted {', '.join(again) or 'nothing new'}", file=sys.stderr)


def renew(run: RunDir, entry: dict[str, Any], kind: str, packed: bool = False, attempt: int | None = None) -> None:
    """Give a job that was submitted before its next attempt and key, in run.json's ``entry`` and in its job file."""
    attempt = attempt or _next_attempt(run, kind)
    number = len(entry.setdefault("earlier", [])) + 1
    # nothing is lost: also the ids of what went before
    entry["earlier"].append({name: entry.get(name) for name in ("job_id", "key", "first_attempt")})
    key = f"{run.run_id}-{'pack' if packed else kind}-r{number}"
    entry.update(job_id=None, asked=None, held=False, key=key, first_attempt=attempt)
    _renumber(run, kind, attempt, key)


def _without_bad_nodes(run: RunDir, job: dict[str, Any]) -> None:
    """Keep the next attempt from the nodes that failed under those before."""
    from pkuslurm.submit.queue import bad_nodes

    if bad := bad_nodes(run, job):
        options = job["request"]["options"]
        options["exclude"] = ",".join(dict.fromkeys([*str(options.get("exclude") or "").split(","), *bad])).strip(",")


def _next_attempt(run: RunDir, kind: str) -> int:
    """One more than the last that anything is known of; a job that never began starts as it was planned."""
    if not run.state(kind).exists():
        return int((read_json(run.job(kind)) or {}).get("first_attempt", 1))
    return status.last_attempt(run.path, kind) + 1


def _renumber(run: RunDir, kind: str, attempt: int, key: str | None) -> None:
    job = read_json(run.job(kind))
    if job is None:
        raise PkuslurmError(f"{run.job(kind)}: it cannot be read")
    job["first_attempt"] = attempt
    if key is not None:
        job["key"] = key
        _without_bad_nodes(run, job)
    write_json(run.job(kind), job)
    if run.stop(kind).exists():
        os.unlink(run.stop(kind))
