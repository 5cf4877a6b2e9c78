"""Why a Slurm job ended whose worker said nothing: the telling line of its script's output."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkuslurm.read import scheduler, script_log, status
from pkuslurm.rundir import RunDir, write_text
from pkuslurm.slurm.parse import Row
from tests.read.fake_run import edit, make

NOISE = f"srun: {script_log.NOISE}"
TEXTS = {
    "a failed setup": (
        "error: no module x\npkuslurm: cluster.setup failed: module load x\nsrun: error: later\n",
        "clu",
    ),
    "the memory": (f"start\nslurmstepd: error: oom_kill event\n{NOISE}\nbye\n", "slurmstepd: error: oom_kill event"),
    "a signal": ("a.sh: line 3: 77 Killed  python\r\n", "a.sh: line 3: 77 Killed  python"),
    "nothing": (f"{NOISE}\nhello\n", None),
    "harm": ("pkuslurm: \x1b[31m\u202e no\n", "\\x1b[31m\\u202e no"),
    "a lot": ("Error " * 99, "Error " * 33 + "Er…"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_telling_line(name: str, tmp_path: Path) -> None:
    text, words = TEXTS[name]
    file = tmp_path / "train-7.out"
    file.write_bytes(text.encode())
    told = script_log.last_words(file)
    assert (told or "").startswith("cluster.setup failed: module load x") if words == "clu" else told == words


def failed(run: RunDir, monkeypatch: pytest.MonkeyPatch, key: str) -> tuple[str, str | None]:
    """Prepare, which Slurm says has failed, and of which no worker has said anything."""
    edit(run.run_json, executor="slurm")
    document = dict(status.read(run.path).document)
    document["jobs"]["prepare"] |= {"job_id": "7", "key": key}
    edit(run.run_json, **document)
    row = Row("7", key, "FAILED", "FAILED", exit_code=1)
    monkeypatch.setattr(scheduler, "ask", lambda ids: scheduler.Asked({"7": row}))
    job = status.read(run.path).jobs[0]
    return job.state, job.reason


@pytest.mark.parametrize("name", ["prepare", "pack"])
def test_it_is_the_reason(name: str, weird: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(weird)
    key = f"{run.run_id}-{name}"
    silent = "its job ended before the worker could say why (exit code 1); see "
    assert failed(run, monkeypatch, key) == ("FAILED", f"{silent}logs/.slurm")
    file = run.logs / ".slurm" / f"{name}-7.out"
    write_text(file, f"{NOISE}\n")
    assert failed(run, monkeypatch, key) == ("FAILED", f"{silent}{file}")
    write_text(file, f"pkuslurm: cluster.setup failed: module load x\n{NOISE}\n")
    assert failed(run, monkeypatch, key) == ("FAILED", f"cluster.setup failed: module load x; see {file}")
