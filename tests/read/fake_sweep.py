"""A sweep's directory as the real thing leaves it, computing nothing: `python -m tests.read.fake_sweep FOLDER N`."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pkuslurm.rundir import RunDir, write_json, write_text
from pkuslurm.sweepdir import SweepDir
from tests.read import fake_run
from tests.read.fake_run import complete, edit, state

SWEEP_ID = "20261124-201047-tiny-sweep-5c1d"
KINDS = ("prepare", "train", "merge", "infer")


def make(root: Path, points: Sequence[Mapping[str, str]], **document: Any) -> SweepDir:
    """A sweep whose points have not begun; what they share is prepared."""
    sweep = SweepDir(root / SWEEP_ID)
    labels = [",".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items()) for point in points]
    write_json(
        sweep.sweep_json,
        {
            "schema_version": 1,
            "sweep_id": sweep.sweep_id,
            "created": fake_run.at(-1),
            "name": None,
            "overrides": [],
            "versions": {"pkuslurm": "0.1.0", "hydra-core": "1.3.8"},
            "executor": "local",
            "launcher": None,
            "pipeline": list(KINDS),
            "metric": "eval_loss",
            "direction": "minimize",
            "keep_merged": "best",
            "keys": list(points[0]) if points else [],
            "points": [
                {"n": n, "label": label, "values": dict(point), "config": f"{n:x}", "shared": 0, "family": 0}
                for n, (point, label) in enumerate(zip(points, labels, strict=True))
            ],
            "groups": [],
            "jobs": {"report": {"key": f"{sweep.sweep_id}-report", "job_id": None, "first_attempt": 1}},
            "cancelled": None,
        }
        | document,
    )
    shared = fake_run.make(root, f"{SWEEP_ID}/shared/0")
    edit(shared.run_json, run_id=shared.run_id, sweep=SWEEP_ID, launcher=None)
    only(shared, "prepare")
    complete(shared, "prepare")
    for n, label in enumerate(labels):
        run = sweep.point(n)
        run.path.mkdir()
        (run.path / "shared").symlink_to("../shared/0")
        fake_run.make(root, f"{SWEEP_ID}/{n}")
        edit(run.run_json, sweep=SWEEP_ID, label=label, launcher=None)
        only(run, *KINDS)
        entries = json.loads(run.run_json.read_text(encoding="utf-8"))["jobs"]
        entries["prepare"] = json.loads(shared.run_json.read_text(encoding="utf-8"))["jobs"]["prepare"]
        edit(run.run_json, jobs=entries)
        write_text(run.merge_yaml, "finetuning_type: lora\n")
        write_text(sweep.path / "base" / "config.json", "{}")
        edit(run.job("merge"), payload={"base": str(sweep.path / "base")})
    return sweep


def only(run: RunDir, *kinds: str) -> None:
    """Its pipeline is of these jobs."""
    jobs = json.loads(run.run_json.read_text(encoding="utf-8"))["jobs"]
    edit(run.run_json, jobs={kind: jobs[kind] for kind in kinds}, pipeline=list(kinds))


def finish(run: RunDir, loss: float, evaluated: float | None = None, good: int = 3, steps: int = 60) -> None:
    """All of a point's jobs complete: it ends at ``loss``, and ``good`` of its three answers are as expected."""
    for kind in KINDS[1:]:
        complete(run, kind)
    curve(run, loss, evaluated, steps)
    answers = [{"prompt": "你是谁", "base": "x", "tuned": "y", "passed": index < good} for index in range(3)]
    write_text(run.answers, "".join(json.dumps(one) + "\n" for one in answers))
    fake_run.mark(run, "infer", run.answers)


def curve(run: RunDir, loss: float, evaluated: float | None = None, steps: int = 60) -> None:
    """trainer_log.jsonl: from 4.5 down to ``loss``, which is the last."""
    dice = random.Random(run.path.name)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        noise = dice.uniform(0.9, 1.1) if step < steps else 1.0
        value = (loss + (4.5 - loss) * (math.exp(-6 * step / steps) - math.exp(-6))) * noise
        rows.append({"current_steps": step, "total_steps": steps, "loss": value, "lr": 1e-4, "epoch": step / 6})
        if evaluated is not None and step % max(1, steps // 6) == 0:
            rows.append({"current_steps": step, "total_steps": steps, "eval_loss": evaluated + (value - loss)})
    rows.append({"current_steps": steps, "total_steps": steps, "epoch": steps / 6})
    write_text(run.adapter / "trainer_log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def fail(run: RunDir, reason: str) -> None:
    """Its training failed, and what comes after it was skipped."""
    state(run, "train", "FAILED", reason=reason)
    for kind in ("merge", "infer"):
        state(run, kind, "SKIPPED", started=None, finished=None, reason="train did not complete")
    document = json.loads(run.run_json.read_text(encoding="utf-8"))
    document["jobs"]["train"]["job_id"] = "local-2"
    write_json(run.run_json, document)


def example(root: Path, count: int, evaluated: bool = True, steps: int = 60) -> SweepDir:
    """``count`` points: most complete, some failed for two reasons, one still waiting."""
    dice = random.Random(2)
    rates = [f"{1 + index % 9}e-{3 + index // 9 % 4}" for index in range(count)]
    sets = ["identity", "mine", "我的数据"]
    points = [
        {"train.learning_rate": rate, "dataset": sets[index % 3], "seed": str(index)}
        for index, rate in enumerate(rates)
    ]
    sweep = make(root, points, name="演示 demo")
    for n in range(count):
        run = sweep.point(n)
        if n % 7 == 4:
            fail(run, f"rank {n} on node{n:02d}: CUDA out of memory; see {run.logs}/train-local-2_0.log")
        elif n % 23 == 2:
            fail(run, "model.path=/models/none: config.json is not there")
        elif n == count - 1:
            continue
        else:
            loss = 0.05 + dice.random() * 1.2
            curve_end = loss if n % 11 != 3 else 9.0
            finish(run, curve_end, loss * 1.1 + 0.1 if evaluated else None, good=dice.randrange(4), steps=steps)
    return sweep


if __name__ == "__main__":
    print(example(Path(sys.argv[1]).absolute(), int(sys.argv[2]), "noeval" not in sys.argv).path)
