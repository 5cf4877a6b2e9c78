"""Whole workers as processes, on stand-in payloads."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from pkuslurm.rundir import write_json
from pkuslurm.worker import marker

from .conftest import REPOSITORY, Lab, adapter

WRITE_REPORT = "open('report.html', 'w').write('whole')\n"
# ranks that would run for ever; each tells its pid
RANKS = "open(f'rank{os.environ[\"RANK\"]}.pid', 'w').write(str(os.getpid()))\n"
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
FOREVER = "time.sleep(60)\n"
WRITE_ADAPTER = f"""
sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "tests")!r}]
from pathlib import Path
from worker.conftest import adapter
if os.environ['RANK'] == '0':
    adapter(Path('adapter'))
"""


def test_a_job_runs_once_and_is_proved(lab: Lab) -> None:
    job = lab.job(
        "report",
        WRITE_REPORT + "print(json.dumps([os.getcwd(), sys.stdin.read(), os.getsid(0) == os.getpid()]))\n",
    )
    assert lab.work(job) == 0
    assert json.dumps([str(lab.run.path), "", True]) in lab.log("report")
    state = lab.state("report")
    assert state["state"] == "COMPLETED" and state["exit_code"] == 0 and state["reason"] is None
    assert state["nodes"] == ["node0"] and state["attempt"] == 1 and state["job_id"] == "local-1"
    assert isinstance(state["pid_start"], int) and state["finished"] >= state["started"]
    done = json.loads(lab.run.done("report").read_text())
    assert [(a["path"], a["bytes"]) for a in done["artifacts"]] == [("report.html", 5)]
    # once more: nothing is run
    lab.run.path.joinpath("report.py").write_text("raise SystemExit(9)")
    assert lab.work(job) == 0
    assert "complete already" in lab.log("report")
    # a tampered artifact is not accepted: the job runs again
    lab.run.report.write_text("whoke")
    assert lab.work(job) == 1
    assert lab.state("report")["exit_code"] == 9


def test_environment_and_tokens(lab: Lab) -> None:
    names = [
        "GIVEN",
        "GONE",
        "NODE_RANK",
        "NNODES",
        "NPROC_PER_NODE",
        "MASTER_ADDR",
        "PKUSLURM_ATTEMPT",
        "PKUSLURM_NODE_RANK",
    ]
    names += ["PET_SIGNALS_TO_HANDLE", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"]
    script = f"json.dump([sys.argv[1:], [os.environ.get(n) for n in {names}]], open('seen.json', 'w'))\n" + WRITE_REPORT
    job = lab.job(
        "report",
        script,
        env={"GIVEN": "北 大'\"", "TOKEN_OF_TEST": lab.token},
        unset=["GONE"],
        first_attempt=3,
    )
    value = json.loads(job.read_text())
    value["command"] += ["$NODE_RANK", "$MASTER_ADDR", "x$NODE_RANK", "$HOME", "我 '"]
    write_json(job, value)
    assert lab.work(job, GONE="1", WORLD_SIZE="8", TORCHELASTIC_RUN_ID="x", SLURM_RESTART_COUNT="2") == 0
    argv, environ = json.loads((lab.run.path / "seen.json").read_text())
    assert argv == ["0", "127.0.0.1", "x$NODE_RANK", "$HOME", "我 '"]
    assert environ == ["北 大'\"", None, "0", "1", "1", "127.0.0.1", "5", "0", "SIGQUIT", None, None]
    assert lab.state("report")["attempt"] == 5


@pytest.mark.parametrize(
    ("script", "reason", "code"),
    [
        ("pass", "not complete: ", 1),
        ("sys.exit(7)", "report.py", 7),
        (
            "print('pkuslurm: infer.prompts 北.txt: not there', file=sys.stderr); sys.exit(2)",
            "infer.prompts 北.txt: not there",
            2,
        ),
        ("raise ValueError('no rows')", "ValueError: no rows", 1),
        (
            "print('last words'); sys.stdout.flush(); os.kill(os.getpid(), 11)",
            "the command on node0 was killed by signal 11 (SIGSEGV)",
            139,
        ),
        ("print('last words'); sys.exit(3)", "the command on node0 ended with exit code 3: last words", 3),
    ],
)
def test_failures_have_reasons(lab: Lab, script: str, reason: str, code: int) -> None:
    if "sys.exit(7)" in script:
        reason = "exit code 7"
    assert lab.work(lab.job("report", script)) == 1
    state = lab.state("report")
    assert (state["state"], state["exit_code"]) == ("FAILED", code)
    assert reason in state["reason"]
    assert not lab.run.done("report").exists()


def test_a_command_that_is_not_there(lab: Lab) -> None:
    assert lab.work(lab.job("report", "", command=["/nosuch/python 北"])) == 1
    assert lab.state("report")["reason"] == "cannot start '/nosuch/python 北': No such file or directory"


def test_false_success_of_a_trainer(lab: Lab) -> None:
    adapter(lab.run.adapter, cut=3)
    assert lab.work(lab.job("train", "")) == 1
    assert "truncated" in lab.state("train")["reason"]


def test_a_stopped_trainer_is_not_complete(lab: Lab) -> None:
    lab.run.stop("train").parent.mkdir()
    lab.run.stop("train").touch()
    script = (
        "assert not os.path.exists('state/train.stop')\n"
        "os.makedirs('adapter/checkpoint-16'); open('state/train.stop', 'w')\nsys.exit(int(sys.argv[1]))\n"
    )
    for code in ("75", "1", "0"):
        job = lab.job("train", script.replace("os.makedirs('", "os.makedirs(exist_ok=True, name='"))
        value = json.loads(job.read_text())
        write_json(job, {**value, "command": [*value["command"], code]})
        assert lab.work(job) == 1
        state = lab.state("train")
        assert (state["state"], state["exit_code"]) == ("FAILED", 75), code
        assert state["reason"].startswith("stopped at step 16")


def test_a_missing_or_changed_parent_skips(lab: Lab) -> None:
    job = lab.job("merge", "open('ran', 'w')", parents=["report"])
    assert lab.work(job) == 1
    state = lab.state("merge")
    assert (state["state"], state["exit_code"]) == ("SKIPPED", None)
    assert state["reason"] == "report did not complete: no marker done/report.json"
    lab.run.report.write_text("whole")
    marker.write(lab.run, lab.run.run_id, "report", 1, "local-1", [lab.run.report])
    lab.run.report.write_text("whoke")
    assert lab.work(job) == 1
    assert lab.state("merge")["state"] == "SKIPPED"
    assert not (lab.run.path / "ran").exists()
    lab.run.report.write_text("whole")
    assert lab.work(job) == 1
    assert lab.state("merge")["state"] == "FAILED"
    assert (lab.run.path / "ran").exists()


def test_a_double_forked_grandchild_is_ended(lab: Lab) -> None:
    script = (
        "if os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n"
        "  signal.signal(signal.SIGTERM, signal.SIG_IGN)\n  open('orphan.pid', 'w').write(str(os.getpid()))\n"
        "  time.sleep(60)\n os._exit(0)\n"
        "while not os.path.exists('orphan.pid'): time.sleep(0.02)\n"
    )
    job = lab.job("report", script + WRITE_REPORT)
    assert lab.work(job) == 0
    assert lab.pid_of("orphan.pid") > 0
    assert lab.left() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_cancel_leaves_nothing(lab: Lab, number: signal.Signals, code: int) -> None:
    script = RANKS + (STUBBORN if number == signal.SIGTERM else "") + FOREVER
    worker = lab.start(lab.job("train", script, ranks=True, nproc_per_node=2))
    lab.pid_of("rank0.pid")
    lab.pid_of("rank1.pid")
    for ignored in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        worker.send_signal(ignored)
    time.sleep(0.3)
    assert worker.poll() is None
    began = time.monotonic()
    worker.send_signal(number)
    assert worker.wait(timeout=10) == code
    assert time.monotonic() - began < 6
    state = lab.state("train")
    assert (state["state"], state["exit_code"]) == ("CANCELLED", code)
    assert lab.left() == []


def test_children_ignore_the_early_warning(lab: Lab) -> None:
    script = "for s in (signal.SIGUSR1, signal.SIGUSR2): assert signal.getsignal(s) == signal.SIG_IGN\n"
    assert lab.work(lab.job("report", script + WRITE_REPORT)) == 0


def test_two_nodes_complete_together(lab: Lab) -> None:
    job = lab.job("train", "time.sleep(0.5)\n" + WRITE_ADAPTER, ranks=True, nodes=2)
    first, second = lab.start(job, 0), lab.start(job, 1)
    assert (first.wait(20), second.wait(20)) == (0, 0), lab.log("train") + lab.log("train", 1)
    assert lab.state("train")["nodes"] == ["node0", "node1"]
    assert lab.state("train", 1)["state"] == "COMPLETED"
    assert marker.doubt(lab.run, lab.run.run_id, "train") is None


REAPED_TOO_SOON = """
import os, subprocess, sys, time
sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
rank = subprocess.Popen(sleeper, env={**os.environ, "LOCAL_RANK": "1", "RANK": "1"})
time.sleep(1.5)
print("failed (exitcode: -9) local_rank: 0 (pid: 7) of binary: python", flush=True)
rank.terminate()
time.sleep(0.8)
rank.wait()
sys.exit(1)
"""


def test_a_killed_rank_that_torchrun_reaped_before_we_saw_it(lab: Lab) -> None:
    """Only the rank that was ended because of it has been seen: torchrun's own line names the first."""
    assert lab.work(lab.job("train", REAPED_TOO_SOON, nproc_per_node=2)) == 1
    state = lab.state("train")
    assert (state["state"], state["exit_code"]) == ("FAILED", 137) and "rank 0" in state["reason"], state


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_killed_rank_ends_both_nodes(lab: Lab, stubborn: bool) -> None:
    job = lab.job("train", RANKS + STUBBORN * stubborn + FOREVER, ranks=True, nodes=2, nproc_per_node=2)
    workers = [lab.start(job, 0), lab.start(job, 1)]
    pids = [lab.pid_of(f"rank{rank}.pid") for rank in range(4)]
    time.sleep(0.5)
    began = time.monotonic()
    os.kill(pids[3], signal.SIGKILL)
    assert [worker.wait(timeout=10) for worker in workers] == [1, 1]
    took = time.monotonic() - began
    assert took < 8
    for rank in (0, 1):
        state = lab.state("train", rank)
        assert (state["state"], state["exit_code"]) == ("FAILED", 137)
        assert state["reason"] == "rank 3 on node1 was killed by signal 9 (SIGKILL)"
    assert lab.left() == []


