"""What came of the run: answers side by side, the loss curve, the checks, the disk used."""

from __future__ import annotations

from pkuslurm.read import asking
from pkuslurm.read.report.chart import chart
from pkuslurm.read.report.facts import Facts, Json, number, objekt, share, word
from pkuslurm.read.report.headline import plural
from pkuslurm.read.report.markup import both, missing, note, section, table, text
from pkuslurm.read.text import size

MOST_ANSWERS = 200
# the trainer's own, where the YAML has none
LOGGING_STEPS = 500
MARKS = {
    True: '<span class="mark good" title="符合期望 as expected">✓</span>',
    False: '<span class="mark bad" title="不符合期望 not as expected">✗</span>',
    None: '<span class="mark idle" title="没有期望 no expectation">–</span>',
}


def answers(facts: Facts) -> str:
    """Each prompt with its answers, of the base and of the tuned model."""
    if not facts.answers:
        body = missing("还没有回答：问答任务没有完成。", "No answers yet: the infer job has not completed.")
        return section("answers", "回答", "Answers", body)
    # what went wrong is what one looks for in a long list
    ordered = sorted(facts.answers, key=lambda answer: answer.get("passed") is not False)
    shown = list(facts.answers) if len(facts.answers) <= MOST_ANSWERS else ordered[:MOST_ANSWERS]
    body = "".join(_answer(answer) for answer in shown)
    if len(shown) < len(facts.answers):
        more = len(facts.answers) - len(shown)
        body += note(f"另有 {more} 个回答在 answers.jsonl 中。", f"{more} more are in answers.jsonl.")
    if not facts.completed("infer"):
        body = (
            missing("问答任务没有完成，以下可能不全。", "The infer job has not completed; this may be partial.") + body
        )
    return section("answers", "回答", "Answers", body)


def _answer(answer: Json) -> str:
    passed = answer.get("passed")
    mark = MARKS[passed if isinstance(passed, bool) else None]
    return (
        f'<article class="answer"><h3>{mark}<span class="said">{_said(answer.get("prompt"))}</span></h3>'
        '<div class="pair">'
        f"<div><h4>{both('基座', 'Base')}</h4>{_paragraph(answer.get('base'))}</div>"
        f'<div class="tuned"><h4>{both("微调后", "Tuned")}</h4>{_paragraph(answer.get("tuned"))}</div>'
        "</div></article>\n"
    )


def _paragraph(value: object) -> str:
    return f'<p class="said">{_said(value)}</p>'


def _said(value: object) -> str:
    if value is None:
        return f'<span class="muted">{both("没有问", "not asked")}</span>'
    if value == "":
        return f'<span class="muted">{both("（空）", "(empty)")}</span>'
    return text(value)


def loss(facts: Facts) -> str:
    """The curves, drawn twice: for a wide page and for a narrow one."""
    if facts.now.jobs and facts.now.job("train") is None:
        return ""
    odd = ""
    if facts.not_finite:
        odd = note(
            f"有 {facts.not_finite} 步的损失不是有限数（NaN 或无穷），没有画出。",
            f"At {plural(facts.not_finite, 'step')} the loss was not finite (NaN or infinite); not drawn.",
            "alert",
        )
    if not facts.losses and not facts.evals:
        return section("loss", "损失曲线", "Loss", odd + missing(*_no_losses(facts)))
    if len(facts.losses) == 1:
        odd += note(
            f"训练损失只记录了一次（第 {facts.losses[0][0]} 步），看不出变化；train.logging_steps=1 每步记录。",
            f"The training loss was logged only once (step {facts.losses[0][0]}), which shows no change; "
            "train.logging_steps=1 logs each step.",
        )
    stage = word(facts.payload("prepare"), "train_args", "stage") or "sft"
    unit = "损失 loss (nats/token)" if stage in ("sft", "pt") else "损失 loss"
    keys = [("loss", "训练", "training")] if facts.losses else []
    keys += [("eval", "验证", "evaluation")] if facts.evals else []
    legend = "".join(f'<span class="key {name}">{both(one, other)}</span>' for name, one, other in keys)
    drawn = chart(facts.losses, facts.evals, unit, 920, 320, "wide")
    # the same curve in other proportions: scaled down to a phone the first one's letters could not be read
    drawn += chart(facts.losses, facts.evals, unit, 380, 260, "narrow")
    return section("loss", "损失曲线", "Loss", f'<p class="legend">{legend}</p>{odd}<div class="panel">{drawn}</div>')


