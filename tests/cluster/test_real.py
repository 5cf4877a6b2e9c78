"""The whole pipeline with the real LLaMA-Factory on a real Slurm, and the same jobs by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkuslurm.rundir import read_jsonl
from tests.cluster.fixture import Cluster
from tests.cluster.runs import KINDS, SAME_SUMS, THREADS, TINY, ended, job, launched, states, until, verb

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def run(slurm: Cluster, trained: Path) -> Iterator[Path]:
    yield trained
    slurm.clear()


def test_to_the_right_answer(slurm: Cluster, run: Path) -> None:
    found = ended(slurm, run, seconds=600)
    logs = "\n".join(
        file.read_text(encoding="utf-8", errors="replace")[-2000:] for file in (run / "logs").rglob("*.log")
    )
    assert states(found) == dict.fromkeys(KINDS, "COMPLETED"), logs
    assert found["passed"] is True and found["state"] == "COMPLETED"
    answers = list(read_jsonl(run / "answers.jsonl"))
    assert len(answers) == 5 and "北" in answers[0]["tuned"] and "通义千问" in answers[0]["base"]
    train = json.loads((run / "results" / "train.json").read_text(encoding="utf-8"))
    assert train["global_step"] == 90
    assert (run / "report.html").stat().st_size > 10_000
    assert oct((run).stat().st_mode & 0o777) == "0o700"
    assert len(job(found, "train")["nodes"]) == 2 and slurm.processes("pkalice") == []


def test_stopped_twice_and_torn_once(slurm: Cluster, run: Path) -> None:
    """Bit for bit what an uninterrupted training gives, although one of its checkpoints was torn meanwhile."""
    command = [str(slurm.python), "-m", "pkuslurm.launch", *TINY, *SAME_SUMS, "train.save_steps=20", "pipeline=train"]
    done = slurm.run("pkalice", command, env=THREADS)
    assert done.returncode == 0, done.stderr
    cut = Path(done.stdout.splitlines()[-1])
    job_id = json.loads((cut / "run.json").read_text(encoding="utf-8"))["jobs"]["train"]["job_id"]
    for attempt, step in ((1, 12), (2, 50)):
        until(slurm, cut, partial(at_work, attempt=attempt, step=step), "pkalice", 200)
        assert slurm.run("pkalice", ["scancel", "-s", "USR2", job_id]).returncode == 0
        until(slurm, cut, lambda found: job(found, "train")["state"] == "PENDING", "pkalice", 60)
        newest = max((cut / "adapter").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        assert int(newest.name.partition("-")[2]) >= step
    torn = newest / "optimizer.pt"
    with torn.open("r+b") as file:
        file.truncate(torn.stat().st_size - 100)
    found = ended(slurm, cut, seconds=200)
    assert states(found) == {"prepare": "COMPLETED", "train": "COMPLETED"}, found
    assert job(found, "train")["attempt"] == 3 and job(found, "train")["job_id"] == job_id
    assert (cut / "bad-checkpoints" / newest.name).is_dir()
    steps = [row["step"] for row in decision(cut)["history"]]
    assert steps[0] == 0 and steps[1] >= 12 and steps[2] == 40, steps
    assert losses(cut) == losses(run)
    name = "adapter/adapter_model.safetensors"
    assert (cut / name).read_bytes() == (run / name).read_bytes()


def at_work(found: dict[str, Any], attempt: int, step: int) -> bool:
    train = job(found, "train")
    return (
        train["attempt"] == attempt and train["state"] == "RUNNING" and (train["progress"] or {}).get("step", 0) >= step
    )


def decision(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "state" / "train.attempt.json").read_text(encoding="utf-8"))
    return found


def losses(run: Path) -> dict[int, float]:
    """By step; of a step that was done twice the last."""
    return {
        row["current_steps"]: row["loss"] for row in read_jsonl(run / "adapter" / "trainer_log.jsonl") if "loss" in row
    }


def test_ask_again(slurm: Cluster, run: Path) -> None:
    done = verb(slurm, "infer", run, "prompts=[你是谁,Who are you?]", "expect=[北大|PKU,北大|PKU]", env=THREADS)
    assert done.returncode == 0 and "submitted infer" in done.stderr, done.stderr
    assert job(ended(slurm, run, seconds=200), "infer")["attempt"] == 2
    assert [answer["passed"] for answer in read_jsonl(run / "answers.jsonl")] == [True, True]


def test_a_shared_model_that_nobody_may_write_to(slurm: Cluster, run: Path) -> None:
    """One user's model in a folder that all may read; two runs of another user at once use it."""
    made = Path(json.loads((run / "jobs" / "train.json").read_text(encoding="utf-8"))["payload"]["yaml"])
    base = Path(yaml.safe_load(made.read_text(encoding="utf-8"))["model_name_or_path"])
    shared = slurm.shared("common") / "我们的 model"
    shutil.copytree(base, shared, dirs_exist_ok=True)
    for file in (shared, *shared.rglob("*")):
        file.chmod(0o555 if file.is_dir() else 0o444)
    runs = [
        launched(slurm, "model=custom", f"model.path={shared}", "infer.prompts=[你是谁]", user="pkbob")
        for _ in range(2)
    ]
    for one in runs:
        assert states(ended(slurm, one, "pkbob")) == dict.fromkeys(KINDS, "COMPLETED")
        assert slurm.run("pkalice", ["ls", str(one)]).returncode != 0


