"""What holds of the worker with torchrun holds with prefork: the same tests, the real launcher, stand-in ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pkuslurm.worker.processes import Death, RankWatch
from tests.worker import conftest, test_worker_run
from tests.worker.conftest import REPOSITORY, Lab


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test asks for ranks, prefork makes them."""
    monkeypatch.setattr(conftest, "FAKE_TORCHRUN", Path(__file__).with_name("fake_prefork.py"))


test_cancel_leaves_nothing = test_worker_run.test_cancel_leaves_nothing
test_two_nodes_complete_together = test_worker_run.test_two_nodes_complete_together
test_a_killed_rank_ends_both_nodes = test_worker_run.test_a_killed_rank_ends_both_nodes
test_the_cause_is_blamed_not_the_peer_that_spoke_first = (
    test_worker_run.test_the_cause_is_blamed_not_the_peer_that_spoke_first
)
test_a_refusal = test_worker_run.test_a_refusal_under_torchrun
test_a_killed_worker_ends_the_other_node = test_worker_run.test_a_killed_worker_ends_the_other_node


def test_what_a_rank_raised_is_the_reason_and_its_traceback_is_in_the_log(lab: Lab) -> None:
    script = "if os.environ['RANK'] == '1': raise ValueError('坏 rate')\ntime.sleep(60)\n"
    assert lab.work(lab.job("train", script, ranks=True, nproc_per_node=2)) == 1
    assert lab.state("train")["reason"] == "rank 1: ValueError: 坏 rate"
    assert "Traceback" in lab.log("train")
    assert lab.left() == []


def test_a_stop_of_all_ranks_is_told_by_its_code(lab: Lab) -> None:
    """torchrun makes a 1 of it."""
    script = (
        "os.makedirs('adapter/checkpoint-16', exist_ok=True)\ntime.sleep(0.3 * int(os.environ['RANK']))\nsys.exit(75)\n"
    )
    assert lab.work(lab.job("train", script, ranks=True, nproc_per_node=2)) == 1
    state = lab.state("train")
    assert (state["state"], state["exit_code"]) == ("FAILED", 75)
    assert state["reason"].startswith("stopped at step 16")
    assert "failed (exitcode" not in lab.log("train")


def test_a_rank_that_cannot_run_is_known(tmp_path: Path) -> None:
    """Its environment, as others see it, is the launcher's; so it is found by its name."""
    script = tmp_path / "ranks.py"
    script.write_text("import os, time\n" + test_worker_run.RANKS + test_worker_run.FOREVER, encoding="utf-8")
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, str(conftest.FAKE_TORCHRUN), "2", "1", "2", str(script)]
    with subprocess.Popen(words, env=env, cwd=tmp_path) as launcher:
        watch = RankWatch()
        try:
            file = tmp_path / "rank3.pid"
            rank = int(Lab.until(lambda: file.exists() and file.read_text()))
            os.kill(rank, signal.SIGSTOP)
            Lab.until(lambda: watch.wait(0.1) or watch.stuck() == [(3, "its process is stopped (SIGSTOP)")], 5)
            os.kill(rank, signal.SIGKILL)
            # a moment later the launcher ends the others, which one look may see together with it
            assert Death(3, rank, -signal.SIGKILL) in Lab.until(lambda: watch.wait(0.1), 5)
        finally:
            launcher.kill()
            watch.close()


def test_a_killed_launcher_takes_its_ranks_along(lab: Lab) -> None:
    script = test_worker_run.RANKS + "open('launcher.pid', 'w').write(str(os.getppid()))\n" + test_worker_run.FOREVER
    worker = lab.start(lab.job("train", script, ranks=True, nproc_per_node=2))
    ranks = [lab.pid_of(f"rank{rank}.pid") for rank in (0, 1)]
    began = time.monotonic()
    os.kill(lab.pid_of("launcher.pid"), signal.SIGKILL)
    lab.until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in ranks), 2)
    assert worker.wait(timeout=10) == 1
    assert time.monotonic() - began < 5
    assert lab.left() == []
