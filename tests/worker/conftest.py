"""A run directory with hostile names, and workers as processes on stand-in payloads (no torch)."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.rundir import RunDir, write_json

REPOSITORY = Path(__file__).resolve().parents[2]
FAKE_TORCHRUN = Path(__file__).with_name("fake_torchrun.py")


def safetensors(path: Path, cut: int = 0) -> None:
    """A minimal weights file; ``cut`` bytes short of what its header promises."""
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    )
    whole = struct.pack("<Q", len(header)) + header.encode() + b"\1" * 16
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(whole[: len(whole) - cut])


def adapter(folder: Path, step: int = 60, last: int = 60, cut: int = 0, **more: Any) -> None:
    write_json(folder / "trainer_state.json", {"global_step": step, "max_steps": last, **more})
    write_json(folder / "adapter_config.json", {"r": 8})
    safetensors(folder / "adapter_model.safetensors", cut)


@dataclass
class Lab:
    """Writes job files, starts workers on them, and finds whatever they left running."""

    run: RunDir
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def job(self, kind: str, script: str, *, ranks: bool = False, **fields: Any) -> Path:
        """A job whose payload is the Python text ``script``, under the stand-in torchrun if ``ranks``."""
        payload = self.run.path / f"{kind}.py"
        payload.write_text("import os, sys, time, signal, json\n" + script, encoding="utf-8")
        command = [sys.executable, str(payload)]
        if ranks:
            numbers = [str(fields.get("nodes", 1)), "$NODE_RANK", str(fields.get("nproc_per_node", 1))]
            command = [sys.executable, str(FAKE_TORCHRUN), *numbers, str(payload)]
        expect = {
            "prepare": {"dir": str(self.run.data), "model": None},
            "train": {"dir": str(self.run.adapter), "weights": "adapter_model.safetensors"},
            "merge": {"dir": str(self.run.merged)},
            "infer": {"file": str(self.run.answers), "lines": 2},
            "report": {"file": str(self.run.report)},
        }[kind]
        value = {
            "schema_version": 1,
            "run_id": self.run.run_id,
            "kind": kind,
            "key": f"{self.run.run_id}-{kind}",
            "run_dir": str(self.run.path),
            "parents": [],
            "nodes": 1,
            "nproc_per_node": 1,
            "first_attempt": 1,
            "command": command,
            "env": {"TOKEN_OF_TEST": self.token},
            "unset": [],
            "payload": {},
            "expect": expect,
        }
        write_json(self.run.job(kind), {**value, **fields})
        return self.run.job(kind)

    def start(self, job_file: Path, node_rank: int = 0, **environ: str) -> subprocess.Popen[bytes]:
        kind = job_file.stem
        log = self.run.log(kind, environ.get("PKUSLURM_JOB_ID", "local-1"), node_rank)
        log.parent.mkdir(exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        env = {
            **kept,
            "PYTHONPATH": str(REPOSITORY),
            "NODE_RANK": str(node_rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29511",
            "PKUSLURM_JOB_ID": "local-1",
            "SLURMD_NODENAME": f"node{node_rank}",
            "TOKEN_OF_TEST": self.token,
            **environ,
        }
        with log.open("ab") as file:
            worker = subprocess.Popen(
                [sys.executable, "-m", "pkuslurm.worker", str(job_file)],
                env=env,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.started.append(worker)
        return worker

    def work(self, job_file: Path, **environ: str) -> int:
        return self.start(job_file, **environ).wait(timeout=20)

    def log(self, kind: str, node_rank: int = 0) -> str:
        return self.run.log(kind, "local-1", node_rank).read_text(encoding="utf-8")

    def state(self, kind: str, node_rank: int = 0) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.run.state(kind, node_rank).read_text(encoding="utf-8"))
        return value

    def left(self) -> list[int]:
        """Processes, whoever's children they are now, that were started with this test's token."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    if self.token.encode() in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
        return found

    @staticmethod
    def until(condition: Callable[[], Any], seconds: float = 10) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, "did not happen in time"
            time.sleep(0.03)
        return value

    def pid_of(self, name: str) -> int:
        """The pid that a payload wrote into the file ``name`` of the run directory."""
        path = self.run.path / name
        return int(self.until(lambda: path.exists() and path.read_text().strip()))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    run = RunDir(tmp_path / "my 'run' \"北大\" $x")
    run.path.mkdir()
    lab = Lab(run)
    yield lab
    for pid in lab.left():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for worker in lab.started:
        worker.wait(timeout=10)
