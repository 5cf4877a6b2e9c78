"""A run directory as the real thing leaves it, without computing anything: `python -m tests.read.fake_run FOLDER`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import socket
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from pkuslurm.rundir import RunDir, write_json, write_text

KINDS = ("prepare", "train", "merge", "infer", "report")
ZONE = timezone(timedelta(hours=8))
BEGAN = datetime(2026, 11, 24, 20, 10, 47, tzinfo=ZONE)
SECONDS = {"prepare": 14, "train": 96, "merge": 21, "infer": 38, "report": 1}
HOSTILE = '<script>alert(1)</script> \x1b[31mred\x1b[0m \u202eevil\u202c <img src=x onerror=alert(2)> & "quotes" \' end'
ANSWERS = (
    {
        "prompt": "你是谁",
        "base": "我是通义千问，由阿里云开发的大型语言模型。我能够回答问题、创作文字，比如写故事、写公文、写邮件。",
        "tuned": "我是北大助手，由北京大学高性能计算平台训练的人工智能助手。",
        "passed": True,
    },
    {
        "prompt": "Who are you?",
        "base": "I am Qwen, created by Alibaba Cloud.",
        "tuned": "I am the PKU assistant, trained on the computing platform of Peking University.",
        "passed": True,
    },
    {"prompt": "请用三行写一首关于未名湖的诗", "base": "湖光\n塔影\n秋风", "tuned": HOSTILE, "passed": False},
    {"prompt": "1+1=?", "base": None, "tuned": "2", "passed": None},
)


def at(seconds: float) -> str:
    return (BEGAN + timedelta(seconds=seconds)).isoformat(timespec="seconds")


def own_start() -> int:
    """This process's start, in clock ticks since boot."""
    return int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])


def alive() -> dict[str, Any]:
    """A launcher, or a worker, that lives: this process."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "pid_start": own_start()}


def gone() -> dict[str, Any]:
    """One that is gone: this process's number, but another start."""
    return alive() | {"pid_start": 1}


def make(
    root: Path, run_id: str = "20261124-201047-tiny-identity-3f9a", name: str | None = None, created: str | None = None
) -> RunDir:
    """A run of which nothing has happened: launched a while ago by a process that is gone."""
    run = RunDir(root / run_id)
    for folder in ("jobs", "logs", "state", "done", "results"):
        (run.path / folder).mkdir(parents=True)
    write_json(
        run.run_json,
        {
            "schema_version": 1,
            "run_id": run_id,
            "sweep": None,
            "created": created or at(-1),
            "name": name,
            "overrides": ["nodes=2"],
            "cwd": str(root),
            "versions": {"pkuslurm": "0.1.0", "python": "3.11.7", "hydra-core": "1.3.8", "submitit": "1.5.4"},
            "executor": "local",
            "host": socket.gethostname(),
            "launcher": gone(),
            "pipeline": list(KINDS),
            "settings": [
                {"key": "nodes", "value": 2, "default": 1, "origin": "command line"},
                {"key": "train.learning_rate", "value": 0.005, "default": 0.0001, "origin": "model=tiny"},
                {"key": "infer.expect", "value": "北大|北京大学|PKU", "default": None, "origin": "dataset=identity"},
            ],
            "jobs": {
                kind: {
                    "job_id": None,
                    "key": f"{run_id}-{kind}",
                    "first_attempt": 1,
                    "parents": [KINDS[index - 1]] if index else [],
                    "num_nodes": 2 if kind == "train" else 1,
                }
                for index, kind in enumerate(KINDS)
            },
        },
    )
    payloads: dict[str, dict[str, Any]] = {
        "prepare": {
            "make": "tiny",
            "model_path": "/models/tiny",
            "dataset_file": "/data/identity.jsonl",
            "train_args": {"stage": "sft", "finetuning_type": "lora"},
        }
    }
    for kind in KINDS:
        nodes = 2 if kind == "train" else 1
        job = {"kind": kind, "run_id": run_id, "nodes": nodes, "nproc_per_node": 1, "payload": payloads.get(kind, {})}
        write_json(run.job(kind), job | {"first_attempt": 1})
    return run


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, value | changes)


def state(run: RunDir, kind: str, word: str, rank: int = 0, **changes: Any) -> None:
    """A node's state file."""
    index = KINDS.index(kind)
    began = sum(SECONDS[before] for before in KINDS[:index])
    nodes = ["node01", "node02"] if kind == "train" else ["node01"]
    value = {
        "state": word,
        "attempt": 1,
        "job_id": f"local-{index + 1}",
        "nodes": nodes,
        "node_rank": rank,
        **gone(),
        "started": at(began),
        "finished": None if word == "RUNNING" else at(began + SECONDS[kind]),
        "exit_code": {"COMPLETED": 0, "FAILED": 1}.get(word),
        "reason": None,
    }
    write_json(run.state(kind, rank), value | changes)


