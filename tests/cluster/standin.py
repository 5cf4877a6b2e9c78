"""A stand-in for the python that has LLaMA-Factory (``cluster.python``): the same job files in, the same artifacts out.

It takes a moment. ``STANDIN_<KIND>`` in the job's environment says what else: ``fail`` (exit 3), ``sleep`` (for ever).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

KINDS = ("prepare", "train", "merge", "infer")


def main(argv: list[str]) -> None:
    kind = next(word for word in argv if word in KINDS)
    job = json.loads(Path(argv[-1]).read_text(encoding="utf-8"))
    seen = {name: os.environ.get(name) for name in SEEN}
    rank = os.environ.get("NODE_RANK", "0")
    view = Path(job["run_dir"]) / "views"
    view.mkdir(exist_ok=True)
    (view / f"{kind}.{rank}.json").write_text(json.dumps(seen | {"argv": argv}), encoding="utf-8")
    todo = os.environ.get(f"STANDIN_{kind.upper()}", "")
    if todo.startswith("fail") and todo in ("fail", f"fail:{rank}"):
        print(f"RuntimeError: {kind} was told to fail", flush=True)
        sys.exit(3)
    if todo == "sleep":
        time.sleep(600)
    if rank == "0":
        MAKE[kind](job, Path(str(job["expect"].get("dir") or job["expect"].get("file"))))
        Path(job["payload"]["result"]).write_text("{}", encoding="utf-8")


SEEN = (
    *("NODE_RANK", "NNODES", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "SLURM_PROCID", "SLURMD_NODENAME"),
    *("SLURM_STEP_NODELIST", "GLOO_SOCKET_IFNAME", "SLURM_JOB_ID", "HOME", "USER", "CANARY_TOKEN", "SBATCH_PARTITION"),
)


def weights(file: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")


def prepare(job: dict, folder: Path) -> None:  # type: ignore[type-arg]
    model = Path(job["payload"]["model_path"])
    if job["payload"].get("make"):
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text("{}", encoding="utf-8")
    data = folder / "train"
    data.mkdir(parents=True, exist_ok=True)
    (data / "data.arrow").write_bytes(b"x")
    (data / "dataset_info.json").write_text("{}", encoding="utf-8")
    (data / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}), encoding="utf-8")


def train(job: dict, folder: Path) -> None:  # type: ignore[type-arg]
    folder.mkdir(exist_ok=True)
    weights(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    state = {"global_step": 3, "max_steps": 3}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")


def merge(job: dict, folder: Path) -> None:  # type: ignore[type-arg]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    weights(folder / "model.safetensors")


def infer(job: dict, file: Path) -> None:  # type: ignore[type-arg]
    lines = [
        {"prompt": row["prompt"], "base": "b", "tuned": "我是北大助手", "passed": True if row["expect"] else None}
        for row in job["payload"]["prompts"]
    ]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


MAKE = {"prepare": prepare, "train": train, "merge": merge, "infer": infer}

if __name__ == "__main__":
    main(sys.argv[1:])
