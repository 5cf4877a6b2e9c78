"""A sweep's report.html: which point is the best, how all of them stand, their curves, what failed and why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import report, rules, values
from pkuslurm.read.report import leaderboard
from pkuslurm.read.report.details import settings_of, versions_of
from pkuslurm.read.report.facts import curves
from pkuslurm.read.report.headline import listed, pill, plural
from pkuslurm.read.report.leaderboard import Board, Row
from pkuslurm.read.report.markup import both, missing, note, section, table, text
from pkuslurm.read.report.page import framed
from pkuslurm.read.report.sweep_chart import MOST_CURVES, Curve, overlay
from pkuslurm.read.report.words import STATES
from pkuslurm.read.status import RunStatus
from pkuslurm.read.sweep import SweepStatus, first_broken
from pkuslurm.read.text import duration
from pkuslurm.read.values import unix
from pkuslurm.rundir import RunDir, read_json, write_text
from pkuslurm.sweepdir import SweepDir

MOST_ROWS = 200
# what one sees at once; what follows is opened by a click
OPEN_ROWS = 20
MOST_REASONS = 20
MOST_LINKS = 100
# of more points than these the numbers alone
MOST_LABELS = 6
# beside the rank, the state and the numbers there is room for so many
MOST_KEYS = 4
METRICS = {"eval_loss": "验证损失", "loss": "训练损失", "passed": "符合期望的比例"}
SHARED = ("各组合共有的、与默认值不同的设置", "what differs from the defaults in all points alike")
# each of a point's files that tells how it stands, but not its page
_CHANGING = ("run.json", "answers.jsonl", "state/*.json", "done/*.json", "results/*.json", "adapter/trainer_log.jsonl")


def write(now: SweepStatus) -> Path:
    """Write leaderboard.csv, the pages of points that have ended, and the sweep's page; returns its path.

    Raises OSError where the sweep's own files cannot be written; a point's page that cannot is left out.
    """
    sweep = SweepDir(now.path)
    found = leaderboard.board(now)
    leaderboard.write(sweep, found)
    for run in now.runs:
        _point(run)
    write_text(sweep.own.report, build(now, found))
    return sweep.own.report


def build(now: SweepStatus, found: Board) -> str:
    """The page as text."""
    body = "".join(
        (
            _headline(now, found),
            _table(found),
            _curves(found),
            _failed(found),
            settings_of({"settings": _common(now)}, SHARED),
            versions_of(now.document, _results(found)),
        )
    )
    return framed(f"{now.sweep_id} · {_state(now)}", body)


def _state(now: SweepStatus) -> str:
    """The sweep's state without the job that writes this very page."""
    if not any(job.kind == "report" and job.state in ("RUNNING", "PENDING") for job in now.jobs):
        return now.state
    ends = [(run.state, first_broken(run)) for run in now.runs]
    others = [(job.state, unix(job.finished)) for job in now.jobs if job.kind != "report"]
    return rules.run_state([*others, *((state, unix(job.finished) if job else None) for state, job in ends)])


def _point(now: RunStatus) -> None:
    """The page of one point, if it has ended after it was written last."""
    run = RunDir(now.path)
    begun = any(job.started and run.home(job.kind) == run for job in now.jobs)
    if now.state in ("RUNNING", "PENDING", "UNKNOWN") or not begun:
        return
    with suppress(Exception):  # whatever is wrong with one point's files, the others have their pages
        page = run.report
        changed = (file.stat().st_mtime for pattern in _CHANGING for file in now.path.glob(pattern))
        if not page.is_file() or page.stat().st_mtime <= max(changed, default=0.0):
            report.write(now.path, now)


def _headline(now: SweepStatus, found: Board) -> str:
    created = (now.created or "").replace("T", " ")[:16]
    label = f'<p class="label">{text(now.name)}</p>' if now.name else ""
    counts = "".join(
        f'<span class="count">{count} {both(text(STATES.get(state, "")), text(state))}</span>'
        for state, count in now.counts.items()
        if count
    )
    first = leaderboard.best(found.rows)
    chinese, english = _sentence(found, first)
    return (
        f'<header><p class="brand"><b>pkuslurm</b> {both("参数扫描报告", "Sweep report")}'
        f'<span class="when">{text(created)}</span></p>\n'
        f"<h1>{text(now.sweep_id)}</h1>{label}\n"
        f'<p class="verdict">{pill(_state(now))} {counts}</p>\n'
        f'<p class="lead">{chinese}</p><p class="lead en" lang="en">{english}</p>\n'
        f"{_tiles(found, first)}{_model(first)}</header>\n"
    )


