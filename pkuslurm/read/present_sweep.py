"""A sweep on one screen, however many points it has: counts, what runs, what failed and why, what to do next."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from pkuslurm.paths import command
from pkuslurm.read import sweep
from pkuslurm.read.job import JobStatus
from pkuslurm.read.present import progress_words, table
from pkuslurm.read.report import leaderboard
from pkuslurm.read.status import RunStatus
from pkuslurm.read.sweep import SweepStatus
from pkuslurm.read.text import aligned, between, duration, safe, width

# a line for each point up to so many
FEW = 12
MOST_PREPARES, MOST_RUNNING, MOST_FAILED, MOST_NUMBERS = 1, 3, 7, 4
_NEXT = ("RUNNING", "REQUEUED", "PREEMPTED", "PENDING")
# what differs in the words of one and the same cause
_OWN = (
    (re.compile(r"\brank \d+"), "rank"),
    (re.compile(r"\bstep \d+"), "step"),
    (re.compile(r" on [\w.-]+(?=[ :;,])"), ""),
    (re.compile(r"\(?\bpid:? \d+\)?"), "pid"),
)


def show_sweep(now: SweepStatus, stream: TextIO) -> None:
    """At most a screen (24 lines). On a terminal lines are cut to its width; --json has all."""
    lines = [line(now), str(now.path), *_own_jobs(now)]
    few = len(now.runs) <= FEW
    if few and now.runs:
        _write(lines, stream)
        print(file=stream)
        metric, values = _ranked_by(now)
        rows = [_row(now, index, values) for index in range(len(now.runs))]
        table(("point", "", "state", "job", "loss", *([metric] if values else []), ""), rows, stream)
        lines = []
    else:
        lines += [*_running(now), *_failed(now)]
    _write([*lines, *_next(now)], stream)


def line(now: SweepStatus) -> str:
    counted = ", ".join(f"{count} {state}" for state, count in now.counts.items())
    many = f"{len(now.runs)} point{'' if len(now.runs) == 1 else 's'}"
    why = f" ({now.reason})" if now.reason else f", {many}: {counted}"
    unmet = sum(run.passed is False for run in now.runs)
    return f"{now.sweep_id}: {now.state}{why}" + (f"; an expectation was NOT met in {unmet}" if unmet else "")


def _own_jobs(now: SweepStatus) -> list[str]:
    """A line for each of the sweep's own jobs; for many shares one for all of them."""
    prepares = [job for job in now.jobs if job.kind == "prepare"]
    if len(prepares) <= MOST_PREPARES:
        return aligned([_job_cells(job) for job in now.jobs]) if now.jobs else []
    counted = Counter(job.state for job in prepares)
    told = ", ".join(f"{counted[state]} {state}" for state in sweep.ORDER if counted[state])
    others = [_job_cells(job) for job in now.jobs if job.kind != "prepare"]
    return [f"prepare  {told}", *(aligned(others) if others else [])]


def _job_cells(job: JobStatus) -> tuple[str, str, str, str]:
    seconds = between(job.started, job.finished) if job.finished or job.state == "RUNNING" else None
    job_id = job.job_id or "-"
    return (job.kind, job_id, job.state, job.reason or ("" if seconds is None else duration(seconds)))


def _ranked_by(now: SweepStatus) -> tuple[str, dict[Path, float | None]]:
    """What the points are ranked by and each one's value of it; no values where none has any yet, or where that is
    the loss, which stands there."""
    found = leaderboard.board(now)
    if found.metric == "loss" or all(row.metric is None for row in found.rows):
        return found.metric, {}
    return found.metric, {row.path: row.metric for row in found.rows}


def _row(now: SweepStatus, index: int, values: dict[Path, float | None]) -> tuple[str, ...]:
    run = now.runs[index]
    broken = sweep.first_broken(run) if run.state not in sweep.FINE else None
    job = broken or _at(run)
    loss = _loss(run)
    words = "" if run.passed is not False else "an expectation was NOT met"
    if broken is not None or run.reason:
        words = (broken.reason if broken else run.reason) or ""
    elif job is not None and job.state == "RUNNING" and job.progress:
        words = progress_words(job.progress)
    elif job is not None and job.state != "RUNNING":
        words = job.reason or ""
    kind = "-" if job is None else job.kind
    metric = [_number(values.get(run.path))] if values else []
    return (str(index), now.label(index), run.state, kind, _number(loss), *metric, words)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _at(run: RunStatus) -> JobStatus | None:
    """The job that runs, or the one that comes next."""
    for state in _NEXT:
        if job := next((job for job in run.jobs if job.state == state), None):
            return job
    return None


