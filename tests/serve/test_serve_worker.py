"""The door as the command of a worker, and its engines in a container."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.containers.test_inside import calls, fake
from tests.serve.doors import Door, doors, wait


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    with doors(tmp_path) as made:
        made[0].module = "pkuslurm.worker"
        yield made[0]


def state(door: Door) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((door.run / "state" / "serve.json").read_text(encoding="utf-8"))
    return value


def test_a_worker_that_is_cancelled_leaves_nothing(door: Door) -> None:
    door.how("tuned", stubborn=True)
    door.wait_ready()
    os.kill(door.pid, signal.SIGTERM)
    assert door.wait_end() == 143
    assert state(door)["state"] == "CANCELLED"
    assert not door.endpoint_file.exists()
    assert not Path(door.told("tuned")["socket"]).parent.exists()
    wait(lambda: not door.processes())


def test_a_signal_to_every_process_of_a_step_is_a_cancellation(door: Door) -> None:
    """As Slurm sends it; whoever is first must not make it look like an end of its own."""
    door.wait_ready()
    for pid in sorted(door.processes(), reverse=True):
        os.kill(pid, signal.SIGTERM)
    assert door.wait_end() == 143
    assert state(door)["state"] == "CANCELLED"
    assert not door.endpoint_file.exists()


def test_an_idle_door_completes_its_job(door: Door) -> None:
    door.payload["idle_minutes"] = 0.3 / 60
    door.wait_ready()
    assert door.wait_end() == 0
    assert state(door)["state"] == "COMPLETED"
    assert (door.run / "done" / "serve.json").exists()


def test_a_dead_engine_is_the_jobs_reason(door: Door) -> None:
    door.wait_ready()
    door.chat("kill yourself")
    assert door.wait_end() == 1
    assert state(door)["state"] == "FAILED"
    assert "the engine of tuned (transformers) was ended by SIGKILL" in state(door)["reason"]


def test_a_refusal_is_the_jobs_reason(door: Door) -> None:
    door.how("tuned", refuses="serve.engine=auto: nothing is installed")
    assert door.wait_end() == 1
    assert "the engine of tuned: serve.engine=auto: nothing is installed" in state(door)["reason"]


def test_when_the_worker_is_killed_the_engines_go_too(door: Door) -> None:
    door.how("tuned", stubborn=True)
    door.wait_ready()
    os.kill(door.pid, signal.SIGKILL)
    door.wait_end()
    wait(lambda: not door.processes())


def test_the_engines_run_in_the_container_with_the_folder_of_their_sockets(door: Door, tmp_path: Path) -> None:
    door.module = "pkuslurm.serve"
    image = tmp_path / "image.sif"
    image.touch()
    log = fake(tmp_path / "bin", "apptainer", str(image))
    door.payload["container"] = {
        "runtime": "apptainer",
        "image": str(image),
        "accelerator": "cpu",
        "mounts": [str(door.run)],
        "if_there": [],
        "home": str(door.run / "home"),
    }
    door.env["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    door.wait_ready()
    assert door.chat("hello")[0] == 200
    found = [words for words, _ in calls(log)]
    assert len(found) == 1
    for words in found:
        assert str(Path(door.told("tuned")["socket"]).parent) in words
        assert door.told("tuned")["key"] not in words
    os.kill(door.pid, signal.SIGTERM)
    assert door.wait_end() == 143
    wait(lambda: not door.processes())
