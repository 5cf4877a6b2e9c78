"""Runs as text for people: tables of status and runs. Text from models, data and logs is made harmless."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from pkuslurm.read import disk, status
from pkuslurm.read.find import START, Listed
from pkuslurm.read.job import JobStatus
from pkuslurm.read.text import aligned, between, duration, safe, size

__all__ = [
    "answers",
    "between",
    "duration",
    "safe",
    "show_runs",
    "show_status",
    "table",
]

COLOURS = {"COMPLETED": "green", "RUNNING": "cyan", "FAILED": "red", "CANCELLED": "yellow", "UNKNOWN": "magenta"}
# characters; longer answers are told one below the other
LONG = 80
# of a setting (a list of a hundred prompts) and of an answer; config.yaml and answers.jsonl have the whole
LONGEST_VALUE = 200
MOST_PARTS = 6
SHORT = ("id", "state", "time", "attempt", "passed", "size")
MARKS = {True: "yes", False: "NO", None: "-"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]], stream: TextIO) -> None:
    """Print a table; on a terminal its columns wrap to fit, elsewhere nothing is wrapped or cut."""
    cells = [[safe(cell) for cell in row] for row in rows]
    if stream.isatty():
        _wrapped(header, cells, stream)
    else:
        stream.write("".join(f"{line}\n" for line in aligned([list(header), *cells])))
    stream.flush()


def _wrapped(header: Sequence[str], rows: Iterable[Sequence[str]], stream: TextIO) -> None:
    # only here: a reading verb must not pay for it where nobody sees it
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold", show_edge=False, padding=(0, 2, 0, 0))
    for name in header:
        # a state or a number is short: it is the sentences that wrap
        drawn.add_column(Text(name), overflow="fold", no_wrap=name in SHORT)
    for row in rows:
        drawn.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row))
    Console(file=stream, highlight=False).print(drawn)


def show_runs(found: Sequence[Listed], stream: TextIO, began: float | None = None) -> None:
    """The table of ``runs``, with what they take on the disk as far as that is known within a second from ``began``."""
    if not found:
        print(f"no runs yet; {START}", file=stream)
        return
    meter = disk.Meter() if began is None else disk.Meter(deadline=disk.deadline(began))
    rows = []
    for item in found:
        taken = meter.measure(item.path)
        created = (item.created or "-").replace("T", " ")[:16]
        name = item.name or "-"
        if item.points is not None:
            name = f"sweep of {item.points}" + (f": {item.name}" if item.name else "")
        rows.append((item.run_id, item.state, created, "-" if taken is None else size(taken), name))
    table(("run", "state", "created", "size", "name"), rows, stream)
    many = f"{len(found)} run{'s' if len(found) > 1 else ''}"
    least = "at least " if meter.late else ""  # a slow disk: `du` takes the time that this does not
    print(f"{many}, {least}{size(meter.total)} (hard links counted once)", file=stream)


def show_status(now: status.RunStatus, stream: TextIO) -> None:
    """A line of the run's own, its path, a line a job; then the settings and where they come from, and the disk."""
    verdict = "" if now.passed is None else ", expectations met" if now.passed else ", an expectation was NOT met"
    why = f" ({safe(now.reason)})" if now.reason else ""
    print(f"{safe(now.run_id)}: {now.state}{verdict}{why}", file=stream)
    print(safe(now.path), file=stream)
    if label := now.document.get("label"):  # a sweep's point: what tells it from the others
        print(safe(label), file=stream)
    if now.jobs:
        rows: list[tuple[str, ...]] = [("job", "id", "state", "nodes", "time", "attempt", ""), *map(_row, now.jobs)]
        if now.document.get("executor") != "slurm":  # local-1: nobody ever types it
            rows = [(row[0], *row[2:]) for row in rows]
        table(rows[0], rows[1:], stream)
    if chosen := settings(now.document):
        print("\nsettings that differ from the defaults", file=stream)
        table(("key", "value", "default", "from"), chosen, stream)
    if parts := disk.parts(now.path):
        told = ", ".join(f"{name} {size(count)}" for name, count in parts[:MOST_PARTS] if count)
        print(f"\ndisk  {size(sum(count for _, count in parts))}: {safe(told)}", file=stream)


def settings(document: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Key, value, default and origin of each setting that run.json lists, as text."""
    found = document.get("settings")
    return [
        (
            str(item.get("key", "?")),
            _value(item.get("value")),
            _value(item.get("default")),
            str(item.get("origin", "-")),
        )
        for item in (found if isinstance(found, list) else ())
        if isinstance(item, dict)
    ]


def _value(value: object) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _cut(shown)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def answers(rows: Iterable[Mapping[str, Any]], stream: TextIO) -> None:
    """The closing table: what was asked, what the base and the tuned model say, whether it was as expected."""
    names = ("prompt", "base", "tuned", "passed")
    cells = [(_said(row, "prompt"), _said(row, "base"), _said(row, "tuned"), _mark(row)) for row in rows]
    if not stream.isatty() and any(len(cell) > LONG for row in cells for cell in row):
        # nothing is wrapped or cut there, and columns as wide as a page cannot be read
        stream.write(
            "\n".join(
                "".join(f"{name:<7} {safe(cell)}\n" for name, cell in zip(names, row, strict=True)) for row in cells
            )
        )
        return
    table(names, cells, stream)


def _said(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return "-" if value is None else _cut(str(value))


def _mark(row: Mapping[str, Any]) -> str:
    value = row.get("passed")
    return MARKS[value] if isinstance(value, bool) else MARKS[None]


def _row(job: JobStatus) -> tuple[str, ...]:
    seconds = between(job.started, job.finished) if job.finished or job.state == "RUNNING" else None
    words = job.reason or ""
    if job.state == "RUNNING" and job.progress:
        words = progress_words(job.progress)
    took = "-" if seconds is None else duration(seconds)
    nodes = ", ".join(job.nodes) or str(job.num_nodes)
    return (job.kind, job.job_id or "-", job.state, nodes, took, str(job.attempt), words)


def progress_words(progress: Mapping[str, Any]) -> str:
    """``step 12/60, loss 1.2345, 34 s left``."""
    loss, left = progress.get("loss"), progress.get("eta_seconds")
    parts = [f"step {_known(progress.get('step'))}/{_known(progress.get('total_steps'))}"]
    parts += [f"loss {loss:.4f}"] if isinstance(loss, int | float) else []
    parts += [f"{duration(left)} left"] if isinstance(left, int | float) else []
    return ", ".join(parts)


def _known(value: object) -> object:
    return "?" if value is None else value