def _sentence(found: Board, first: Row | None) -> tuple[str, str]:
    total, complete = len(found.rows), sum(row.state == "COMPLETED" for row in found.rows)
    keys = ", ".join(f"<b>{text(key)}</b>" for key in found.keys) or "–"
    chinese = f"{total} 个组合，变化的是 {keys}；{complete} 个已完成"
    english = f"{plural(total, 'point')}, differing in {keys}; {complete} complete"
    if first and first.metric is not None:
        chinese += f"。最好的是 <b>#{first.n} {_label(first)}</b>，{_metric(found)[0]} {_number(first.metric)}"
        english += f". The best is <b>#{first.n} {_label(first)}</b>, {_metric(found)[1]} {_number(first.metric)}"
    return chinese + "。", english + "."


def _metric(found: Board) -> tuple[str, str]:
    """What the points are ranked by, as HTML."""
    return METRICS.get(found.metric, text(found.metric)), text(found.metric.replace("_", " "))


def _tiles(found: Board, first: Row | None) -> str:
    complete = sum(row.state == "COMPLETED" for row in found.rows)
    tiles = [("已完成", "complete", f"{complete}<small>/{len(found.rows)}</small>")]
    if first and first.metric is not None:
        chinese, english = _metric(found)
        tiles.append((f"最好的{chinese}", f"best {english}", _number(first.metric)))
        last = [row for row in found.rows if row.rank is not None][-1]
        if last is not first and last.metric is not None:
            tiles.append((f"最差的{chinese}", f"worst {english}", _number(last.metric)))
    if took := [row.hours for row in found.rows if row.hours is not None]:
        tiles.append(("各组合用时之和", "time of all points", duration(3600 * sum(took))))
    return listed(tiles)


def _model(first: Row | None) -> str:
    if first is None:
        return ""
    try:
        where = f"<code>{text(leaderboard.merged(first))}</code>"
    except PkuslurmError as error:
        where = text(error)
    return f'<dl class="pairs"><div><dt>{both("最好的模型", "Best model")}</dt><dd>{where}</dd></div></dl>\n'


def _table(found: Board) -> str:
    if not found.rows:
        return section("board", "排名", "Leaderboard", missing("没有任何组合。", "There are no points."))
    keys = found.keys if 0 < len(found.keys) <= MOST_KEYS else ()
    header = [("名次", "rank"), ("组合", "point")]
    header += [("", text(_short(key, found.keys))) for key in keys] or [("设置", "settings")]
    header += [("状态", "state"), ("训练损失", "loss"), ("验证损失", "eval loss")]
    header += [] if found.metric in leaderboard.LOSSES else [_metric(found)]
    header += [] if found.metric == "passed" else [("符合期望", "passed")]
    header += [("小时", "hours")]
    rows = [_cells(row, keys, found.metric) for row in found.rows[:MOST_ROWS]]
    body = "" if found.note is None else note(f"{text(found.note[0])}。", f"{text(found.note[1])}.", "alert")
    body += table(header, rows[:OPEN_ROWS], "cards board")
    if rest := rows[OPEN_ROWS:]:
        words = both(f"其余 {len(rest)} 个", f"{len(rest)} more")
        body += f"<details><summary>{words}</summary>{table(header, rest, 'cards board')}</details>"
    if (more := len(found.rows) - len(rows)) > 0:
        body += note(f"另有 {more} 个组合在 leaderboard.csv 中。", f"{more} more are in leaderboard.csv.")
    return section("board", "排名", "Leaderboard", body)


def _cells(row: Row, keys: Sequence[str], metric: str) -> list[str]:
    own = [] if metric in leaderboard.LOSSES else [_number(row.metric)]
    passed = {None: "–", True: '<span class="good">✓</span>', False: '<span class="bad">✗</span>'}
    hours = row.hours or 0.0
    return [
        f"<b>{row.rank}</b>" if row.rank else "–",
        _link(row),
        *([f"<code>{text(row.values.get(key, '–'))}</code>" for key in keys] or [f"<code>{_label(row)}</code>"]),
        pill(row.state),
        _number(row.loss),
        _number(row.eval_loss),
        *own,
        *([] if metric == "passed" else [passed[row.passed]]),
        "–" if row.hours is None else f"{hours:.2f}" if hours >= 0.1 else f"{hours:.3f}",
    ]


