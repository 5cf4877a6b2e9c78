"""``doctor cluster=NAME``: a short job on real nodes that asks for what a training would, and what it found."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pkuslurm.compose import compose
from pkuslurm.config.built import check_built
from pkuslurm.doctor.check import Check
from pkuslurm.doctor.verdict import Found, judge
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import absolute
from pkuslurm.plan.plan import RunPlan, plan
from pkuslurm.preflight.resolve import resolve
from pkuslurm.preflight.slurm import check_slurm
from pkuslurm.render.render import module_command, render
from pkuslurm.rundir import RunDir, read_json, write_json, write_text
from pkuslurm.slurm import commands
from pkuslurm.slurm.parse import ALIVE, Row, minutes
from pkuslurm.submit.slurm import Submission, hand_in
from pkuslurm.worker import hostlist, trial

LIMIT_MINUTES = 5
WAIT_MINUTES = 10.0
# the queue is asked so often at first, and at most so seldom later
FIRST_SECONDS, LAST_SECONDS = 0.5, 5.0
# a job that the controller does not know, twice so far apart, has ended
GONE_SECONDS = 3.0
# KillWait is 30 s by default
END_SECONDS = 40.0
# what srun says of a node that cannot open its log, or cannot be reached
LAUNCH_FAILED = "launch failed"
NOISE = "lacks support for cpu binding"
# until a file that a node wrote is seen here
SEEN_SECONDS = 20.0


@dataclass(frozen=True)
class Prepared:
    """The job, not submitted yet: ``spec`` is what its nodes are told, ``job`` the training's own job file."""

    run: RunDir
    submission: Submission
    spec: Mapping[str, Any]
    job: Mapping[str, Any]
    asked: str


class NotStarted(Exception):
    """It waits still; the text is Slurm's reason."""


def examine(
    overrides: Sequence[str], environ: Mapping[str, str], wait: float = WAIT_MINUTES, directories: Sequence[Path] = ()
) -> list[Check]:
    """Submit the job, wait for it, and say what it found; nothing of it is left. Raises PkuslurmError before that."""
    prepared = prepare(overrides, environ, directories)
    root = prepared.run.path.parent
    new = not root.exists()
    try:
        prepared.run.path.mkdir(mode=0o700, parents=True)
        write_json(prepared.run.job("train"), prepared.job)
        write_text(prepared.run.path / trial.LOGIN, str(prepared.spec["token"]))
        return _on_nodes(prepared, wait)
    except OSError as error:
        raise PkuslurmError(f"run_root={root}: {error.filename or ''} {error.strerror or error}") from None
    finally:
        shutil.rmtree(prepared.run.path, ignore_errors=True)
        if new:
            with suppress(OSError):
                root.rmdir()


def prepare(overrides: Sequence[str], environ: Mapping[str, str], directories: Sequence[Path] = ()) -> Prepared:
    """The job as the training would be, with a program of doctor's in its place. Raises PkuslurmError."""
    typed = [word.lstrip("+").partition("=")[0] for word in overrides]
    meant = {"nodes": "2", "model": "tiny", "pipeline": "train"}
    composed = compose(
        [*overrides, *(f"{key}={value}" for key, value in meant.items() if key not in typed)], directories
    )
    config = composed.config
    if config.cluster.executor != "slurm":
        name = composed.choices.get("cluster", "local")
        raise PkuslurmError(
            f"cluster={name}: it asks no scheduler, so there is nothing to try; `doctor` alone looks at this machine"
        )
    if "train" not in config.pipeline.jobs:
        raise PkuslurmError(f"pipeline={config.pipeline.name}: doctor asks what a training asks; leave it out")
    config = replace(config, run_root=absolute(config.run_root), cache_root=absolute(config.cache_root))
    check_built(config, [item.key for item in composed.settings], [])
    steps = plan(config)
    steps = RunPlan(config, (replace(steps.job("train"), parents=()),))
    check_slurm(steps)
    inputs = resolve(config, environ, lenient=True)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    run = RunDir(Path(config.run_root) / f"doctor-{stamp}-{secrets.token_hex(2)}")
    job = render(steps, inputs, run, composed.yaml, sys.executable).jobs["train"]
    spec = {"nodes": job["nodes"], "folder": str(run.path), "token": secrets.token_hex(8)}
    request = dict(job["request"])
    options = dict(request["options"])
    options["time"] = _limit(options)
    command = module_command(sys.executable, "pkuslurm.worker.trial", json.dumps(spec, ensure_ascii=False))
    own = {"kind": "doctor", "key": run.run_id, "parents": [], "worker": command}
    ours = {**job, **own, "request": {**request, "options": options, "signal_seconds": 10, "pack": False}}
    asked = ", ".join(f"{name}={value}" for name, value in options.items())
    nodes = f"{job['nodes']} node{'s' if job['nodes'] > 1 else ''}"
    return Prepared(run, Submission(run.run_id, [ours]), spec, job, f"{nodes}, {asked}")


def _limit(options: Mapping[str, Any]) -> int:
    """Minutes: a few, and not more than the partition allows, which would wait for ever."""
    asked = minutes(str(options["time"])) if options.get("time") is not None else None
    names = str(options.get("partition") or "").split(",")
    there = [part for part in commands.partitions() or [] if part.name in names or (names == [""] and part.default)]
    limits = (asked, *(part.max_minutes for part in there))
    return min(LIMIT_MINUTES, *(most for most in limits if most), LIMIT_MINUTES)


