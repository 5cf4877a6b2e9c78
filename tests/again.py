"""A run's training once more, into a folder of its own: for what compares ways of starting it."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from pkuslurm.rundir import RunDir


def copied(run: Path, folder: Path, **changes: object) -> Path:
    """The job file of ``run``'s training as it would be in ``folder``, where all that it writes goes.

    ``changes`` are keys of its train.yaml. Its data and its model stay where they are.
    """
    old, new = RunDir(run), RunDir(folder)
    for name in ("jobs", "state", "results"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    args = yaml.safe_load(old.train_yaml.read_text(encoding="utf-8"))
    new.train_yaml.write_text(
        yaml.safe_dump(args | {"output_dir": str(new.adapter)} | changes, allow_unicode=True), encoding="utf-8"
    )
    job = json.loads(old.job("train").read_text(encoding="utf-8"))
    job["run_dir"] = str(folder)
    job["parents"] = []
    job["payload"] = {
        "yaml": str(new.train_yaml),
        "progress": str(new.progress("train")),
        "stop_file": str(new.stop("train")),
        "failures": str(new.failures),
        "result": str(new.result("train")),
    }
    job["expect"] = job["expect"] | {"dir": str(new.adapter)}
    new.job("train").write_text(json.dumps(job), encoding="utf-8")
    return new.job("train")