def _short(key: str, keys: Sequence[str]) -> str:
    """The last part of a key, unless another one ends so, too."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _link(row: Row) -> str:
    """Its number, which leads to its own page where there is one."""
    there = RunDir(row.path).report.is_file()
    return f'<a href="{row.n}/report.html">#{row.n}</a>' if there else f"#{row.n}"


def _label(row: Row) -> str:
    """Its label, which breaks between settings rather than inside of one."""
    return "".join(f'<span class="part">{text(part)}</span>' for part in re.findall(r"[^,]*,|[^,]+$", row.label))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:#.4g}"


def _curves(found: Board) -> str:
    drawn: list[Curve] = []
    left = 0
    for row in found.rows:
        if len(drawn) == MOST_CURVES:
            left += row.loss is not None
            continue
        losses, evals, _ = curves(RunDir(row.path))
        drawn += [Curve(row.n, row.label, losses, evals)] if losses else []
    if not drawn:
        body = missing("没有损失数据：还没有训练写出损失。", "No losses: no training has written any yet.")
        return section("loss", "损失曲线", "Loss", body)
    first = leaderboard.best(found.rows)
    best = first.n if first and any(curve.n == first.n for curve in drawn) else None
    keys = []
    if first and best is not None:
        keys.append(("loss", f"#{best} {_label(first)}", "best"))
        if any(curve.n == best and curve.evals for curve in drawn):
            keys.append(("eval", "它的验证损失", "its evaluation"))
    if len(drawn) > (best is not None):
        keys.append(("other", f"另外 {len(drawn) - (best is not None)} 个", "others"))
    legend = "".join(f'<span class="key {name}">{both(one, other)}</span>' for name, one, other in keys)
    pictures = overlay(drawn, best, "损失 loss", 920, 360, "wide") + overlay(
        drawn, best, "损失 loss", 380, 300, "narrow"
    )
    rest = note(f"另有 {left} 条曲线没有画出。", f"{left} more are not drawn.") if left else ""
    body = f'<p class="legend">{legend}</p><div class="panel">{pictures}</div>{rest}'
    return section("loss", "损失曲线", "Loss", body)


def _failed(found: Board) -> str:
    """What went wrong, the same reason once; with the points that it met."""
    groups: dict[str, list[Row]] = {}
    for row in found.rows:
        if row.reason is not None:
            groups.setdefault(_alike(row), []).append(row)
    if not groups:
        return ""
    ordered = sorted(groups.values(), key=len, reverse=True)
    items = []
    for rows in ordered[:MOST_REASONS]:
        rows = sorted(rows, key=lambda row: row.n)
        if len(rows) <= MOST_LABELS:
            points = "<br>".join(f"{_link(row)} {_label(row)}" for row in rows)
        else:
            points = " ".join(_link(row) for row in rows[:MOST_LINKS])
        points += f" … +{len(rows) - MOST_LINKS}" if len(rows) > MOST_LINKS else ""
        items.append(
            f'<li><span class="mark bad">{len(rows)}</span><div><h3>{text(_reason(rows[0]))}</h3>'
            f'<p class="muted">{points}</p></div></li>\n'
        )
    more = len(ordered) - len(items)
    rest = note(f"另有 {more} 种原因。", f"{plural(more, 'more reason')}.") if more > 0 else ""
    return section("failed", "没有完成的", "Not complete", f'<ul class="checks">{"".join(items)}</ul>{rest}')


def _reason(row: Row) -> str:
    """In its own words; files of the sweep as one finds them from its folder."""
    return (row.reason or "").replace(f"{row.path.parent}/", "")


def _alike(row: Row) -> str:
    """The reason without what belongs to this point alone: its number, those of jobs, processes and hosts."""
    return row.state + re.sub(r"\d+", "0", _reason(row))


def _common(now: SweepStatus) -> list[object]:
    """The settings that are the same in all points; a group that varies (dataset=a,b) brings its own with it."""
    known = [found for run in now.runs if isinstance(found := run.document.get("settings"), list)]
    return [item for item in known[0] if all(item in other for other in known[1:])] if known else []


def _results(found: Board) -> list[Mapping[str, object]]:
    """What the payloads of one point, the best there is, say that they ran with."""
    for row in found.rows:
        results = [read_json(RunDir(row.path).result(kind)) or {} for kind in ("prepare", "train", "merge", "infer")]
        if any(values.text(name) for result in results for name in result.get("versions") or ()):
            return list(results)
    return []