def _loss(run: RunStatus) -> float | None:
    train = run.job("train")
    loss = train.progress.get("loss") if train and train.progress else None
    return float(loss) if isinstance(loss, int | float) else None


def _running(now: SweepStatus) -> list[str]:
    working = [index for index, run in enumerate(now.runs) if any(job.state == "RUNNING" for job in _own(run, now))]
    if not working:
        return []
    rows = []
    for index in working[:MOST_RUNNING]:
        job = next(job for job in _own(now.runs[index], now) if job.state == "RUNNING")
        rows.append((str(index), now.label(index), job.kind, progress_words(job.progress) if job.progress else ""))
    more = len(working) - MOST_RUNNING
    return ["", "running", *aligned(rows), *([f"and {more} more"] if more > 0 else [])]


def _own(run: RunStatus, now: SweepStatus) -> Sequence[JobStatus]:
    """The jobs that are the point's alone."""
    shared = {job.kind for job in now.jobs if job.kind == "prepare"}
    return [job for job in run.jobs if job.kind not in shared]


def _failed(now: SweepStatus) -> list[str]:
    """What did not complete, equal causes in one line; those of most points first."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    words: dict[tuple[str, str, str], str] = {}
    for index, run in enumerate(now.runs):
        if run.state not in sweep.FINE:
            job = sweep.first_broken(run)
            kind, reason = ("", run.reason or "") if job is None else (job.kind, job.reason or "")
            cause = (run.state, kind, _plain(reason, now, index))
            groups.setdefault(cause, []).append(index)
            words.setdefault(cause, reason)
    if not groups:
        return []
    ordered = sorted(groups, key=lambda cause: (-len(groups[cause]), groups[cause][0]))
    lines = [_group(now, cause, groups[cause], words[cause]) for cause in ordered[:MOST_FAILED]]
    more = sum(len(groups[cause]) for cause in ordered[MOST_FAILED:])
    return [
        "",
        "not completed",
        *lines,
        *([f"and {more} more: {command('status', now.sweep_id, '--json')}"] if more else []),
    ]


def _group(now: SweepStatus, cause: tuple[str, str, str], numbers: Sequence[int], words: str) -> str:
    state, kind, _ = cause
    what = f"{state} {kind}".strip() + (f": {words}" if words else "")
    if len(numbers) == 1:
        return f"{numbers[0]} {now.label(numbers[0])}: {what}"
    named = ", ".join(map(str, numbers[:MOST_NUMBERS])) + (", …" if len(numbers) > MOST_NUMBERS else "")
    # the points first: a terminal cuts the end of a long reason
    return f"{len(numbers)} points ({named}): {what}"


def _plain(reason: str, now: SweepStatus, index: int) -> str:
    """``reason`` without what only this point has: its paths, its label, numbers of ranks and steps."""
    text = re.sub(re.escape(str(now.path)) + r"[^\s;,]*", "", reason).replace(now.label(index), "")
    for pattern, instead in _OWN:
        text = pattern.sub(instead, text)
    return text


def _next(now: SweepStatus) -> Iterator[str]:
    """A blank line, and the commands to try."""
    yield ""
    name = now.sweep_id
    running = next((index for index, run in enumerate(now.runs) if run.state == "RUNNING"), 0)
    broken = next((index for index, run in enumerate(now.runs) if run.state not in sweep.FINE), None)
    if broken is not None:
        yield f"logs   {command('logs', f'{name}/{broken}')}"
    if now.state in ("RUNNING", "PENDING") and broken is None and now.runs:
        yield f"one    {command('status', f'{name}/{running}')}"
    if now.state not in sweep.FINE:
        yield f"next   {command('retry', name)}"
    if now.counts.get("COMPLETED"):
        yield f"report {command('report', name)}"


def _write(lines: Sequence[str], stream: TextIO) -> None:
    columns = shutil.get_terminal_size().columns if stream.isatty() else 0
    for text in lines:
        shown = safe(text)
        print(_cut(shown, columns) if columns else shown, file=stream)


def _cut(text: str, columns: int) -> str:
    """What of ``text`` a terminal shows without wrapping."""
    if width(text) <= columns:
        return text
    kept, used = [], 1  # of the three dots
    for character in text:
        used += width(character)
        if used > columns:
            break
        kept.append(character)
    return "".join(kept) + "…"
