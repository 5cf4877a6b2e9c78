"""A sweep's leaderboard: who is ranked and by what, its CSV, its page."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkuslurm.read import sweep
from pkuslurm.read.report import leaderboard, logged, sweep_page
from pkuslurm.read.report.leaderboard import Row, best, board, harmless, rows
from pkuslurm.read.report.sweep_chart import MOST_CURVES, Curve, overlay
from pkuslurm.rundir import RunDir, read_jsonl, write_json, write_text
from pkuslurm.sweepdir import SweepDir
from tests.read import fake_run
from tests.read.fake_run import edit, state
from tests.read.fake_sweep import curve, example, fail, finish, make
from tests.read.test_report import Page

RATES = [{"train.learning_rate": rate} for rate in ("1e-5", "5e-5", "1e-4", "1e-3")]


def ranks(home: SweepDir) -> list[tuple[int | None, int]]:
    return [(row.rank, row.n) for row in rows(sweep.read(home.path))]


def by_number(home: SweepDir) -> dict[int, Row]:
    return {row.n: row for row in rows(sweep.read(home.path))}


def test_complete_points_are_ranked_by_their_evaluation_loss(weird: Path) -> None:
    home = make(weird, RATES)
    finish(home.point(0), loss=0.1, evaluated=0.9)
    finish(home.point(1), loss=0.5, evaluated=0.3)
    fail(home.point(2), "out of memory")
    curve(home.point(2), 0.01, 0.02)
    finish(home.point(3), loss=0.2, evaluated=0.6)
    assert ranks(home) == [(1, 1), (2, 3), (3, 0), (None, 2)]
    found = by_number(home)
    assert found[1].loss == 0.5 and found[1].eval_loss == found[1].metric == 0.3
    assert found[2].reason == "train: out of memory" and found[2].rank is None and found[2].eval_loss == 0.02
    assert found[0].label == "learning_rate=1e-5" and found[0].values == {"train.learning_rate": "1e-5"}
    first = best(rows(sweep.read(home.path)))
    assert first is not None and first.n == 1 and board(sweep.read(home.path)).note is None


def test_more_is_better_where_that_was_asked_for(weird: Path) -> None:
    home = make(weird, RATES[:2], metric="reward_margin", direction="maximize")
    for n, margin in enumerate((0.25, 0.75)):
        finish(home.point(n), loss=0.1)
        write_json(home.point(n).adapter / "all_results.json", {"reward_margin": margin})
    assert ranks(home) == [(1, 1), (2, 0)]
    edit(home.sweep_json, direction="minimize")
    assert ranks(home) == [(1, 0), (2, 1)]


def test_without_any_validation_set_the_training_loss_ranks_and_it_is_said(weird: Path) -> None:
    home = make(weird, RATES[:3], direction="maximize")
    finish(home.point(0), loss=0.7)
    finish(home.point(1), loss=0.2)
    assert ranks(home) == [(1, 1), (2, 0), (None, 2)], "the direction was meant for what there is not"
    found = board(sweep.read(home.path))
    assert found.metric == "loss" and found.note is not None and "training loss" in found.note[1]
    assert leaderboard.table(found).startswith("rank,n,label,") and ",loss," in leaderboard.table(found).splitlines()[1]
    assert "按最终训练损失排名" in sweep_page.build(sweep.read(home.path), found)
    # one that has an evaluation loss is enough, and is the only one that can be ranked
    curve(home.point(0), 0.7, 0.8)
    assert ranks(home)[0] == (1, 0) and board(sweep.read(home.path)).note is None
    assert leaderboard.table(board(sweep.read(home.path))).startswith("rank,n,label,")


def test_nan_is_no_value(weird: Path) -> None:
    home = make(weird, RATES[:2])
    finish(home.point(0), loss=0.7, evaluated=0.8)
    finish(home.point(1), loss=0.2, evaluated=0.3)
    log = home.point(1).adapter / "trainer_log.jsonl"
    write_text(log, log.read_text() + '{"current_steps": 60, "eval_loss": NaN}\n{"current_steps": 60, "loss": NaN}\n')
    assert ranks(home) == [(1, 0), (None, 1)]
    row = by_number(home)[1]
    assert row.eval_loss is None and row.loss is None, "an earlier, finite loss is not that of the model it ended with"


def test_the_share_of_answers_that_passed(weird: Path) -> None:
    home = make(weird, RATES, metric="passed")
    for n, (good, evaluated) in enumerate(((1, 0.1), (3, 0.5), (2, 0.2), (3, 0.4))):
        finish(home.point(n), loss=0.1, evaluated=evaluated, good=good)
    assert ranks(home) == [(1, 3), (2, 1), (3, 2), (4, 0)], "of equals the smaller loss"
    found = by_number(home)
    assert found[2].metric == 2 / 3 and found[2].passed is False and found[1].passed is True
    table = list(csv.DictReader(io.StringIO(leaderboard.table(board(sweep.read(home.path))))))
    assert [(row["passed"], row["passed_share"]) for row in table][1:3] == [("true", "1.0"), ("false", str(2 / 3))]


def test_a_metric_that_nobody_logged_ranks_nobody_and_names_what_was(weird: Path) -> None:
    home = make(weird, RATES[:2], metric="eval_los")
    finish(home.point(0), loss=0.7, evaluated=0.8)
    found = board(sweep.read(home.path))
    assert best(found.rows) is None and found.note is not None
    assert "eval_los" in found.note[1] and "eval_loss" in found.note[1].split("logged were: ")[1]


def test_any_key_that_was_logged(weird: Path) -> None:
    home = make(weird, RATES[:1], metric="lr")
    run = home.point(0)
    finish(run, loss=0.5, evaluated=0.7)
    assert by_number(home)[0].metric == 1e-4
    for key, file, content in (
        ("train_runtime", "train_results.json", {"train_runtime": 8.5}),
        ("eval_mine_loss", "eval_results.json", {"eval_mine_loss": 0.25}),
        ("rewards/margins", "trainer_state.json", {"log_history": [{"rewards/margins": 1}, {"rewards/margins": 2}]}),
    ):
        write_json(run.adapter / file, content)
        edit(home.sweep_json, metric=key)
        assert by_number(home)[0].metric == content.get(key, 2)


def test_the_evaluation_of_the_model_that_was_saved_counts(weird: Path) -> None:
    """LLaMA-Factory evaluates once more at the end, of the best checkpoint, which trainer_log.jsonl does not tell."""
    home = make(weird, RATES[:2])
    finish(home.point(0), loss=0.1, evaluated=0.9)
    write_json(home.point(0).adapter / "eval_results.json", {"eval_loss": 0.4})
    curve(home.point(1), 0.1, 0.9)  # goes on, over what an earlier training has left
    write_json(home.point(1).adapter / "eval_results.json", {"eval_loss": 0.4})
    found = by_number(home)
    assert found[0].eval_loss == 0.4 and found[1].eval_loss == 0.9


def test_a_training_shorter_than_its_logging_has_its_mean(weird: Path) -> None:
    home = make(weird, RATES[:1])
    finish(home.point(0), loss=0.1)
    write_text(home.point(0).adapter / "trainer_log.jsonl", '{"current_steps": 3, "total_steps": 3}\n')
    edit(home.point(0).result("train"), train_loss=1.25)
    assert by_number(home)[0].loss == 1.25 and ranks(home) == [(1, 0)]


def test_hours_are_those_of_its_own_jobs(weird: Path) -> None:
    home = make(weird, RATES[:2])
    finish(home.point(0), loss=0.1)
    own = sum(fake_run.SECONDS[kind] for kind in ("train", "merge", "infer"))
    hours = by_number(home)[0].hours
    assert hours is not None and math.isclose(hours, own / 3600), "what all points share is not counted for each"
    assert by_number(home)[1].hours is None


@pytest.mark.parametrize("block", [1, 7, 64, 300, 4096])
def test_the_end_of_a_log_is_found_block_by_block(weird: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    run = make(weird, RATES[:1]).point(0)
    curve(run, 0.25, 0.5, steps=12)
    monkeypatch.setattr(logged, "BLOCK", block)
    whole: dict[str, object] = {}
    for row in read_jsonl(run.adapter / "trainer_log.jsonl"):
        whole |= row
    names = ("loss", "eval_loss", "lr", "epoch", "none")
    assert logged.last(run, names, False) == {name: whole[name] for name in names[:4]}


def test_of_a_long_log_only_the_end_is_read(weird: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(weird, RATES[:1]).point(0)
    log = run.adapter / "trainer_log.jsonl"
    row = json.dumps({"current_steps": 1, "loss": 3.0, "lr": 1e-4}) + "\n"
    write_text(log, '{"eval_loss": 1.0}\n' + row * 60_000 + '{"loss": 2.0}\ntorn {"loss"')
    read: list[int] = []
    opened = Path.open

    class Counting(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            content = super().read(size)
            read.append(len(content))
            return content

    def counting(path: Path, mode: str = "r", **more: object) -> object:
        return Counting(io.FileIO(path)) if path == log else opened(path, mode)

    monkeypatch.setattr(Path, "open", counting)
    assert logged.last(run, ("loss",), False) == {"loss": 2.0} and sum(read) <= logged.BLOCK
    read.clear()
    assert logged.last(run, ("loss", "eval_loss"), False) == {"loss": 2.0} and sum(read) == logged.FARTHEST


def test_damaged_files_are_as_if_nothing_was_logged(weird: Path) -> None:
    home = make(weird, RATES)
    for n in range(4):
        finish(home.point(n), loss=0.1, evaluated=0.2 + n)
    write_text(home.point(0).run_json, "{")
    write_text(home.point(1).adapter / "trainer_log.jsonl", '[1]\n"x"\n{"eval_loss": "low", "loss": []}\n\0\n')
    write_text(home.point(1).adapter / "all_results.json", "[]")
    write_json(home.point(1).adapter / "trainer_state.json", {"log_history": [3, {"loss": None}]})
    (home.point(2).adapter / "trainer_log.jsonl").unlink()
    assert ranks(home)[0] == (1, 3) and {rank for rank, _ in ranks(home)[1:]} == {None}
    (home.point(0).path / "report.html").mkdir()
    assert "learning_rate=1e-3" in sweep_page.write(sweep.read(home.path)).read_text(encoding="utf-8")
    edit(home.sweep_json, points=[{"n": "x"}, 7, {"values": 3, "label": None}, {}], keys="all", metric=5, direction=[])
    assert len(ranks(home)) == 4
    sweep_page.write(sweep.read(home.path))


def test_the_csv_opens_in_a_spreadsheet_and_computes_nothing_there(weird: Path) -> None:
    points = [
        {"dataset": "我的,数据", "model": "=HYPERLINK(1)"},
        {"dataset": 'a "b"\nc', "model": "+SUM(1)"},
        {"dataset": "-1", "model": "@x"},
    ]
    home = make(weird, points)
    finish(home.point(2), loss=0.25, evaluated=0.5)
    path = leaderboard.write(home, board(sweep.read(home.path)))
    assert path == home.path / "leaderboard.csv" and path.read_bytes().startswith(
        b"\xef\xbb\xbfrank,n,label,dataset,model,"
    )
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["n"] for row in table] == ["2", "0", "1"] and [row["rank"] for row in table] == ["1", "", ""]
    assert table[0] == table[0] | {"dataset": "-1", "model": "'@x", "eval_loss": "0.5", "state": "COMPLETED"}
    assert table[1]["dataset"] == "我的,数据" and table[1]["model"] == "'=HYPERLINK(1)"
    assert table[2]["dataset"] == 'a "b"\nc' and table[2]["model"] == "'+SUM(1)"
    assert table[0]["path"] == str(home.point(2).path)


@given(st.text())
def test_no_cell_begins_as_a_formula_unless_it_is_a_number(cell: str) -> None:
    shown = harmless(cell)
    if shown.startswith(("=", "@", "+", "-", "\t", "\r")):
        float(shown)


def test_the_page_loads_nothing_and_leads_only_to_pages_that_are_there(weird: Path) -> None:
    home = example(weird, 13)
    now = sweep.read(home.path)
    assert sweep_page.write(now) == home.path / "report.html"
    source = home.own.report.read_text(encoding="utf-8")
    page = Page(source)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in source
    assert not page.tags & {"script", "img", "link", "iframe", "object", "embed", "form"}
    assert "url(" not in source and "http://" not in source and "https://" not in source
    assert len(page.ids) == len(set(page.ids))
    links = set(re.findall(r'href="([^"]*)"', source))
    assert links == {f"{n}/report.html" for n in range(13) if (home.path / str(n) / "report.html").is_file()}
    assert len(links) == 12, "the point that has not begun has no page"
    first = best(rows(now))
    assert first is not None
    for word in (
        home.sweep_id,
        first.label,
        str(first.path / "merged"),
        "演示 demo",
        "参数扫描报告",
        "CUDA out of memory",
    ):
        assert word in page.words, word
    assert home.leaderboard.is_file()


def test_what_is_typed_is_no_html(weird: Path) -> None:
    hostile = '<script>alert(1)</script>"&\x1b[31m'
    home = make(weird, [{"dataset<b>": hostile}, {"dataset<b>": "x"}], metric="<i>", name=hostile)
    finish(home.point(0), loss=0.1, evaluated=0.2)
    fail(home.point(1), hostile)
    edit(home.sweep_json, points=[{"n": n, "label": hostile, "values": {"dataset<b>": hostile}} for n in (0, 1)])
    page = Page(sweep_page.write(sweep.read(home.path)).read_text(encoding="utf-8"))
    assert not page.tags & {"script", "i"} and "\x1b" not in page.words and hostile[:25] in page.words


def test_pages_of_points_are_written_when_something_has_changed(weird: Path) -> None:
    home = example(weird, 6)
    edit(home.point(5).run_json, launcher=fake_run.alive())
    state(home.point(5), "train", "RUNNING", **fake_run.alive())
    sweep_page.write(sweep.read(home.path))
    pages = {n: home.point(n).report for n in range(6)}
    assert [n for n, page in pages.items() if page.is_file()] == [0, 1, 2, 3, 4], "point 5 still runs"
    for page in pages.values():
        if page.is_file():
            write_text(page, "old")
    sweep_page.write(sweep.read(home.path))
    assert pages[0].read_text(encoding="utf-8") == "old"
    later = pages[0].stat().st_mtime + 1
    os.utime(home.point(1).answers, (later, later))
    sweep_page.write(sweep.read(home.path))
    assert pages[0].read_text(encoding="utf-8") == "old" and pages[1].read_text(encoding="utf-8") != "old"


def test_one_reason_is_told_once(weird: Path) -> None:
    home = make(weird, [{"seed": str(n)} for n in range(30)])
    for n in range(29):
        run = home.point(n)
        fail(run, f"rank {n} on node{n:02d}: out of memory; see {run.path}/logs/train-{n}_0.log")
    fail(home.point(29), "model.path=x: not there")
    now = sweep.read(home.path)
    source = sweep_page.build(now, board(now))
    assert source.count("out of memory") == 1 and source.count("model.path=x") == 1
    assert '<span class="mark bad">29</span>' in source and "see 0/logs/train-0_0.log" in source


def test_shared_settings_are_those_of_all_points(weird: Path) -> None:
    home = make(weird, RATES[:2])
    for n in (0, 1):
        same = {"key": "nodes", "value": 2, "default": 1, "origin": "command line"}
        rate = {"key": "train.learning_rate", "value": n, "default": 9, "origin": "command line"}
        brought = {"key": "infer.expect", "value": f"expect-{n}", "default": None, "origin": f"dataset={n}"}
        edit(home.point(n).run_json, settings=[same, rate, brought])
    now = sweep.read(home.path)
    source = sweep_page.build(now, board(now))
    assert "<code>nodes</code>" in source and "expect-0" not in source
    assert "<code>train.learning_rate</code>" not in source


def test_the_state_is_without_the_job_that_writes_the_page(weird: Path) -> None:
    home = make(weird, RATES[:2])
    for n in (0, 1):
        finish(home.point(n), loss=0.1)
    edit(home.sweep_json, launcher=fake_run.alive())
    state(home.own, "report", "RUNNING", **fake_run.alive())
    now = sweep.read(home.path)
    assert now.state == "RUNNING"
    assert f"<title>{home.sweep_id} · COMPLETED · pkuslurm</title>" in sweep_page.build(now, board(now))


def test_a_large_sweep_is_a_small_page(weird: Path) -> None:
    home = example(weird, 13, steps=600)
    now = sweep.read(home.path)
    some = board(now)
    many = [replace(some.rows[n % 9], n=n, rank=n + 1, values={"seed": str(n)}) for n in range(260)]
    found = replace(some, rows=tuple(many))
    source = sweep_page.build(now, found)
    Page(source)
    assert len(source.encode()) < 1_000_000
    assert source.count("<tr>") - 200 < 40 and "60 more are in leaderboard.csv" in source
    wide = source[source.index('<svg class="chart wide"') : source.index('<svg class="chart narrow"')]
    assert len(re.findall(r"<g><title>", wide)) == MOST_CURVES
    assert len(leaderboard.table(found).splitlines()) == 261


_LOSS = st.floats(min_value=-5, max_value=1e6, allow_nan=False, allow_infinity=False)
_CURVE = st.lists(_LOSS, min_size=1, max_size=60).map(lambda values: tuple(enumerate(values, 1)))


@given(st.lists(st.tuples(_CURVE, _CURVE), min_size=1, max_size=8), st.booleans())
def test_every_curve_stays_in_its_frame(curves: list[tuple[tuple[tuple[int, float], ...], ...]], ranked: bool) -> None:
    known = [Curve(n, f"p={n}", losses, evals if n % 2 else ()) for n, (losses, evals) in enumerate(curves)]
    drawn = overlay(known, 0 if ranked else None, "loss", 920, 360, "wide")
    Page(drawn)
    for path in re.findall(r' d="M([^"]*)"', drawn):
        for pair in path.split("L"):
            x, y = map(float, pair.split())
            assert 51.9 <= x <= 844.1 and 13.9 <= y <= 318.1, drawn
    heights = sorted(float(y) for y in re.findall(r'<text class="end [a-z]+" x="[^"]*" y="([^"]*)"', drawn))
    assert all(after - before >= 13.8 for before, after in pairwise(heights))


def test_the_best_curve_stands_out(tmp_path: Path) -> None:
    known = [Curve(n, f"p={n}", tuple((step, 4.0 / step + n) for step in range(1, 11))) for n in range(3)]
    drawn = overlay(known, 1, "loss", 920, 360, "wide")
    assert drawn.count('<path class="loss"') == 1 and drawn.count('<path class="other"') == 2
    assert ">#1 1.4</text>" in drawn and ">#0</text>" in drawn and ">#2</text>" in drawn
    away = Curve(3, "p=3", tuple((step, 10.0**step) for step in range(1, 11)))
    drawn = overlay([*known, away], 1, "loss", 920, 360, "wide")
    assert "↑ 1" in drawn and "1 of them leave the drawing" in drawn and ">#3</text>" not in drawn


def test_the_best_model_is_told_or_why_there_is_none(weird: Path) -> None:
    home = make(weird, RATES[:1])
    finish(home.point(0), loss=0.1, evaluated=0.2)
    now = sweep.read(home.path)
    row = board(now).rows[0]
    assert leaderboard.merged(row) == home.point(0).merged
    RunDir(row.path).merged.rename(weird / "away")
    assert "pkuslurm merge" in sweep_page.build(now, board(now))
