"""The top of the page: which run, how it ended, what was done, the few numbers that matter."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import PurePath

from pkuslurm.read import rules
from pkuslurm.read.job import JobStatus
from pkuslurm.read.report.facts import Facts, Json, number, objekt, share, word
from pkuslurm.read.report.markup import both, text
from pkuslurm.read.report.words import KINDS, STATES, tone
from pkuslurm.read.text import between, duration

# in Chinese, where a word of another script stands between spaces, and in English
METHODS = {
    "lora": (" LoRA ", "LoRA"),
    "oft": (" OFT ", "OFT"),
    "full": ("全量", "Full"),
    "freeze": ("冻结部分层的", "Freeze"),
}
STAGES = {
    "sft": ("微调", "fine-tuning"),
    "pt": ("继续预训练", "continued pre-training"),
    "rm": ("奖励模型训练", "reward-model training"),
    "ppo": (" PPO 强化学习", "PPO training"),
    "dpo": (" DPO 偏好训练", "DPO preference training"),
    "kto": (" KTO 偏好训练", "KTO preference training"),
}


def headline(facts: Facts) -> str:
    """The run's name, how it stands in one sentence, and its figures."""
    now = facts.now
    created = (now.created or "").replace("T", " ")[:16]
    label = f'<p class="label">{text(now.name)}</p>' if now.name else ""
    chinese, english = sentence(facts)
    return (
        f'<header><p class="brand"><b>pkuslurm</b> {both("运行报告", "Run report")}'
        f'<span class="when">{text(created)}</span></p>\n'
        f"<h1>{text(now.run_id)}</h1>{label}\n"
        f'<p class="verdict">{pill(facts.state)} {_passed(facts)}</p>\n'
        f'<p class="lead">{chinese}</p><p class="lead en" lang="en">{english}</p>\n'
        f"{_trouble(facts)}{_tiles(facts)}</header>\n"
    )


def pill(state: str) -> str:
    return f'<span class="pill {tone(state)}">{text(STATES.get(state, ""))} {text(state)}</span>'


def counts(facts: Facts) -> tuple[int, int] | None:
    """How many answers are as expected, of how many with an expectation; None without any."""
    known = [answer["passed"] for answer in facts.answers if isinstance(answer.get("passed"), bool)]
    return (sum(known), len(known)) if known and facts.completed("infer") else None


def sentence(facts: Facts) -> tuple[str, str]:
    """What was done (or is meant to be done), in Chinese and in English; HTML."""
    model = model_name(facts)
    made = word(facts.payload("prepare"), "make") is not None
    train = facts.now.job("train")
    if train is None:
        return (
            f"向 <b>{model}</b> 提问，并与基座对照。",
            f"Asked <b>{model}</b> and, where one is given, its base.",
        )
    per_node = int(number(facts.jobs.get("train", {}), "nproc_per_node") or 1)
    what, what_english = _task(objekt(facts.payload("prepare"), "train_args"))
    steps = number(facts.result("train"), "global_step")
    data, data_english = _data(facts)
    chinese = f"{data}对 <b>{model}</b>{'（此处自制）' if made else ''}做{what}："
    chinese += f"{train.num_nodes} 个节点，每节点 {per_node} 个进程"
    english = f"{what_english} of <b>{model}</b>{' (made here)' if made else ''}{data_english}"
    english += f": {plural(train.num_nodes, 'node')} × {plural(per_node, 'process', 'processes')}"
    if steps:
        chinese += f"，共 {steps:.0f} 步"
        english += f", {plural(int(steps), 'step')}"
    if facts.completed("merge"):
        chinese += "；已合并"
        english += "; merged"
    if facts.completed("infer"):
        chinese += f"，回答了 {len(facts.answers)} 个问题"
        english += f", asked {plural(len(facts.answers), 'question')}"
    return chinese + "。", english + "."


def _task(arguments: Json) -> tuple[str, str]:
    """What kind of training: its stage and what of the model is trained."""
    stage, method = word(arguments, "stage") or "sft", word(arguments, "finetuning_type") or "lora"
    how, how_english = METHODS.get(method, (f" {text(method)} ", text(method)))
    what, what_english = STAGES.get(stage, (f" {text(stage)} 训练", f"{text(stage)} training"))
    if how.endswith(" ") and not what.startswith(" "):
        return f"{how}{what}", f"{how_english} {what_english}"
    return f"{how.rstrip()}{what}", f"{how_english} {what_english}"


def _data(facts: Facts) -> tuple[str, str]:
    """Which data with how many rows, of several sets each, and what is held out."""
    sets = objekt(facts.result("prepare"), "dataset").get("sets")
    known = [one for one in sets if isinstance(one, dict)] if isinstance(sets, list) else []
    if len(known) < 2:
        rows = number(facts.result("prepare"), "dataset", "rows")
        name = f"<b>{data_name(facts)}</b>"
        return f"用 {name}" + (f"（{rows:.0f} 行）" if rows else ""), f" on {name}" + (
            f" ({plural(int(rows), 'row')})" if rows else ""
        )
    chinese, english = "", ""
    for use, before, after in (("train", "用 ", " on "), ("eval", "以 ", ", evaluated on ")):
        found = [one for one in known if one.get(use) is True]
        if found:
            chinese += before + "、".join(_named(one, "（{:.0f} 行）") for one in found)
            chinese += "验证，" if use == "eval" else "，" if len(known) > len(found) else ""
            english += after + ", ".join(_named(one, " ({:.0f} rows)") for one in found)
    return chinese, english