def _no_losses(facts: Facts) -> tuple[str, str]:
    """Why there is no curve; of a training that has ended, with what is known of its loss."""
    if not facts.completed("train"):
        return "没有损失数据：训练还没有写出 trainer_log.jsonl。", "No losses: training wrote none yet."
    chinese, english = "没有损失曲线：训练没有记录过损失", "No curve: the training logged no loss"
    steps = number(facts.result("train"), "global_step")
    every = number(facts.payload("prepare"), "train_args", "logging_steps") or LOGGING_STEPS
    if steps is not None and every > steps:
        chinese += f"（train.logging_steps 是 {every:g}，而训练只有 {steps:.0f} 步；写 train.logging_steps=1 每步记录）"
        english += f" (train.logging_steps is {every:g}, and there were {plural(int(steps), 'step')}; with "
        english += "train.logging_steps=1 each is logged)"
    if (mean := number(facts.result("train"), "train_loss")) is not None:
        chinese += f"。各步的平均损失为 <b>{mean:.4f}</b>"
        english += f". The mean loss of all steps is <b>{mean:.4f}</b>"
    return chinese + "。", english + "."


def checks(facts: Facts) -> str:
    """What merge proved and what infer compared."""
    rows = [*_merge(facts), *_infer(facts)]
    if not rows:
        body = missing(
            "还没有检查结果：合并与问答任务没有完成。", "No checks yet: neither merge nor infer has completed."
        )
        return section("checks", "检查", "Checks", body)
    return section("checks", "检查", "Checks", f'<ul class="checks">{"".join(rows)}</ul>')


def _check(good: bool | None, title: str, chinese: str, english: str, more: str = "") -> str:
    """``more``: what stands below the sentences, as HTML."""
    mark = {True: "good", False: "bad", None: "idle"}[good]
    sign = {True: "✓", False: "✗", None: "i"}[good]
    return (
        f'<li><span class="mark {mark}">{sign}</span><div><h3>{title}</h3>'
        f'<p>{chinese}<br><span class="en" lang="en">{english}</span></p>{more}</div></li>\n'
    )


def _merge(facts: Facts) -> list[str]:
    merge = facts.result("merge")
    tensors, equal = number(merge, "tensors"), number(merge, "equal")
    if tensors is None:
        return []
    name = both("合并", "Merge")
    if equal is None:
        what = f"全量微调，模型已经完整：{tensors:.0f} 个张量原样链接，并能加载。"
        other = f"A full fine-tune is a whole model already: {tensors:.0f} tensors linked as they are, and it loads."
        return [_check(True, name, what, other)]
    dtype = text(word(merge, "dtype") or "?")
    difference = number(merge, "max_abs_diff")
    most = "" if difference is None else f"；最大差 {difference:.3g}"
    most_english = "" if difference is None else f"; largest difference {difference:.3g}"
    return [
        _check(
            equal == tensors,
            name + f' <span class="fact">{equal:.0f}/{tensors:.0f}</span>',
            f"磁盘上的合并模型与重新计算的“基座 + 适配器”（{dtype}）逐个张量比较：{equal:.0f} 个全部相同{most}。"
            if equal == tensors
            else f"{tensors:.0f} 个张量中只有 {equal:.0f} 个与重新计算的“基座 + 适配器”（{dtype}）相同{most}。",
            f"Every tensor of the merged files is compared with base + adapter computed anew in {dtype}: "
            f"{equal:.0f} of {tensors:.0f} are equal{most_english}.",
        )
    ]


