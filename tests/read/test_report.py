"""The report: whole, self-contained, and harmless whatever a model, a dataset or a config says."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkuslurm.read import report
from pkuslurm.read.closing import closing
from pkuslurm.read.report.chart import chart, decimated, smoothed, ticks
from pkuslurm.read.report.facts import gather
from pkuslurm.read.report.markup import plain, text
from pkuslurm.read.report.words import PHASES
from pkuslurm.rundir import write_json, write_text
from tests.conftest import REPO
from tests.read import fake_run
from tests.read.fake_run import HOSTILE, complete, edit, finished, losses, make, state

SECTIONS = ["answers", "loss", "checks", "data", "timings", "jobs", "settings", "versions", "disk"]
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Elements that are open must be closed; gathers what is there."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.ids: list[str] = []
        self.words = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.words += data


def test_it_is_one_file_that_loads_and_runs_nothing(weird: Path) -> None:
    run = finished(weird)
    assert report.write(run.path) == run.report
    source = run.report.read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in source
    page = Page(source)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "embed", "form", "a"}
    assert not {name for name in page.names if name.startswith("on")} and not page.names & {"src", "href", "srcset"}
    assert "url(" not in source and "@import" not in source and "http://" not in source and "https://" not in source
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert len(page.ids) == len(set(page.ids))
    for word in ("通义千问", "北大助手", "2/3 符合期望", "291/291", "你是谁", "7,421", "train.learning_rate", "已完成"):
        assert word in page.words, word
    assert page.words.count("✓") == 4 and page.words.count("✗") == 1


def test_only_its_owner_reads_it_unless_the_run_is_the_groups(tmp_path: Path) -> None:
    run = finished(tmp_path)
    for folder, file in ((0o700, 0o600), (0o750, 0o640)):
        run.path.chmod(folder)
        assert report.write(run.path).stat().st_mode & 0o777 == file
    assert not list(run.path.glob(".report*"))


def test_hostile_text_everywhere(tmp_path: Path) -> None:
    """In every text of every file."""
    run = finished(tmp_path, run_id="x<script>alert(7)<", name=HOSTILE)
    for file in [*run.path.glob("results/*.json"), *run.path.glob("state/*.json"), *run.path.glob("jobs/*.json")]:
        value = json.loads(file.read_text(encoding="utf-8"), object_hook=_poison)
        write_json(file, value)
    document = json.loads(run.run_json.read_text(encoding="utf-8"))
    document["versions"] = {HOSTILE: HOSTILE}
    document["settings"] = [{"key": HOSTILE, "value": [HOSTILE], "default": HOSTILE, "origin": HOSTILE}]
    write_json(run.run_json, document)
    (run.path / "<b>'\"\x1b").mkdir()
    write_text(run.path / "<b>'\"\x1b" / "x", "x")
    source = report.build(run.path)
    page = Page(source)
    assert not page.tags & {"script", "img"} and "onerror" not in page.names
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", source)
    assert "\\x1b" in page.words and "\\u202e" in page.words


def _poison(value: dict[str, object]) -> dict[str, object]:
    keep = ("state", "kind", "started", "finished", "host", "run_id")
    return {key: HOSTILE if isinstance(one, str) and key not in keep else one for key, one in value.items()}


@given(st.text())
def test_any_text_can_stand_anywhere(value: str) -> None:
    page = Page(f'<p title="{plain(value)}">{text(value)}</p>')
    assert page.tags <= {"p", "span"}
    report_bytes = (text(value) + plain(value)).encode()
    assert b"\x00" not in report_bytes


@pytest.mark.parametrize("done", range(5))
def test_unfinished_runs_say_what_is_missing(tmp_path: Path, done: int) -> None:
    run = make(tmp_path)
    for kind in fake_run.KINDS[:done]:
        complete(run, kind)
    page = Page(report.build(run.path))
    missing = {"还没有回答": 4, "没有损失数据": 2, "还没有检查结果": 3, "没有数据统计": 1, "没有时间": 1}
    for words, needed in missing.items():
        assert (words in page.words) == (done < needed), words


def test_a_failure_is_at_the_top(tmp_path: Path) -> None:
    run = make(tmp_path)
    complete(run, "prepare")
    state(run, "train", "FAILED", reason="rank 1 was killed by signal 9 (SIGKILL)")
    words = Page(report.build(run.path)).words
    assert words.index("SIGKILL") < words.index("损失曲线")
    assert "失败 FAILED" in words


def test_while_its_own_job_writes_it(tmp_path: Path) -> None:
    """The report's job runs when the page is written, and nobody writes it again: the headline leaves it out."""
    run = finished(tmp_path)
    run.done("report").unlink()
    state(run, "report", "RUNNING", **fake_run.alive())
    facts = gather(run.path)
    assert (facts.now.state, facts.state) == ("RUNNING", "COMPLETED")
    words = Page(report.build(run.path)).words
    assert "已完成 COMPLETED" in words and "写出本页的任务" in words


