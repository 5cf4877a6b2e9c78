"""Golden dry runs of sweeps, compared whole, and the refusals before anything is written."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pkuslurm.launch import main
from pkuslurm.rundir import ANY_POINT
from tests.render.golden import compare, dry_run, installed_elsewhere  # noqa: F401  # a fixture

ASCEND = ("-m", "cluster=ascend", "nodes=2", "train.learning_rate=1e-5,1e-4", "train.cutoff_len=512,1024")
CASES = {
    "sweep": [*ASCEND, "cluster.array_parallelism=2"],
    "sweep-groups": ["-m", "cluster=ascend", "nodes=1,2", "train.lora_rank=8,16", "cluster.array_parallelism=1"],
    "sweep-no-arrays": [*ASCEND, "cluster.arrays=false"],
}


@pytest.mark.parametrize("name", CASES)
def test_dry_run_is_golden(name: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> None:
    compare(name, CASES[name], capsys, request)


@pytest.mark.parametrize("name", CASES)
def test_every_script_is_bash_and_whole(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = dry_run(CASES[name], capsys).partition("\n# file ")[0].split("\n# sbatch script ")[1:]
    scripts = [text.partition("\n")[2] for text in shown]
    assert len(scripts) == {"sweep": 5, "sweep-groups": 8, "sweep-no-arrays": 5}[name]
    for text in scripts:
        assert ANY_POINT not in text
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    waiting = [text for text in scripts if "aftercorr:JOB_ID\n" in text or "afterok:JOB_ID\n" in text]
    assert waiting and not any("--hold" in text for text in waiting), "only the first of a chain is held"


def test_a_sweep_here_names_its_points_and_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    text = dry_run(["-m", "train.learning_rate=1e-5,1e-4", "train.lora_rank=8"], capsys)
    assert "# sbatch script" not in text and ANY_POINT not in text
    points = ["# point 0: lr=1e-5", "# point 1: lr=1e-4", "#   train.yaml: learning_rate: 0.0001", ""]
    assert text.splitlines()[:5] == ["# sweep: 2 points, 1 to prepare", *points]


def test_a_dry_run_writes_nothing_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forbidden(*arguments: object, **more: object) -> None:
        raise AssertionError(f"a dry run started {arguments}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WORK_DIR")
    monkeypatch.setattr(subprocess, "Popen", forbidden)
    for cluster in ("local", "ascend"):
        assert main(["-m", f"cluster={cluster}", "train.lora_rank=8,16", "dry_run=true"]) == 0
    assert "RUN_ID" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["train.learning_rate=1e-5,-1"], "point 1 (lr=-1): train.learning_rate=-1: "),
        (["train.lora_rank=8,16", "train.cutoff_len=64,many"], "point 1 (rank=8,cutoff=many): train.cutoff_len=many: "),
        (["train.lora_rang=8,16"], "train.lora_rang"),
        (["dataset=identity,nothing"], "point 1 (ds=nothing): dataset=nothing: no such choice"),
        (["nodes=1,0"], "point 1 (nodes=0): nodes=0: "),
        (["sweep.direction=up", "train.lora_rank=8,16"], "sweep.direction=up: it must be minimize or maximize"),
        (["sweep.keep_merged=two", "train.lora_rank=8,16"], "sweep.keep_merged=two: it must be all or best or none"),
        (["sweep.metric=loss,eval_loss"], "sweep.metric=loss,eval_loss: "),
        (["sweep.metrik=loss"], "sweep.metrik"),
        (["cluster.array_parallelism=0", "train.lora_rank=8,16"], "cluster.array_parallelism=0: it must be 1 or more"),
        (["cluster=local,ascend"], "cluster=local,ascend: "),
        (["run_root=a,b"], "run_root=a,b: "),
        (["dry_run=true,false"], "dry_run=true,false: "),
        (["--cfg", "job", "train.lora_rank=8,16"], "--cfg job: "),
        (["sweep.extend=20990101", "train.lora_rank=8,16"], "20990101: no such run"),
    ],
)
def test_one_line_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("WORK_DIR")
    assert main(["-m", *typed]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("pkuslurm: ") and said in captured.err
    assert list(tmp_path.iterdir()) == []


def test_some_at_a_time_here_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    assert "2 points" in dry_run(["-m", "cluster.array_parallelism=2", "train.lora_rank=8,16"], capsys)


def test_a_single_run_is_not_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    run = tmp_path / "20260101-000000-run-0000"
    run.mkdir()
    (run / "run.json").write_text('{"jobs": {}}', encoding="utf-8")
    monkeypatch.setenv("PKUSLURM_RUN_ROOT", str(tmp_path))
    assert main(["-m", "train.lora_rank=8,16", f"sweep.extend={run.name}"]) == 2
    assert capsys.readouterr().err == f"pkuslurm: sweep.extend={run.name}: this is a single run; name a sweep\n"


def test_a_run_root_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    folder = "/proc/只读 folder"  # where root cannot write either
    assert main(["-m", "train.lora_rank=8,16", f"run_root={folder}", "model=tiny"]) == 2
    assert f"run_root={folder}: " in capsys.readouterr().err