def test_by_hand(slurm: Cluster, run: Path) -> None:
    """sbatch/*.sbatch with plain LLaMA-Factory YAMLs, from a folder with a space in its name."""
    folder = slurm.shared("pkalice") / "by hand"
    train = yaml.safe_load((run / "train.yaml").read_text(encoding="utf-8"))
    train |= {"output_dir": "saves/lora", "max_steps": 3}
    merge = yaml.safe_load((run / "merge.yaml").read_text(encoding="utf-8"))
    merge |= {"adapter_name_or_path": str(folder / "saves" / "lora"), "export_dir": str(folder / "merged")}
    infer = {"model_name_or_path": str(folder / "merged"), "template": "qwen", "max_new_tokens": 8}
    files = {
        "train.yaml": yaml.safe_dump(train),
        "merge.yaml": yaml.safe_dump(merge),
        "infer.yaml": yaml.safe_dump(infer),
    }
    slurm.run("pkalice", ["mkdir", str(folder)])
    for name, text in (files | {"questions.txt": "你是谁\nWho are you?\n"}).items():
        slurm.run("pkalice", ["bash", "-c", 'cat > "$0" <<< "$1"', str(folder / name), text])
    env = THREADS | {"PKUSLURM_PYTHON": str(slurm.python)}
    scripts = slurm.source / "sbatch"
    for options in (
        ["--nodes=2", str(scripts / "train.sbatch"), "train.yaml"],
        [str(scripts / "merge.sbatch"), "merge.yaml"],
        [str(scripts / "infer.sbatch"), "infer.yaml", "questions.txt"],
    ):
        done = slurm.run("pkalice", ["sbatch", "--wait", *options], cwd=folder, env=env, timeout=200)
        logs = "\n".join(file.read_text(encoding="utf-8") for file in folder.glob("*.log"))
        assert done.returncode == 0, logs
    state = json.loads((folder / "saves" / "lora.pkuslurm" / "state" / "train.json").read_text(encoding="utf-8"))
    assert state["state"] == "COMPLETED" and len(state["nodes"]) == 2
    assert (folder / "saves" / "lora.pkuslurm" / "done" / "train.json").is_file()
    assert (folder / "merged" / "model.safetensors").is_file()
    answers = list(read_jsonl(folder / "infer.pkuslurm" / "answers.jsonl"))
    assert [answer["prompt"] for answer in answers] == ["你是谁", "Who are you?"]
    again = slurm.run(
        "pkalice", ["sbatch", "--wait", "--nodes=2", str(scripts / "train.sbatch"), "train.yaml"], cwd=folder, env=env
    )
    assert again.returncode == 0, "complete already"
