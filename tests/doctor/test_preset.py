"""doctor --preset: a preset from Slurm's own words, recorded from sites of different kinds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pkuslurm import cli
from pkuslurm.compose import compose
from pkuslurm.doctor import preset, trial
from pkuslurm.errors import PkuslurmError
from pkuslurm.plan.plan import plan
from pkuslurm.slurm import commands, parse, site
from pkuslurm.slurm.site import Site

RECORDED = Path(__file__).parent / "recorded"
SITES = ("untyped", "typed", "no-accounting", "bare")


def recorded(name: str) -> Site:
    def text(what: str) -> str:
        file = RECORDED / f"{name}.{what}"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    own = site.accounts(text("assoc"), text("account"), text("qos")) if text("assoc") else None
    return site.site(text("partition"), text("sinfo"), text("config"), own)


@pytest.mark.parametrize("name", SITES)
def test_the_file_is_as_it_was_read(name: str, pytestconfig: pytest.Config) -> None:
    golden = RECORDED / f"{name}.yaml"
    text = preset.text("mine", recorded(name), "2026-11-24")
    if pytestconfig.getoption("--update-golden"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SITES)
def test_it_composes_and_every_line_says_why(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = preset.text("mine", recorded(name), "2026-11-24")
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text(text, encoding="utf-8")
    steps = plan(compose(["cluster=mine", "model=tiny"], [tmp_path]).config)
    assert steps.config.cluster.executor == "slurm" and steps.job("train").request.options["partition"]
    bare = [line for line in text.splitlines() if line and "#" not in line]
    assert bare == (["executor: slurm"] if name == "bare" else ["executor: slurm", "jobs:"])


def test_what_the_sites_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for as each of the sites wants it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster").mkdir()
    asked, arrays = {}, {}
    for name in SITES:
        (tmp_path / "cluster" / "mine.yaml").write_text(preset.text("mine", recorded(name), "x"), encoding="utf-8")
        steps = plan(compose(["cluster=mine", "model=tiny"], [tmp_path]).config)
        asked[name] = [
            (job.request.options["partition"], job.request.options.get("gres"), job.nproc_per_node)
            for job in steps.jobs
        ]
        arrays[name] = steps.config.cluster.arrays
        assert steps.config.cluster.accelerator == {"no-accounting": "cuda", "bare": "cpu"}.get(name, "npu")
    whole, one = ("npu", "npu:2", 2), ("npu", "npu:1", 1)
    assert asked["untyped"] == [("cpu", None, 1), whole, ("cpu", None, 1), one, ("cpu", None, 1)]
    kind = "npu:Ascend-910B3"
    (cpu,) = {asked["typed"][at] for at in (0, 2, 4)}
    assert cpu == ("64c512g", None, 1), "not the one for trying, nor one that is down or others' own"
    assert asked["typed"][1] == ("ascend", f"{kind}:8", 8) and asked["typed"][3] == ("ascend", f"{kind}:1", 1)
    assert asked["no-accounting"][1] == ("gpu", "gpu:a100:4", 4), "those that there are most of"
    assert {row[:2] for row in asked["bare"]} == {("on", None)}
    assert arrays == {"untyped": True, "typed": False, "no-accounting": True, "bare": True}


def test_limits_of_the_site_are_kept() -> None:
    text = preset.text("mine", recorded("typed"), "x")
    assert 'time: "2:00:00"' in text and "MaxWall of your QOS" in text
    assert "mem: 480000M" in text, "192 cores × MaxMemPerCPU is less than the node has"
    assert "account: ai" in text and "lscratch" not in text and "secret: 99 nodes" in text and "not up" in text
    assert "\nmem:" not in preset.text("mine", recorded("no-accounting"), "x"), "memory is not given out"
    assert 'partition: "on"' in preset.text("mine", recorded("bare"), "x"), "YAML reads on as true"


def test_nothing_can_be_used() -> None:
    with pytest.raises(PkuslurmError, match="no partition of this cluster is up and yours"):
        preset.text("mine", site.site("PartitionName=a State=DOWN", "a|1|1|1|(null)", "", None), "x")


def test_it_is_written_once(weird: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(weird)
    monkeypatch.setattr(commands, "present", lambda: True)
    monkeypatch.setattr(site, "ask", lambda: recorded("untyped"))
    assert cli.main(["doctor", "--preset", "mine", "--config-dir", str(weird / "c")]) == 0
    out, err = capsys.readouterr()
    file = weird / "c" / "cluster" / "mine.yaml"
    assert out == f"{file}\n" and "doctor cluster=mine" in err and file.is_file()
    before = file.read_text(encoding="utf-8")
    assert cli.main(["doctor", "--preset", "mine", "--config-dir", str(weird / "c")]) == 2
    assert "remove it first" in capsys.readouterr().err and file.read_text(encoding="utf-8") == before
    monkeypatch.setenv("HOME", str(weird))
    assert preset.write("mine", None, os.environ) == weird / ".config/pkuslurm/conf/cluster/mine.yaml"


def test_what_cannot_be_used_is_not_left(weird: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(weird)
    monkeypatch.setattr(commands, "present", lambda: True)
    monkeypatch.setattr(site, "ask", lambda: recorded("untyped"))
    monkeypatch.setattr(preset, "text", lambda *_: "executor: slurm\npartitoin: a\n")
    with pytest.raises(PkuslurmError, match=r"cannot be used: cluster.partitoin"):
        preset.write("mine", weird / "c", {})
    assert not list((weird / "c" / "cluster").iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ascend", "comes with pkuslurm; choose another name"),
        ("../a", "letters, digits"),
        ("auto", "letters, digits"),
        ("mine", "there is no Slurm on this machine"),
    ],
)
def test_it_is_refused_in_one_line(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "present", lambda: False)
    assert cli.main(["doctor", "--preset", name]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mine"], "did you mean cluster=mine?"),
        (["--preset", "a", "nodes=1"], "takes no settings"),
        (["--wait", "5"], "belongs to doctor cluster=NAME"),
        (["cluster=ascend", "--wait", "-1"], "minutes, 0 or more"),
        (["cluster=local"], "it asks no scheduler"),
        (["cluster=nosuch"], "no such choice"),
        (["cluster=ascend", "pipeline=infer", "model=custom", "model.path=/a"], "doctor asks what a training asks"),
    ],
)
def test_its_words_are_checked(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 5),
        ({"time": "1:00:00"}, 5),
        ({"time": 3}, 3),
        ({"partition": "short"}, 2),
        ({"partition": "free", "time": "UNLIMITED"}, 5),
    ],
)
def test_the_trials_limit(options: dict[str, object], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    there = "PartitionName=npu Default=YES MaxTime=1:00:00\nPartitionName=short MaxTime=2\nPartitionName=free"
    monkeypatch.setattr(commands, "partitions", lambda: parse.partitions(there))
    assert trial._limit(options) == most
