"""A sweep's points, the best first: what differs between them, what came of each, and leaderboard.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import pruned, values
from pkuslurm.read.report import logged
from pkuslurm.read.report.headline import first_trouble
from pkuslurm.read.status import RunStatus
from pkuslurm.read.sweep import SweepStatus
from pkuslurm.read.text import between, safe
from pkuslurm.rundir import RunDir, read_json, read_jsonl, write_text
from pkuslurm.sweepdir import SweepDir

LOSSES = ("loss", "eval_loss")
# a spreadsheet takes what begins so for a formula, and may run it
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")


@dataclass(frozen=True)
class Row:
    """A point. ``rank``: only of a complete one; ``metric``: what it is ranked by; ``passed``: whether all answers are.

    ``hours``: what its own jobs took, one after another; what points share is nobody's.
    """

    rank: int | None
    n: int
    label: str
    values: Mapping[str, str]
    state: str
    loss: float | None
    eval_loss: float | None
    metric: float | None
    passed: bool | None
    hours: float | None
    reason: str | None
    path: Path


@dataclass(frozen=True)
class Board:
    """The rows, ranked ones first, and by what: ``asked`` is sweep.metric, ``metric`` what there is in its place."""

    rows: tuple[Row, ...]
    keys: tuple[str, ...]
    asked: str
    metric: str
    direction: str
    # of the finished points, where none has the metric: what was logged
    logged: tuple[str, ...] = ()

    @property
    def note(self) -> tuple[str, str] | None:
        """Why the ranks are not by what was asked for, in Chinese and in English; None: they are."""
        if self.metric != self.asked:
            return (
                "没有任何组合算过验证损失（没有验证集），因此按最终训练损失排名",
                "no point has an evaluation loss (no validation set): they are ranked by final training loss",
            )
        if self.logged:
            known = ", ".join(self.logged)
            return (
                f"没有已完成的组合记录过 {self.asked}，因此没有排名；记录过的有：{known}",
                f"no complete point has logged {self.asked}, so none is ranked; logged were: {known}",
            )
        return None


def rows(now: SweepStatus) -> list[Row]:
    """One a point, ranked; those without a rank last."""
    return list(board(now).rows)


def board(now: SweepStatus) -> Board:
    """Read the points' results and rank them. Damaged or missing files are as if nothing had been logged."""
    document = now.document
    asked = values.text(document.get("metric")) or "eval_loss"
    points = [_row(run, asked, point) for run, point in zip(now.runs, _points(document, now.runs), strict=True)]
    metric = asked
    if asked == "eval_loss" and all(row.eval_loss is None for row in points):
        ended = [row for row in points if row.state == "COMPLETED" and row.loss is not None]
        metric = "loss" if ended else asked
        points = [replace(row, metric=row.loss) for row in points] if ended else points
    # the least of the shares that passed is nobody's wish
    upwards = metric == "passed" or (document.get("direction") == "maximize" and metric == asked)
    keys = document.get("keys")
    return Board(
        rows=tuple(_ranked(points, upwards)),
        keys=tuple(key for key in keys if isinstance(key, str)) if isinstance(keys, list) else (),
        asked=asked,
        metric=metric,
        direction="maximize" if upwards else "minimize",
        logged=_logged(points) if all(row.metric is None for row in points) else (),
    )


def best(rows: Iterable[Row]) -> Row | None:
    """The first; None where no point has a rank."""
    return next((row for row in rows if row.rank == 1), None)


def merged(row: Row) -> Path:
    """The folder of its merged model. Raises PkuslurmError, in words, where there is none."""
    run = RunDir(row.path)
    if (whole := run.whole_model) is not None:
        return whole
    if "merged" in pruned.read(run):
        raise PkuslurmError(f"{run.run_id}: its merged model was removed; `pkuslurm merge {run.run_id}` makes it again")
    hint = f"it has no merged model; what it has trained is in {run.adapter}"
    if not run.job("merge").is_file():
        raise PkuslurmError(f"{run.run_id}: {hint} (pipeline=train merges nothing, train_merge does)")
    raise PkuslurmError(f"{run.run_id}: {hint}; `pkuslurm merge {run.run_id}` makes one")


def _points(document: Mapping[str, Any], runs: Sequence[RunStatus]) -> list[Mapping[str, Any]]:
    """What the sweep says of each run: its number, its label, its values."""
    points = document.get("points")
    listed = points if isinstance(points, list) else []
    known = {point.get("n"): point for point in listed if isinstance(point, dict)}
    found: list[Mapping[str, Any]] = []
    for index, run in enumerate(runs):
        number = int(run.path.name) if run.path.name.isdecimal() else index
        found.append({"n": number, "label": f"#{number}"} | known.get(number, {}))
    return found


