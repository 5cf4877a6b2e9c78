"""A sweep's directory as a launch leaves it, on Slurm or here, cheap enough for a thousand points."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pkuslurm.rundir import RunDir
from pkuslurm.sweepdir import SweepDir
from tests.read import fake_run

SWEEP_ID = "20261124-201047-tiny-sweep-3f9a"
KINDS = ("prepare", "train", "merge", "infer")
# what the arrays are called: prepare 100, train 101, merge 102, infer 103; and the report, a job of its own
IDS = {kind: str(100 + index) for index, kind in enumerate(KINDS)}
REPORT = "109"
FOLDERS = ("jobs", "logs", "state", "done", "results")


def make(
    root: Path,
    count: int,
    executor: str = "local",
    shares: int = 1,
    sweep_id: str = SWEEP_ID,
    created: str | None = None,
    **document: Any,
) -> SweepDir:
    """A sweep of which nothing has happened; with ``executor="slurm"`` all of it is submitted."""
    home = SweepDir(root / sweep_id)
    common: dict[str, Any] = {"schema_version": 1, "created": created or fake_run.at(-1), "executor": executor}
    for number in range(shares):
        share = home.shared(number)
        own = {"run_id": share.run_id, "sweep": sweep_id, "launcher": None, "jobs": {"prepare": _entry(())}}
        _put(share.run_json, common | own)
        unpack(share)
    for number in range(count):
        point = home.point(number)
        jobs = {kind: _entry(KINDS[max(0, index - 1) : index]) for index, kind in enumerate(KINDS)}
        own = {"run_id": point.run_id, "sweep": sweep_id, "launcher": None, "label": label(number), "jobs": jobs}
        _put(point.run_json, common | own)
        (point.path / "shared").symlink_to(f"../shared/{number % shares}")
    report = _entry(()) | {"key": key("report", sweep_id)}
    if executor == "slurm":
        report |= {"job_id": REPORT}
        _put(home.group(0), _group([f"shared/{number}" for number in range(shares)], KINDS[:1], sweep_id))
        _put(home.group(1), _group([str(number) for number in range(count)], KINDS[1:], sweep_id))
    points = [
        {"n": n, "label": label(n), "values": {"train.learning_rate": f"{n}e-5"}, "shared": n % shares, "family": 0}
        for n in range(count)
    ]
    own = {"sweep_id": sweep_id, "name": None, "launcher": None, "points": points, "jobs": {"report": report}}
    _put(home.sweep_json, common | own | {"cancelled": None} | document)
    return home


def label(number: int) -> str:
    return f"lr={number}e-5"


def key(kind: str, sweep_id: str = SWEEP_ID) -> str:
    return f"{sweep_id}-{kind}"


def _group(members: Sequence[str], kinds: Sequence[str], sweep_id: str) -> Mapping[str, Any]:
    jobs = {kind: {"key": key(kind, sweep_id), "asked": "x", "held": False, "job_id": IDS[kind]} for kind in kinds}
    return {"members": list(members), "jobs": jobs, "array": True}


def _entry(parents: Sequence[str]) -> dict[str, Any]:
    return {"job_id": None, "key": None, "first_attempt": 1, "parents": list(parents), "num_nodes": 1}


def _put(path: Path, value: object) -> None:
    """Without waiting for the disk."""
    _write(path, json.dumps(value))


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def unpack(run: RunDir) -> None:
    """What is there of a point once its first job has started."""
    for folder in FOLDERS:
        (run.path / folder).mkdir(parents=True, exist_ok=True)


def prepared(home: SweepDir, number: int = 0) -> None:
    """A share whose prepare is complete."""
    share = home.shared(number)
    _write(share.data / "state.json", "{}")
    fake_run.mark(share, "prepare", share.data / "state.json")
    fake_run.state(share, "prepare", "COMPLETED")


def state(point: RunDir, kind: str, word: str, **changes: Any) -> None:
    unpack(point)
    fake_run.state(point, kind, word, **changes)


def complete(point: RunDir, loss: float = 0.5, passed: bool = True) -> None:
    """A point whose own jobs are all complete."""
    unpack(point)
    answers = json.dumps({"prompt": "a", "passed": passed}) + "\n"
    artifacts = {
        "train": (point.adapter / "adapter_model.safetensors", "train" * 1000),
        "merge": (point.merged / "model.safetensors", "merge" * 1000),
        "infer": (point.answers, answers),
    }
    for kind, (path, content) in artifacts.items():
        _write(path, content)
        fake_run.mark(point, kind, path)
        fake_run.state(point, kind, "COMPLETED")
    progress = {"step": 60, "total_steps": 60, "loss": loss, "eta_seconds": None}
    _put(point.progress("train"), progress)