def test_the_cause_is_blamed_not_the_peer_that_spoke_first(lab: Lab) -> None:
    script = (
        "failures = 'state/failures'; os.makedirs(failures, exist_ok=True); rank = int(os.environ['RANK'])\n"
        "time.sleep(1 + rank * 0.4)\n"
        "kind, words = [('RuntimeError', 'Connection closed by peer'), ('ValueError', 'bad rows')][rank]\n"
        "value = {'rank': rank, 'time': time.time(), 'type': kind, 'message': words, 'log': ''}\n"
        "json.dump(value, open(f'{failures}/train-1-{rank}.json', 'w')); sys.exit(1)\n"
    )
    job = lab.job("train", script, ranks=True, nodes=2)
    workers = [lab.start(job, 0), lab.start(job, 1)]
    assert [worker.wait(timeout=10) for worker in workers] == [1, 1]
    assert {lab.state("train", rank)["reason"] for rank in (0, 1)} == {"rank 1: ValueError: bad rows"}


def test_a_refusal_under_torchrun(lab: Lab) -> None:
    script = "print('pkuslurm: train.lr x: no number', file=sys.stderr, flush=True); sys.exit(2)"
    assert lab.work(lab.job("train", script, ranks=True)) == 1
    assert (lab.state("train")["reason"], lab.state("train")["exit_code"]) == ("train.lr x: no number", 2)