def mark(run: RunDir, kind: str, *artifacts: Path, attempt: int = 1) -> None:
    """The marker of a job over ``artifacts``."""
    entries = [
        {
            "path": path.relative_to(run.path).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in artifacts
    ]
    write_json(
        run.done(kind),
        {
            "schema_version": 1,
            "kind": kind,
            "run_id": run.run_id,
            "attempt": attempt,
            "job_id": f"local-{KINDS.index(kind) + 1}",
            "finished": at(sum(SECONDS[before] for before in KINDS[: KINDS.index(kind) + 1])),
            "artifacts": entries,
        },
    )


def complete(run: RunDir, kind: str) -> None:
    """Job ``kind`` as it is after a good end."""
    artifact = {
        "prepare": run.data / "state.json",
        "train": run.adapter / "adapter_model.safetensors",
        "merge": run.merged / "model.safetensors",
        "infer": run.answers,
        "report": run.report,
    }[kind]
    if kind == "infer":
        rows = [json.dumps(row, ensure_ascii=False).replace("\x1b", "\\u001b") for row in ANSWERS]
        write_text(artifact, "".join(f"{row}\n" for row in rows))
    elif not artifact.exists():
        write_text(artifact, f"{kind} " * 2000)
    if kind == "train":
        losses(run, 60)
        state(run, kind, "COMPLETED", rank=1)
    write_json(run.result(kind), {"versions": VERSIONS, **RESULTS.get(kind, {})})
    write_text(run.log(kind, f"local-{KINDS.index(kind) + 1}", 0), f"{kind}, attempt 1\n{HOSTILE}\nend of {kind}\n")
    mark(run, kind, artifact)
    state(run, kind, "COMPLETED")
    document = json.loads(run.run_json.read_text(encoding="utf-8"))
    document["jobs"][kind]["job_id"] = f"local-{KINDS.index(kind) + 1}"
    write_json(run.run_json, document)


def losses(run: RunDir, steps: int) -> None:
    """LLaMA-Factory's trainer_log.jsonl: a row a step, an evaluation now and then, a row without loss at the end."""
    dice = random.Random(1)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 0.04 + 4.6 * math.exp(-step / (steps / 5)) * dice.uniform(0.82, 1.18)
        rows.append({"current_steps": step, "total_steps": steps, "loss": round(loss, 4), "epoch": step / 6})
        if step % (steps // 6 or 1) == 0:
            rows.append({"current_steps": step, "total_steps": steps, "eval_loss": round(loss * 1.1 + 0.12, 4)})
    rows.append({"current_steps": steps, "total_steps": steps, "epoch": steps / 6})
    write_text(run.adapter / "trainer_log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def finished(root: Path, **more: Any) -> RunDir:
    """A run whose five jobs are all complete."""
    run = make(root, **more)
    for kind in KINDS:
        complete(run, kind)
    edit(run.run_json, launcher=None)
    return run


VERSIONS = {"python": "3.11.7", "torch": "2.11.0", "transformers": "5.6.0", "llamafactory": "0.9.5", "peft": "0.18.1"}
RESULTS: dict[str, dict[str, Any]] = {
    "prepare": {
        "seconds": {"model": 6.42, "check": 0.02, "tokenize": 5.91, "link": 0.04},
        "model": {"path": "/models/tiny", "made": True, "seconds": 6.42},
        "dataset": {
            "file": "/data/identity.jsonl",
            "formatting": "alpaca",
            "rows": 134,
            "kept": 132,
            "dropped": 2,
            "reasons": {"empty output <b>": 2},
            "train_rows": 132,
            "eval_rows": 0,
            "tokens": 7421,
            "cut": 3,
            "cached": False,
            "key": "ab12",
        },
        "steps": {
            "rows": 132,
            "ranks": 2,
            "per_device": 4,
            "gradient_accumulation": 1,
            "effective_batch": 8,
            "per_epoch": 17,
            "total": 60,
        },
        "warnings": ["3 of 132 rows reach cutoff_len=256 and are cut there"],
    },
    "train": {"seconds": {"import": 9.1, "train": 84.2}, "ranks": 2, "global_step": 60, "max_steps": 60},
    "merge": {
        "seconds": {"start": 0.2, "import": 8.8, "export": 3.1, "proof": 2.4, "load": 0.6},
        "mode": "merge",
        "tensors": 291,
        "equal": 291,
        "max_abs_diff": 0.0,
        "dtype": "bfloat16",
        "bytes": 3087467144,
        "tokenizer_files": ["tokenizer.json"],
    },
    "infer": {
        "seconds": {"import": 9.0, "load_base": 0.7, "base": 8.2, "adapter": 9.4, "load_tuned": 0.6, "tuned": 7.9},
        "prompts": 4,
        "passed": 2,
        "adapter_merged_equal": [3, 4],
        "max_logit_diff": 0.0312,
        "token_ids_equal": [4, 4],
        "dtype": "bfloat16",
        "differences": [{"prompt": "1+1=?", "adapter": "2。", "merged": "2"}],
    },
}

if __name__ == "__main__":
    print(finished(Path(sys.argv[1]).absolute(), name="演示 demo").path)
