"""report --export: a page that can be mailed; nobody's name, no machine's, no folder's is in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pkuslurm.read import report
from pkuslurm.read.report.anonymous import anonymous, scrubber
from pkuslurm.read.report.facts import gather
from pkuslurm.rundir import RunDir
from tests.read import fake_run
from tests.read.fake_run import complete, edit, finished, make, state

SECRETS = (
    "zhangsan",
    "张三",
    "Zhang San",
    "login-a17",
    "c05b12n03",
    "c05b12n04",
    "lab of li",
    "2100012345",
    "10.3.4.5",
)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run whose every corner says who made it, where."""
    monkeypatch.setenv("USER", "zhangsan")
    monkeypatch.setenv("LOGNAME", "2100012345")
    monkeypatch.setenv("HOME", "/home/lab of li/zhangsan")
    root = tmp_path / "lab of li" / "张三" / "runs 'x\" 我的"
    run = finished(root, run_id="20261124-201047-zhangsan-9f3a", name="张三 first try")
    words = f"zhangsan@c05b12n03.cluster (10.3.4.5) could not open {run.path}/data/x.arrow, see /gpfs/zhangsan/a/b.log"
    state(run, "train", "FAILED", nodes=["c05b12n03", "c05b12n04.cluster"], host="c05b12n03", reason=words)
    run.done("train").unlink()
    edit(run.run_json, host="login-a17", cwd=str(root), overrides=[f"dataset.path={root}/my data.json"])
    document = json.loads(run.run_json.read_text(encoding="utf-8"))
    document["settings"] += [
        {"key": "run_root", "value": str(root), "default": "runs", "origin": "command line"},
        {"key": "dataset.path", "value": "/gpfs/lab of li/zhangsan/my data.json", "default": None, "origin": "x"},
        {"key": "cluster.env.WANDB_NAME", "value": "secret-name", "default": None, "origin": "x"},
    ]
    edit(run.run_json, settings=document["settings"], versions={"interpreter": "/home/zhangsan/venv/bin/python"})
    edit(run.job("train"), env={"LI_FOLDER": "/gpfs/lab of li", "TOKEN_LIKE": "abcdef-very-secret"})
    complete(run, "prepare")
    result = json.loads(run.result("prepare").read_text(encoding="utf-8"))
    result["dataset"]["file"] = "/gpfs/lab of li/zhangsan/my data.json"
    edit(run.result("prepare"), dataset=result["dataset"], warnings=["abcdef-very-secret in /a/b/zhangsan"])
    rows = [{"prompt": "你是谁", "base": "/home/zhangsan/x", "tuned": "我是张三的助手 on C05B12N03", "passed": True}]
    run.answers.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return run


def test_nothing_of_it_tells_who_or_where(told: RunDir) -> None:
    plain = report.build(told.path)
    assert all(secret in plain for secret in ("zhangsan", "张三", "c05b12n03", "secret-name")), "the test tests nothing"
    file = told.path / "report-export.html"
    report.export(told.path, file)
    page = file.read_bytes().decode("utf-8")
    for secret in (*SECRETS, "secret-name", "abcdef-very-secret", "gpfs", told.path.name, "runs 'x", "我的"):
        assert secret.lower() not in page.lower(), secret
    distinct = [part for part in told.path.parts if len(part) > 5]
    assert distinct and not [part for part in distinct if part in page]
    for kept in ("HOST1", "HOST2", "my data.json", "你是谁", "train.learning_rate", "0.005", "2.11.0", "x.arrow"):
        assert kept in page, kept


def test_what_is_of_nobody_stays(told: RunDir) -> None:
    scrub = scrubber(gather(told.path), {})
    for text in ("1/2 of 60", "and/or", "https://example.org/a/b", "127.0.0.1:80", "</script>", "node", "the data"):
        assert scrub(text) == text
    assert scrub("看/srv/a/b.txt。").startswith("看PATH/b.txt")


def test_the_same_host_keeps_its_number(told: RunDir) -> None:
    now = anonymous(gather(told.path), {}).now
    train, infer = now.job("train"), now.job("infer")
    assert train is not None and infer is not None
    assert len(set(train.nodes)) == 2 and train.nodes[0].startswith("HOST") and infer.nodes[0].startswith("HOST")


def test_folders_near_the_root(told: RunDir) -> None:
    edit(told.job("prepare"), payload={"dataset_file": "/rows.json", "model_path": "/models/tiny"})
    scrub = scrubber(gather(told.path), {"HOME": "/", "TMPDIR": "/"})
    assert scrub("1/2, a/models/b, /models/tiny/x y") == "1/2, a/models/b, PATH/x y"


def test_of_a_run_without_anything(tmp_path: Path) -> None:
    report.export(make(tmp_path).path, tmp_path / "page.html")
    assert "pkuslurm" in (tmp_path / "page.html").read_text(encoding="utf-8")
    fake_run.write_text(tmp_path / "broken" / "run.json", "{")
    report.export(tmp_path / "broken", tmp_path / "page.html")