def test_a_killed_worker_ends_the_other_node(lab: Lab) -> None:
    job = lab.job("train", RANKS + FOREVER, ranks=True, nodes=2)
    first = lab.start(job, 0, SLURMD_NODENAME="same")
    second = lab.start(job, 1, SLURMD_NODENAME="same")
    lab.pid_of("rank0.pid")
    lab.pid_of("rank1.pid")
    second.kill()
    second.wait()
    assert first.wait(timeout=10) == 1
    assert "node 1 on same: its worker" in lab.state("train")["reason"]
    # a killed worker's ranks belong to nobody, and still they end
    lab.until(lambda: not lab.left())


def test_a_cancelled_node_cancels_the_other(lab: Lab) -> None:
    job = lab.job("train", RANKS + FOREVER, ranks=True, nodes=2)
    first, second = lab.start(job, 0), lab.start(job, 1)
    lab.pid_of("rank0.pid")
    lab.pid_of("rank1.pid")
    second.terminate()
    assert (first.wait(10), second.wait(10)) == (143, 143)
    assert {lab.state("train", rank)["state"] for rank in (0, 1)} == {"CANCELLED"}
    assert lab.left() == []


def test_leftovers_of_an_earlier_start_do_not_count(lab: Lab) -> None:
    write_json(
        lab.run.failures / "train-1-0.json",
        {"rank": 0, "time": 1.0, "type": "signal", "message": "", "code": -9},
    )
    for rank in (0, 1):
        old = {
            "state": "FAILED",
            "attempt": 1,
            "job_id": "local-1",
            "finished": "2020-01-01T00:00:00+08:00",
            "reason": "old",
        }
        write_json(lab.run.state("train", rank), old)
    job = lab.job("train", "time.sleep(0.5)\n" + WRITE_ADAPTER, ranks=True, nodes=2)
    first = lab.start(job, 0)
    time.sleep(0.5)
    second = lab.start(job, 1)
    assert (first.wait(20), second.wait(20)) == (0, 0), lab.log("train")