def _row(now: RunStatus, asked: str, point: Mapping[str, Any]) -> Row:
    run = RunDir(now.path)
    train = now.job("train")
    complete = train is not None and train.state == "COMPLETED"
    known = logged.last(run, {*LOSSES, asked}, complete)
    if complete and "loss" not in known:  # fewer steps than logging_steps: there is only the mean of all of them
        known["loss"] = (read_json(run.result("train")) or {}).get("train_loss")
    # the last word counts: of a training that diverged at its end an earlier, finite loss would be a lie
    loss, eval_loss = (values.number(known.get(name)) for name in LOSSES)
    metric = _share(run, now) if asked == "passed" else values.number(known.get(asked))
    trouble = first_trouble(now.pipeline_jobs)
    reason = now.reason if trouble is None else f"{trouble.kind}: {trouble.reason or trouble.state}"
    differing = point.get("values")
    return Row(
        rank=None,
        n=point["n"],
        label=str(point["label"]),
        values={str(key): str(value) for key, value in differing.items()} if isinstance(differing, dict) else {},
        state=now.state,
        loss=loss,
        eval_loss=eval_loss,
        metric=metric,
        passed=now.passed,
        hours=_hours(now),
        reason=reason if now.state not in ("COMPLETED", "RUNNING", "PENDING") or trouble else None,
        path=now.path,
    )


def _share(run: RunDir, now: RunStatus) -> float | None:
    """Of the answers with an expectation, how many met it."""
    job = now.job("infer")
    if job is None or job.state != "COMPLETED":
        return None
    known = [row["passed"] for row in read_jsonl(run.answers) if isinstance(row.get("passed"), bool)]
    return sum(known) / len(known) if known else None


def _hours(now: RunStatus) -> float | None:
    run = RunDir(now.path)
    own = [job for job in now.pipeline_jobs if job.started and job.finished and run.home(job.kind) == run]
    took = [seconds for job in own if (seconds := between(job.started, job.finished)) is not None and seconds >= 0]
    return sum(took) / 3600 if took else None


def _ranked(points: Sequence[Row], upwards: bool) -> list[Row]:
    def order(row: Row) -> tuple[float, float, float, int]:
        value = row.metric or 0.0
        inf = float("inf")
        # where many are equal (all passed), the losses tell them apart
        return (
            -value if upwards else value,
            inf if row.eval_loss is None else row.eval_loss,
            inf if row.loss is None else row.loss,
            row.n,
        )

    first = sorted((row for row in points if row.state == "COMPLETED" and row.metric is not None), key=order)
    others = sorted((row for row in points if row.state != "COMPLETED" or row.metric is None), key=_other)
    return [replace(row, rank=rank) for rank, row in enumerate(first, 1)] + others


def _other(row: Row) -> tuple[int, int]:
    states = ("COMPLETED", "RUNNING", "PENDING")
    return (states.index(row.state) if row.state in states else len(states), row.n)


def _logged(points: Sequence[Row]) -> tuple[str, ...]:
    ended = next((row for row in points if row.state == "COMPLETED"), None)
    return tuple(logged.names(RunDir(ended.path))) if ended else ()


def write(sweep: SweepDir, found: Board) -> Path:
    """Write leaderboard.csv, whole or not at all; returns its path. Raises OSError."""
    # the mark at its beginning tells spreadsheets that it is UTF-8: without it they show Chinese as noise
    write_text(sweep.leaderboard, "\ufeff" + table(found))
    return sweep.leaderboard


def table(found: Board) -> str:
    """The rows as RFC 4180 has them."""
    own = {"passed": "passed_share"}.get(found.metric, found.metric)
    extra = [own] if own not in LOSSES else []
    file = io.StringIO()
    writer = csv.writer(file)
    head = ["rank", "n", "label", *found.keys, "state", *LOSSES, *extra, "passed", "hours", "ranked_by", "path"]
    writer.writerow([harmless(name) for name in head])
    for row in found.rows:
        cells: list[object] = [row.rank, row.n, row.label, *(row.values.get(key) for key in found.keys), row.state]
        cells += [row.loss, row.eval_loss, *([row.metric] if extra else [])]
        cells += [None if row.passed is None else str(row.passed).lower()]
        cells += [None if row.hours is None else f"{row.hours:.4f}", found.metric, str(row.path)]
        writer.writerow([harmless(cell) if isinstance(cell, str) else cell for cell in cells])
    return file.getvalue()


def harmless(cell: str) -> str:
    """``cell`` so that a spreadsheet shows it and does not compute it; a number stays one."""
    try:
        float(cell)
    except ValueError:
        return f"'{safe(cell)}" if cell.startswith(_FORMULA) else safe(cell, keep="\n")
    return cell