def _named(one: Json, rows: str) -> str:
    path, count = word(one, "file") or "?", number(one, "rows")
    return f"<b>{text(PurePath(path).name or path)}</b>" + ("" if count is None else rows.format(count))


def model_name(facts: Facts) -> str:
    """The model that was started from, as HTML."""
    prepare, infer = facts.payload("prepare"), facts.payload("infer")
    if made := word(prepare, "make"):
        return text(made)
    path = word(prepare, "model_path") or word(infer, "tuned") or word(infer, "base")
    return text(PurePath(path).name or path) if path else "未知模型 unknown model"


def data_name(facts: Facts) -> str:
    """The dataset's file name, as HTML."""
    path = word(facts.payload("prepare"), "dataset_file") or word(facts.results["prepare"], "dataset", "file")
    return text(PurePath(path).name or path) if path else "未知数据 unknown data"


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _passed(facts: Facts) -> str:
    found = counts(facts)
    if found is None:
        if facts.completed("infer"):
            return f'<span class="muted">{both("没有设定期望", "no expectation was set")}</span>'
        return f'<span class="muted">{both("尚无回答", "no answers yet")}</span>'
    good, total = found
    style = "good" if good == total else "bad"
    return f'<span class="score {style}">{both(f"{good}/{total} 符合期望", f"{good} of {total} as expected")}</span>'


def _trouble(facts: Facts) -> str:
    """The first failure, in its own words; without one what an unfinished run still waits for."""
    if facts.now.reason:
        return f'<p class="trouble">{text(facts.now.reason)}</p>'
    job = first_trouble(facts.now.jobs)
    if job is None:
        return ""
    name = both(KINDS.get(job.kind, ""), text(job.kind))
    return f'<p class="trouble"><b>{name}</b> {text(job.reason or STATES.get(job.state, job.state))}</p>'


def first_trouble(jobs: Sequence[JobStatus]) -> JobStatus | None:
    """The job that failed first; without one, one that is unknown or was cancelled."""
    bad = [job for job in jobs if job.state in (*rules.BROKEN, "UNKNOWN")]
    bad = bad or [job for job in jobs if job.state == "CANCELLED"]
    return min(bad, key=lambda one: (one.state == "UNKNOWN", one.finished is None, _moment(one.finished)), default=None)


def _moment(finished: str | None) -> float:
    return datetime.fromisoformat(finished).timestamp() if finished else 0.0


def _tiles(facts: Facts) -> str:
    tiles: list[tuple[str, str, str]] = []
    if (found := counts(facts)) is not None:
        tiles.append(("符合期望", "as expected", f"{found[0]}<small>/{found[1]}</small>"))
    if facts.losses:
        first, last = facts.losses[0][1], facts.losses[-1][1]
        start = f"<small>{first:.3g} →</small> " if len(facts.losses) > 1 else ""
        tiles.append(("损失", "loss", f"{start}{last:.3g}"))
    elif (mean := number(facts.result("train"), "train_loss")) is not None:
        tiles.append(("平均损失", "mean loss", f"{mean:.3g}"))
    steps = number(facts.result("train"), "global_step")
    progress = (job.progress if (job := facts.now.job("train")) else None) or {}
    if steps is not None:
        tiles.append(("步数", "steps", f"{steps:.0f}"))
    elif isinstance(progress.get("step"), int):
        tiles.append(("步数", "steps", f"{progress['step']}<small>/{progress.get('total_steps') or '?'}</small>"))
    merge = facts.result("merge")
    tensors, equal = number(merge, "tensors"), number(merge, "equal")
    if tensors is not None and equal is not None:
        tiles.append(("张量相同", "tensors equal", f"{equal:.0f}<small>/{tensors:.0f}</small>"))
    elif (same := share(facts.result("infer"), "token_ids_equal")) is not None:
        tiles.append(("模板一致", "template equal", f"{same[0]}<small>/{same[1]}</small>"))
    if (seconds := _seconds(facts)) is not None:
        tiles.append(("用时", "time", duration(seconds)))
    return listed(tiles) if tiles else ""


def listed(tiles: Sequence[tuple[str, str, str]]) -> str:
    cells = "".join(f"<div><dt>{both(one, other)}</dt><dd>{value}</dd></div>" for one, other, value in tiles)
    return f'<dl class="tiles">{cells}</dl>\n'


def _seconds(facts: Facts) -> float | None:
    """All that the jobs took, one after another."""
    took = [between(job.started, job.finished) for job in facts.now.jobs if job.started and job.finished]
    known = [one for one in took if one is not None and one >= 0]
    return sum(known) if known else None
