"""What goes to Slurm and what comes back, without a Slurm."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pkuslurm import byhand
from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import RunDir
from pkuslurm.slurm import commands
from pkuslurm.slurm.commands import Answer
from pkuslurm.slurm.parse import Row
from pkuslurm.submit import refusals
from pkuslurm.submit.alone import alone, check_place
from pkuslurm.submit.slurm import Submission, script
from pkuslurm.worker.head import head


def job(folder: Path, **request: Any) -> dict[str, Any]:
    asked = {"options": {}, "setup": [], "signal_seconds": None, "umask": "077"} | request
    return {"kind": "train", "key": "k", "run_dir": str(folder), "nodes": 1, "worker": ["true"], "request": asked}


@pytest.mark.parametrize(
    ("setup", "code"),
    [
        (["# load what is needed", "", "  \n# and no more"], 0),
        (["# load what is needed\nA=1\n# said", 'test "$A" = 1'], 0),
        (["echo 'it''s'; false"], 1),
        (["# fine", "test 1 = 2"], 1),
    ],
)
def test_setup_lines_run_and_the_first_failure_ends_the_job(tmp_path: Path, setup: list[str], code: int) -> None:
    text = script(Submission("k", [job(tmp_path, setup=setup)])).partition("srun ")[0]
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
    assert (done.returncode, "cluster.setup failed" in done.stderr) == (code, code == 1), done.stderr


@pytest.mark.parametrize(
    ("words", "certain"),
    [
        ("sbatch: error: Batch job submission failed: Invalid qos specification", True),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", False),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", False),
        ("", False),  # killed: it may have submitted before
    ],
)
def test_an_sbatch_that_does_not_say_no_may_have_submitted(words: str, certain: bool) -> None:
    assert refusals.certain(words) is certain


def written(folder: Path) -> RunDir:
    run = RunDir(folder)
    run.job("train").parent.mkdir(parents=True)
    run.run_json.write_text('{"jobs": {}}', encoding="utf-8")
    run.job("train").write_text(json.dumps({"run_dir": str(folder)}), encoding="utf-8")
    return run


def test_one_command_at_a_time(tmp_path: Path) -> None:
    run = written(tmp_path / "run")
    with alone(run), pytest.raises(PkuslurmError, match="another command"), alone(run):
        pass
    with alone(run) as document:
        assert document == {"jobs": {}}
    assert (run.path / ".submitting").stat().st_mode & 0o077 == 0
    run.run_json.unlink()
    with pytest.raises(PkuslurmError, match="cannot be read"), alone(run):
        pass


def test_a_run_that_was_moved_is_not_gone_on_with(tmp_path: Path) -> None:
    check_place(written(tmp_path / "run"))
    os.symlink(tmp_path / "run", tmp_path / "link")
    check_place(RunDir(tmp_path / "link"))
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(PkuslurmError, match="moved here from"):
        check_place(RunDir(tmp_path / "moved"))


def test_the_head_of_no_job() -> None:
    with pytest.raises(PkuslurmError, match="submit the script with sbatch"):
        head({})


@pytest.mark.parametrize(
    ("name", "state", "refused"),
    [("train", "RUNNING", True), ("train", "FAILED", False), ("another", "RUNNING", False)],
)
def test_by_hand_two_jobs_never_fill_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, state: str, refused: bool
) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(f"output_dir: {tmp_path}/out\nuse_cpu: true\n", encoding="utf-8")
    first = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train"}
    run = RunDir(byhand.job_file("train", file, None, first).parents[1])
    run.state("train").write_text('{"state": "RUNNING", "job_id": "7", "attempt": 1}', encoding="utf-8")
    monkeypatch.setattr(commands, "queue", lambda _: Answer({"7": Row("7", name, state, state)}, True))
    assert byhand.job_file("train", file, None, first)  # a requeue
    second = first | {"SLURM_JOB_ID": "8"}
    if refused:
        with pytest.raises(PkuslurmError, match="scancel 7"):
            byhand.job_file("train", file, None, second)
    else:
        assert byhand.job_file("train", file, None, second)


def test_by_hand_relative_paths_start_where_the_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch --chdir: the folder that is filled and the trainer's are one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("output_dir: out\nuse_cpu: true\n", encoding="utf-8")
    file = byhand.job_file("train", Path("my.yaml").absolute(), None, {"SLURM_SUBMIT_DIR": "/"})
    assert json.loads(file.read_text(encoding="utf-8"))["cwd"] == str(tmp_path)
    assert file.is_relative_to(tmp_path / "out.pkuslurm")