def test_the_same_job_is_not_worked_on_twice(lab: Lab) -> None:
    job = lab.job("train", RANKS + FOREVER, ranks=True)
    first = lab.start(job)
    lab.pid_of("rank0.pid")
    assert lab.work(job) == 1
    assert f"by process {first.pid}" in lab.log("train")
    assert lab.state("train")["state"] == "RUNNING"
    first.terminate()
    assert first.wait(10) == 143


def test_torn_state_and_job_files(lab: Lab) -> None:
    job = lab.job("report", WRITE_REPORT)
    lab.run.state("report").parent.mkdir(exist_ok=True)
    lab.run.state("report").write_text('{"state": "RUN')
    assert lab.work(job) == 0
    job.write_text(job.read_text()[:-9])
    assert lab.work(job) == 1
    assert "no whole JSON object" in lab.log("report")


def test_a_misfit_is_the_jobs_failure(lab: Lab) -> None:
    assert lab.work(lab.job("train", "", nodes=2), MASTER_PORT="none") == 1
    assert lab.state("train")["reason"].startswith("MASTER_PORT=none")


def test_an_unwritable_state_directory_is_one_line(lab: Lab) -> None:
    job = lab.job("report", WRITE_REPORT)
    (lab.run.path / "state").write_text("a file in its place")
    assert lab.work(job) == 1
    lines = lab.log("report").strip().split("\n")
    assert len(lines) == 1 and "/state" in lines[0], lines
    assert not lab.run.report.exists()


def test_an_unwritable_marker_is_a_failure(lab: Lab) -> None:
    job = lab.job("report", WRITE_REPORT)
    (lab.run.path / "done").write_text("a file in its place")
    assert lab.work(job) == 1
    assert lab.state("report")["state"] == "FAILED"
    assert "done" in lab.state("report")["reason"]


def test_two_nodes_under_slurm(lab: Lab) -> None:
    job = lab.job("train", "time.sleep(0.3)\n" + WRITE_ADAPTER, ranks=True, nodes=2)
    slurm = {
        "NODE_RANK": "",
        "MASTER_PORT": "",
        "SLURM_STEP_NODELIST": "node[0-1]",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "77",
        "PKUSLURM_JOB_ID": "",
        "SLURM_RESTART_COUNT": "1",
    }
    workers = [lab.start(job, rank, SLURM_PROCID=str(rank), **slurm) for rank in (0, 1)]
    assert [worker.wait(20) for worker in workers] == [0, 0]
    state = lab.state("train")
    assert (state["job_id"], state["attempt"], state["nodes"]) == ("77", 2, ["node0", "node1"])
    assert "master node0:10077" in (lab.run.logs / "train-_0.log").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_strangers_run_is_refused(lab: Lab) -> None:
    job = lab.job("report", WRITE_REPORT)
    lab.run.logs.mkdir()
    os.chown(lab.run.path, 12345, -1)
    assert lab.work(job) == 1
    assert "belongs to user 12345" in lab.log("report")
    assert not lab.run.report.exists() and not Path(lab.run.path / "state").exists()