def test_the_loss_curve(tmp_path: Path) -> None:
    run = finished(tmp_path)
    source = report.build(run.path)
    assert source.count("<svg") == 2 and "<title" in source and "at step 60" in source
    losses(run, 20_000)
    source = report.build(run.path)
    for path in re.findall(r'<path class="(?:raw|loss|eval)" d="M([^"]+)"', source):
        assert path.count("L") < 1000
    assert len(source) < 200_000
    rows = [{"current_steps": 1, "loss": 2.0}, {"current_steps": 2, "loss": float("nan")}, {"current_steps": 3}]
    rows += [{"current_steps": 1, "loss": 3.0}, {"current_steps": True, "loss": 9.0}, {"current_steps": 4, "loss": "x"}]
    write_text(run.adapter / "trainer_log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    facts = gather(run.path)
    assert facts.losses == ((1, 3.0),) and facts.not_finite == 1
    assert "NaN" in report.build(run.path)


NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(st.lists(NUMBERS, min_size=1, max_size=60), st.lists(NUMBERS, max_size=5))
def test_a_chart_of_anything(values: list[float], evals: list[float]) -> None:
    drawn = chart(list(enumerate(values)), list(enumerate(evals)), "loss", 900, 300, "wide")
    Page(drawn)
    assert "nan" not in drawn and "inf" not in drawn
    for number in re.findall(r'(?:cx|cy)="([^"]+)"', drawn):
        assert -1 <= float(number) <= 901


@given(st.lists(NUMBERS, min_size=1, max_size=3000), st.integers(10, 1000))
def test_decimation_keeps_the_peaks(values: list[float], most: int) -> None:
    points = list(enumerate(values))
    kept = decimated(points, most)
    assert len(kept) <= most and kept[0] == points[0] and kept[-1] == points[-1]
    assert [step for step, _ in kept] == sorted({step for step, _ in kept}) and set(kept) <= set(points)
    assert {max(values), min(values)} <= {value for _, value in kept}
    assert len(smoothed(points)) == len(points)


@pytest.mark.parametrize(("low", "high"), [(0, 5), (0, 0), (1, 60), (0.001, 0.002), (-3, 4), (1e9, 1e9), (2.5, 2.5)])
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 9 and found == sorted(found)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9


def test_another_chat_template_is_said_as_what_it_is(tmp_path: Path) -> None:
    """In the report and at the end of the run; where all prompts are alike nobody is warned."""
    run = finished(tmp_path)
    alike, differ = "会以同样的方式提问", "提问的方式与训练时不同"

    def told(**found: object) -> tuple[str, str]:
        edit(run.result("infer"), **found)
        out = io.StringIO()
        closing(run, out)
        warnings = [line for line in out.getvalue().splitlines() if line.startswith("warning ")]
        return Page(report.build(run.path)).words, "".join(warnings)

    words, warning = told()
    assert alike in words and differ not in words and not warning
    texts = {"prompt": "你是谁", "training": "<|im_start|>system\nYou are Qwen<|im_end|>\n", "saved": ""}
    words, warning = told(token_ids_equal=[0, 4], template_difference=texts)
    assert differ in words and alike not in words and "ask in the same way" not in words
    assert "system\nYou are Qwen" in words and "train.default_system=''" in words and "model.template" in words
    assert "0 of 4 prompts" in warning and "<|im_start|>system You are Qwen" in warning
    assert "train.default_system=''" in warning and "serve.engine=llamafactory" in warning
    words, warning = told(token_ids_equal=[3, 4], template_difference=texts | {"saved": "<s>"})
    assert "default_system" not in words + warning and "chat_template adds '<s>'" in warning
    words, warning = told(token_ids_equal=[0, 1], template_difference=None)
    assert differ in words and "the prompt is not" in warning


def test_a_training_that_logged_no_loss_says_why(tmp_path: Path) -> None:
    run = finished(tmp_path)
    (run.adapter / "trainer_log.jsonl").unlink()
    edit(run.result("train"), train_loss=0.69314)
    words = Page(report.build(run.path)).words
    assert "没有写出" not in words and "wrote none yet" not in words
    assert "train.logging_steps 是 500，而训练只有 60 步" in words and "train.logging_steps is 500" in words
    assert "0.6931" in words and "平均损失 mean loss" in words
    row = {"current_steps": 5, "loss": 6.07}
    write_text(run.adapter / "trainer_log.jsonl", f"{json.dumps(row)}\n")
    words = Page(report.build(run.path)).words
    assert "6.07 →" not in words and "logged only once (step 5)" in words


def test_packed_rows_and_their_blocks(tmp_path: Path) -> None:
    run = finished(tmp_path)
    data = fake_run.RESULTS["prepare"]["dataset"]
    packed = {"rows": 20, "kept": 20, "dropped": 0, "train_rows": 4, "eval_rows": 1, "blocks": 4, "block": 64}
    edit(run.result("prepare"), dataset=data | packed)
    words = Page(report.build(run.path)).words
    assert "读入 read 20，保留 kept 20，丢弃 dropped 0" in words and "4，验证 held out 1" in words
    assert "每步 per step 8 块 blocks" in words and "不超过 64 个 token 的块" in words


def test_several_datasets_are_all_named(tmp_path: Path) -> None:
    run = finished(tmp_path)
    sets = [
        {"name": "a", "file": "/data/sft_a.json", "rows": 20, "train": True, "eval": False},
        {"name": "b", "file": "/data/sft_b.json", "rows": 12, "train": True, "eval": False},
        {"name": "ev", "file": "/data/ev.json", "rows": 5, "train": False, "eval": True},
    ]
    data = fake_run.RESULTS["prepare"]["dataset"]
    edit(run.result("prepare"), dataset=data | {"rows": 32, "sets": sets})
    words = Page(report.build(run.path)).words
    assert "用 sft_a.json（20 行）、sft_b.json（12 行），以 ev.json（5 行）验证，对 tiny" in words
    assert "on sft_a.json (20 rows), sft_b.json (12 rows), evaluated on ev.json (5 rows): 2 nodes" in words
    assert "/data/sft_b.json · 12 行 rows" in words and "/data/ev.json · 5 行 rows · 验证 evaluation" in words


@pytest.mark.parametrize(
    ("stage", "method", "chinese", "english"),
    [
        ("sft", "lora", "做 LoRA 微调：", "LoRA fine-tuning of"),
        ("dpo", "lora", "做 LoRA DPO 偏好训练：", "LoRA DPO preference training of"),
        ("pt", "full", "做全量继续预训练：", "Full continued pre-training of"),
        ("rm", "full", "做全量奖励模型训练：", "Full reward-model training of"),
        ("kto", "freeze", "做冻结部分层的 KTO 偏好训练：", "Freeze KTO preference training of"),
        ("sft", "freeze", "做冻结部分层的微调：", "Freeze fine-tuning of"),
        ("<b>", "<i>", "做 <i> <b> 训练：", "<i> <b> training of"),
    ],
)
def test_the_stage_is_said(tmp_path: Path, stage: str, method: str, chinese: str, english: str) -> None:
    run = finished(tmp_path)
    payload = json.loads(run.job("prepare").read_text(encoding="utf-8"))["payload"]
    edit(run.job("prepare"), payload=payload | {"train_args": {"stage": stage, "finetuning_type": method}})
    words = Page(report.build(run.path)).words
    assert chinese in words and english in words


def test_every_phase_has_a_chinese_name() -> None:
    """Of those that the payloads write to their results."""
    written = set()
    for file in (REPO / "pkuslurm" / "payload").glob("*.py"):
        written |= set(re.findall(r'seconds\["(\w+)"\]', file.read_text(encoding="utf-8")))
    assert {"stream", "tokenize"} <= written <= PHASES.keys()


def test_many_answers_show_what_failed_first(tmp_path: Path) -> None:
    run = finished(tmp_path)
    rows = [{"prompt": f"p{n}", "base": "b", "tuned": "t" * 9000, "passed": n != 700} for n in range(1000)]
    write_text(run.answers, "".join(json.dumps(row) + "\n" for row in rows))
    fake_run.mark(run, "infer", run.answers)
    words = Page(report.build(run.path)).words
    assert "p700" in words and "另有 800 个回答" in words and "… +5000" in words and "999/1000" in words


def test_other_pipelines(tmp_path: Path) -> None:
    run = make(tmp_path)
    edit(run.run_json, jobs={"infer": {"job_id": "local-1", "parents": []}})
    complete_infer_only(run.path)
    page = Page(report.build(run.path))
    assert "loss" not in page.ids and "data" not in page.ids and "answers" in page.ids


def complete_infer_only(path: Path) -> None:
    run = fake_run.RunDir(path)
    write_text(run.answers, json.dumps({"prompt": "a", "base": None, "tuned": "b", "passed": None}) + "\n")
    fake_run.mark(run, "infer", run.answers)
    state(run, "infer", "COMPLETED")
