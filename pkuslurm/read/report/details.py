"""How the run was made: its jobs, their times, settings, versions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from pkuslurm.read.job import JobStatus
from pkuslurm.read.report.facts import Facts, number, objekt
from pkuslurm.read.report.headline import pill
from pkuslurm.read.report.markup import both, missing, section, table, text
from pkuslurm.read.report.words import KINDS, PHASES, tone
from pkuslurm.read.text import between, duration

LONGEST_VALUE = 400
DIFFERING = ("只列出与默认值不同的设置", "only what differs from the defaults")


def timings(facts: Facts) -> str:
    """How long each job took, and its parts."""
    took = {job.kind: _seconds(job) for job in facts.now.jobs}
    known = [seconds for seconds in took.values() if seconds]
    if not known:
        body = missing("没有时间：还没有任务开始。", "No times: no job has started.")
        return section("timings", "用时", "Timings", body)
    rows = []
    for job in facts.now.jobs:
        seconds = took[job.kind]
        much = "–" if seconds is None else duration(seconds)
        width = max(0.4, 100 * (seconds or 0) / max(known))
        drawn = "" if seconds is None else f'<i class="{tone(job.state)}" style="width:{width:.1f}%"></i>'
        rows.append(
            f'<div class="bar"><span class="what">{_kind(job.kind)}</span><span class="track">{drawn}</span>'
            f'<span class="much">{much}</span>{_phases(facts, job.kind)}</div>'
        )
    return section("timings", "用时", "Timings", f'<div class="bars">{"".join(rows)}</div>')


def _phases(facts: Facts, kind: str) -> str:
    parts = objekt(facts.result(kind), "seconds")
    shown = [
        f"{PHASES.get(name, '')} {text(name)} {seconds:.1f} s".strip()
        for name in parts
        if (seconds := number(parts, name)) is not None and seconds >= 0.1
    ]
    return f'<span class="phases">{" · ".join(shown)}</span>' if shown else ""


def jobs(facts: Facts) -> str:
    """Each job as `status` has it: state, attempt, nodes, times, reason."""
    if not facts.now.jobs:
        body = missing("run.json 缺失或损坏，不知道有哪些任务。", "run.json is missing or damaged: no jobs are known.")
        return section("jobs", "任务", "Jobs", body)
    header = [
        ("任务", "job"),
        ("状态", "state"),
        ("编号", "id"),
        ("次", "attempt"),
        ("节点", "nodes"),
        ("开始", "started"),
        ("结束", "finished"),
        ("退出码", "exit"),
    ]
    rows = []
    for job in facts.now.jobs:
        own = job.kind == "report" and job.state in ("RUNNING", "PENDING")
        reason = both("写出本页的任务", "it writes this page") if own else text(job.reason or "")
        rows.append(
            [
                _kind(job.kind),
                "–" if own else pill(job.state),
                f"<code>{text(job.job_id)}</code>" if job.job_id else "–",
                str(job.attempt),
                "<br>".join(text(node) for node in job.nodes) or str(job.num_nodes),
                _time(job.started),
                _time(job.finished),
                "–" if job.exit_code is None else str(job.exit_code),
                reason,
            ]
        )
    return section("jobs", "任务", "Jobs", table(header, rows, "cards jobs"))


def settings(facts: Facts) -> str:
    return settings_of(facts.now.document)


def settings_of(document: Mapping[str, object], words: tuple[str, str] = DIFFERING) -> str:
    """What a run's document says is not as by default; ``words``: what stands above the table."""
    found = document.get("settings")
    rows = []
    for item in found if isinstance(found, list) else []:
        if isinstance(item, dict):
            rows.append(
                [
                    f"<code>{text(item.get('key', '?'))}</code>",
                    f"<code>{_value(item.get('value'))}</code>",
                    f'<code class="muted">{_value(item.get("default"))}</code>',
                    text(item.get("origin") or "–"),
                ]
            )
    if not rows:
        body = missing("没有与默认值不同的设置。", "No setting differs from its default.")
        return section("settings", "设置", "Settings", body)
    header = [("键", "key"), ("值", "value"), ("默认", "default"), ("来源", "origin")]
    body = f'<p class="muted">{both(*words)}</p>'
    return section("settings", "设置", "Settings", body + table(header, rows, "cards"))


def versions(facts: Facts) -> str:
    """What launched and what computed: two interpreters, maybe on two machines."""
    return versions_of(facts.now.document, [facts.results[kind] for kind in ("prepare", "train", "merge", "infer")])


def versions_of(document: Mapping[str, object], results: Sequence[Mapping[str, object]]) -> str:
    """Those that ``document`` was written with, and those that the payloads with ``results`` say they ran with."""
    launched = _versions(document.get("versions"))
    computed: dict[str, str] = {}
    for result in results:
        computed |= _versions(result.get("versions"))
    names = list(dict.fromkeys([*launched, *computed]))
    if not names:
        return section("versions", "版本", "Versions", missing("没有版本信息。", "No versions are known."))
    header = [("软件", "package"), ("启动处", "launched with"), ("计算处", "computed with")]
    rows = [
        [f"<code>{text(name)}</code>", text(launched.get(name, "–")), text(computed.get(name, "–"))] for name in names
    ]
    return section("versions", "版本", "Versions", table(header, rows, "narrow"))


def _versions(value: object) -> dict[str, str]:
    return {str(name): str(version) for name, version in value.items()} if isinstance(value, Mapping) else {}


def _kind(kind: str) -> str:
    return both(KINDS.get(kind, ""), text(kind))


def _seconds(job: JobStatus) -> float | None:
    if job.started is None or (job.finished is None and job.state != "RUNNING"):
        return None
    if job.kind == "report" and job.finished is None:
        return None  # it is writing this page
    seconds = between(job.started, job.finished)
    return None if seconds is None else max(0.0, seconds)


def _time(moment: str | None) -> str:
    """Day and time; the zone is the run's own, said once a job would be noise."""
    if moment is None:
        return "–"
    return f'<time datetime="{text(moment)}">{text(moment[5:10])} {text(moment[11:19])}</time>'


def _value(value: object) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text(shown, LONGEST_VALUE)