def _infer(facts: Facts) -> list[str]:
    infer, rows = facts.result("infer"), []
    if (same := share(infer, "adapter_merged_equal")) is not None:
        distance = number(infer, "max_logit_diff")
        logits = "" if distance is None else f"；logits 最大差 {distance:.3g}"
        logits_english = "" if distance is None else f"; largest logit difference {distance:.3g}"
        rows.append(
            _check(
                True if same[0] == same[1] else None,
                both("适配器与合并后", "Adapter and merged") + f' <span class="fact">{same[0]}/{same[1]}</span>',
                f"同样的问题，{same[1]} 个中有 {same[0]} 个回答逐字相同{logits}。"
                "仅供参考：bf16 合并会舍入，正确的合并也可能略有不同。",
                f"Asked the same, {same[0]} of {same[1]} answers are equal to the letter{logits_english}. "
                "For information: a correct bf16 merge is rounded and may answer a little differently.",
                _differences(infer),
            )
        )
    if (found := asking.read(infer)) is not None:
        rows.append(_template(found))
    return rows


def _template(found: asking.Asking) -> str:
    """Whether other programs ask as the training did; where not, what is different and what to do."""
    title = both("对话模板", "Chat template") + f' <span class="fact">{found.same}/{found.total}</span>'
    chinese = (
        f"LLaMA-Factory 的模板与合并模型自带的 chat_template 对 {found.total} 个问题给出的 token，{found.same} 个相同"
    )
    english = (
        f"For {found.same} of {plural(found.total, 'prompt')} LLaMA-Factory's template and the merged model's own "
        "chat_template give the same token ids"
    )
    if found.same == found.total:
        chinese += "：别的程序（vLLM、transformers）会以同样的方式提问。"
        english += ": other programs (vLLM, transformers) ask in the same way."
        return _check(True, title, chinese, english)
    chinese += "：别的程序（vLLM、transformers）提问的方式与训练时不同，回答可能变差。"
    english += ": other programs (vLLM, transformers) ask otherwise than the training did, and answers may be worse."
    chinese += "请用与模型相配的 <code>model.template</code> 训练（auto 会自动选择）"
    chinese += "；若只差一段系统提示，也可写 <code>train.default_system=''</code>" if found.only_training else ""
    chinese += "。<code>serve.engine=llamafactory</code> 的提问方式与训练时相同。"
    english += f" What to do: {text(found.remedy)}."
    return _check(False, title, chinese, english, _texts(found))


def _texts(found: asking.Asking) -> str:
    """What each of the two templates alone writes."""
    if found.training is None or found.saved is None:
        return ""
    sides = (
        (both("仅训练模板有", "only training's"), found.training),
        (both("仅 chat_template 有", "only chat_template's"), found.saved),
    )
    shown = ((name, f'<code class="said">{text(words)}</code>' if words else "–") for name, words in sides)
    return f'<dl class="pairs">{"".join(f"<div><dt>{name}</dt><dd>{words}</dd></div>" for name, words in shown)}</dl>'


def _differences(infer: Json) -> str:
    found = objekt(infer).get("differences")
    pairs = [one for one in found if isinstance(one, dict)][:5] if isinstance(found, list) else []
    if not pairs:
        return ""
    rows = [[_said(one.get("prompt")), _said(one.get("adapter")), _said(one.get("merged"))] for one in pairs]
    header = [("问题", "prompt"), ("适配器", "adapter"), ("合并后", "merged")]
    return f"<details><summary>{both('不同之处', 'Differences')}</summary>{table(header, rows, 'cards')}</details>"


def disk(facts: Facts) -> str:
    """What lies in the run's directory, by size."""
    if not facts.sizes:
        return ""
    total, most = sum(count for _, count in facts.sizes), facts.sizes[0][1] or 1
    rows = "".join(
        f'<div class="bar"><span class="what">{text(name)}</span><span class="track"><i style="width:'
        f'{100 * count / most:.1f}%"></i></span><span class="much">{size(count)}</span></div>'
        for name, count in facts.sizes
    )
    words = note(f"共 {size(total)}：{text(facts.run.path)}", f"{size(total)} in all.")
    return section("disk", "磁盘", "Disk", f'<div class="bars">{rows}</div>{words}')
