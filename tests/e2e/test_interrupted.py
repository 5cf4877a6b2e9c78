"""Ctrl-C in each job, a rank killed, two runs at once: on the real thing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pkuslurm.rundir import RunDir, read_json
from tests import conftest
from tests.conftest import environment, start
from tests.e2e import models

pytestmark = pytest.mark.real
KINDS = ["prepare", "train", "merge", "infer", "report"]
OWN = ["model.path=qwen", "model.template=qwen", "dataset.path=rows.jsonl", "infer.max_new_tokens=8"]
OWN += ["train.per_device_train_batch_size=2", "train.cutoff_len=64", "infer.prompts=[one]"]


@pytest.fixture
def folder(weird: Path) -> Path:
    models.qwen(weird / "qwen")
    models.alpaca_without_input(weird / "rows.jsonl")
    return weird


def own_environment(folder: Path) -> dict[str, str]:
    return environment(folder, PKUSLURM_CACHE=str(folder / "cache"), PKUSLURM_TEST_TOKEN=str(folder))


def begin(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return start([*OWN, *arguments], folder, own_environment(folder))


def found(folder: Path) -> RunDir:
    deadline = time.monotonic() + 60
    while not (runs := list((folder / "runs").glob("2*"))):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return RunDir(runs[0])


def left_running(folder: Path) -> list[str]:
    return conftest.left_running(f"PKUSLURM_TEST_TOKEN={folder}")


def wait_for(run: RunDir, kind: str, process: subprocess.Popen[str]) -> None:
    """Until job ``kind`` runs its payload (for train: until it has made a step)."""
    deadline = time.monotonic() + 240
    while True:
        running = (read_json(run.state(kind)) or {}).get("state") == "RUNNING"
        if running and (kind != "train" or (read_json(run.progress("train")) or {}).get("step", 0) >= 1):
            time.sleep(2.0)
            return
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ctrl_c_in_each_job_and_on_again(folder: Path) -> None:
    """One run, interrupted in each of its jobs; ``retry`` goes on where it stood, to the end."""
    process = begin(folder, "train.max_steps=300", "nodes=2")
    run = found(folder)
    for position, kind in enumerate(KINDS[:-1]):
        wait_for(run, kind, process)
        process.send_signal(signal.SIGINT)
        pressed = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert time.monotonic() - pressed < 15
        assert states(run) == ["COMPLETED"] * position + ["CANCELLED"] * (5 - position)
        assert left_running(folder) == []
        assert "Traceback" not in err
        assert not run.merged.exists() or kind == "infer", "half a merged model under its final name"
        process = start(["retry", run.run_id], folder, own_environment(folder), module="pkuslurm")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert states(run) == ["COMPLETED"] * 5
    assert (read_json(run.result("train")) or {})["global_step"] == 300


def states(run: RunDir) -> list[str | None]:
    return [(read_json(run.state(job)) or {}).get("state") for job in KINDS]


def test_a_rank_killed_ends_both_nodes_with_its_name(folder: Path) -> None:
    process = begin(folder, "train.max_steps=2000", "nodes=2")
    run = found(folder)
    wait_for(run, "train", process)
    os.kill(rank_pid(folder, 1), signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert time.monotonic() - killed < 15
    reason = (read_json(run.state("train")) or {})["reason"]
    assert "rank 1" in reason and "SIGKILL" in reason, reason
    assert reason in err
    assert states(run)[2:] == ["SKIPPED"] * 3
    assert left_running(folder) == []


def rank_pid(folder: Path, rank: int) -> int:
    """A forked rank's environment, as others see it, is its launcher's; it is known by its name."""
    for entry in Path("/proc").iterdir():
        try:
            name, variables = (entry / "comm").read_text(), (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if name == f"pku-rank-{rank}\n" and f"PKUSLURM_TEST_TOKEN={folder}".encode() in variables:
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


def test_two_runs_at_once(folder: Path) -> None:
    """Two nodes each, one cache: no port and no file of the one is the other's."""
    both = [begin(folder, "train.max_steps=2", "nodes=2", f"name=run{number}") for number in (1, 2)]
    ended = [process.communicate(timeout=400) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    paths = {out.strip().split("\n")[-1] for out, _ in ended}
    assert len(paths) == 2
    cached = [(read_json(RunDir(Path(path)).result("prepare")) or {})["dataset"]["key"] for path in paths]
    assert len(set(cached)) == 1