def _on_nodes(prepared: Prepared, wait: float) -> list[Check]:
    submission, entry = prepared.submission, dict[str, Any]()
    try:
        try:
            hand_in(submission, [entry], lambda: None)
        except PkuslurmError as error:
            _cancel(submission.key)  # it may have been taken all the same
            hint = "what stands before the colon names what was asked for; change it in the preset"
            return [Check("submission", False, str(error), hint, True)]
        job_id = str(entry["job_id"])
        _say(f"job {job_id} is submitted: {prepared.asked}; Ctrl-C cancels it")
        accepted = Check("submission", True, f"job {job_id}: {prepared.asked}")
        began = time.monotonic()
        script = prepared.run.logs / ".slurm" / f"doctor-{job_id}.out"
        try:
            row, waited, nodes = _wait(job_id, submission.key, wait, script)
        except NotStarted as reason:
            _cancel(submission.key)
            told = f"job {job_id} did not start within {wait:g} minutes and was cancelled: {reason}"
            remedy = "doctor … --wait 60 waits longer; `sinfo` shows which nodes are free"
            return [accepted, Check("start", False, told, remedy, True)]
        took = time.monotonic() - began - waited
        started = Check("start", True, f"after {waited:.0f} s on {', '.join(nodes) or '?'}; it took {took:.0f} s")
        found = _found(prepared, job_id, row, nodes)
        if row is not None and row.state == "CANCELLED" and not found.seen:
            return [
                accepted,
                Check("start", False, f"job {job_id} was cancelled from elsewhere", "ask once more", True),
            ]
        return [accepted, started, *judge(found)]
    except BaseException:
        _cancel(submission.key)
        raise


def _wait(job_id: str, key: str, wait: float, script: Path) -> tuple[Row | None, float, list[str]]:
    """The job's last row, how many seconds it waited, and its nodes. Raises NotStarted.

    Ends it where ``script``, the batch script's log, says that a node could not begin: the others would wait for it.
    """
    began = time.monotonic()
    pause, gone, told, nodes, waited = FIRST_SECONDS, False, "", list[str](), 0.0
    while True:
        answer = commands.queue([job_id])
        row = answer.rows.get(job_id)
        if row is not None and row.state != "PENDING" and row.nodes:
            with suppress(PkuslurmError):
                nodes = hostlist.expand(row.nodes)
        if row is not None and row.state not in ALIVE:
            return row, waited, nodes
        if LAUNCH_FAILED in _tail(script):
            _cancel(key)
            return row, waited, nodes
        if answer.complete and row is None:
            if gone:
                return None, waited, nodes
            gone = True
            time.sleep(GONE_SECONDS)
            continue
        gone = False
        if row is not None and row.state == "PENDING":
            waited = time.monotonic() - began
            if waited > wait * 60:
                raise NotStarted(_reason(row))
            if waited > 5 and _reason(row) != told:
                told = _reason(row)
                _say(f"job {job_id} waits: {told}")
        time.sleep(pause)
        pause = min(pause * 1.2, LAST_SECONDS)


def _reason(row: Row) -> str:
    when = f", Slurm expects to start it at {row.started}" if row.started else ""
    return f"{row.reason or 'no reason is given'}{when}"


def _found(prepared: Prepared, job_id: str, row: Row | None, nodes: Sequence[str]) -> Found:
    """What the nodes wrote, as far as it is seen here, and what Slurm and the job's script said."""
    run, count = prepared.run, int(prepared.spec["nodes"])
    words = [_tail(run.logs / ".slurm" / f"doctor-{job_id}.out")]
    ended_well = (row is None or row.state in ("COMPLETED", "RUNNING")) and LAUNCH_FAILED not in words[0]
    deadline = time.monotonic() + (SEEN_SECONDS if ended_well else 1.0)
    while True:
        seen = {rank: read_json(run.path / trial.NODE.format(rank)) for rank in range(count)}
        heard = {int(one["rank"]): one for one in (seen[0] or {}).get("heard") or [] if one.get("rank") is not None}
        # a node that told node 0 that it sees no folder will not write into it
        missing = [
            rank for rank in range(count) if seen[rank] is None and heard.get(rank, {}).get("folder", {}).get("ok")
        ]
        silent = [rank for rank in range(count) if seen[rank] is None and rank not in heard]
        if not (missing or silent) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    words += [_tail(file) for file in sorted(run.logs.glob(f"doctor-{job_id}_*.log"))]
    return Found(
        {rank: one for rank, one in seen.items() if one is not None},
        heard,
        list(nodes),
        prepared.spec,
        "\n".join(filter(None, words)),
        "" if row is None else row.state,
    )


def _tail(file: Path, lines: int = 20) -> str:
    with suppress(OSError):
        text = file.read_text(encoding="utf-8", errors="replace")
        told = [line.strip() for line in text.splitlines() if line.strip() and NOISE not in line]
        return "\n".join(told[-lines:])
    return ""


def _cancel(key: str) -> None:
    """End it, by its name: the reply of an sbatch that was interrupted is not known. Waits for the end."""
    deadline = time.monotonic() + END_SECONDS
    with suppress(PkuslurmError):
        while living := [row.job_id for row in commands.by_name(key).rows.values() if row.state in ALIVE]:
            commands.cancel(living)
            if time.monotonic() > deadline:
                return
            time.sleep(0.5)


def _say(line: str) -> None:
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
