"""The data of the run: what prepare kept of it, and how many steps that makes."""

from __future__ import annotations

from pkuslurm.read.report.facts import Facts, Json, number, objekt
from pkuslurm.read.report.markup import both, missing, section, text

MOST_FILES = 20
_COUNTS = (
    ("rows", "读入 read"),
    ("kept", "保留 kept"),
    ("dropped", "丢弃 dropped"),
    ("cut", "截断 cut"),
    ("held", "验证 held out"),
)


def data(facts: Facts) -> str:
    """What prepare kept of the data, and how many steps that makes."""
    if facts.now.jobs and facts.now.job("prepare") is None:
        return ""
    result = facts.result("prepare")
    if not result:
        body = missing("没有数据统计：准备任务没有完成。", "No counts: the prepare job has not completed.")
        return section("data", "数据", "Data", body)
    found, steps = objekt(result, "dataset"), objekt(result, "steps")
    rows = [(both("文件", "File"), _files(found))]
    rows += [(both("格式", "Format"), text(found["formatting"]))] if found.get("formatting") else []
    blocks, unit = number(found, "blocks"), "行 rows"
    # of packed rows these, too, are blocks
    found = found if blocks is not None else {**found, "held": found.get("eval_rows")}
    counts = [
        f"{name} {count:.0f}"
        for key, name in _COUNTS
        if (count := number(found, key)) is not None and (count or key in ("rows", "kept", "dropped"))
    ]
    rows.append((both("行", "Rows"), "，".join(counts) + _reasons(found)))
    if blocks is not None:
        unit = "块 blocks"
        held = number(found, "eval_rows")
        told = f"{blocks:.0f}" + (f"，验证 held out {held:.0f}" if held else "")
        length = number(found, "block")
        words = "" if length is None else f"拼接成不超过 {length:.0f} 个 token 的块（cutoff_len）"
        english = "" if length is None else f"rows packed, up to {length:.0f} tokens each"
        rows.append((both("块", "Blocks"), f"{told}<br>{both(words, english)}"))
    tokens = number(found, "tokens")
    if tokens is not None:
        rows.append((both("词元", "Tokens"), f"{tokens:,.0f}"))
    if found.get("cached") is True:
        rows.append((both("缓存", "Cache"), both("分词结果来自缓存", "tokenized before, taken from the cache")))
    if arithmetic := _arithmetic(steps, unit):
        rows.append((both("步数", "Steps"), arithmetic))
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    warnings = result.get("warnings")
    alerts = "".join(
        f'<p class="note alert">{text(one)}</p>' for one in (warnings if isinstance(warnings, list) else [])[:20]
    )
    return section("data", "数据", "Data", f'<dl class="pairs">{listed}</dl>{alerts}')


def _reasons(found: Json) -> str:
    reasons = objekt(found, "reasons")
    if not reasons:
        return ""
    told = "；".join(f"{text(why)}: {text(count)}" for why, count in list(reasons.items())[:10])
    return f'<br><span class="en">{told}</span>'


def _files(found: Json) -> str:
    """Each set's file with its rows, those that are held out as such."""
    sets = found.get("sets")
    known = [one for one in sets if isinstance(one, dict)] if isinstance(sets, list) else []
    if len(known) < 2:
        return text(found.get("file", "?"))
    lines = []
    for one in known[:MOST_FILES]:
        rows = number(one, "rows")
        told = text(one.get("file", "?")) + ("" if rows is None else f" · {rows:.0f} 行 rows")
        lines.append(told + (" · 验证 evaluation" if one.get("eval") is True else ""))
    lines += [f"… +{len(known) - MOST_FILES}"] if len(known) > MOST_FILES else []
    return "<br>".join(lines)


def _arithmetic(steps: Json, unit: str) -> str:
    """How the number of steps comes about, as one would compute it by hand."""
    names = ("ranks", "per_device", "gradient_accumulation", "effective_batch", "per_epoch", "total")
    ranks, device, accumulation, batch, epoch, total = (number(steps, name) for name in names)
    if batch is None or total is None:
        return ""
    first = ""
    if ranks and device and accumulation:
        first = f"{ranks:.0f} 进程 ranks × {device:.0f} {unit} × 累积 accumulation {accumulation:.0f} = "
    each = f"，每轮 per epoch {epoch:.0f} 步 steps" if epoch is not None else ""
    return f"{first}每步 per step {batch:.0f} {unit}{each}，共 in all <b>{total:.0f}</b>"
