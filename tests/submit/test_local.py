"""The local executor on stand-in jobs: order, failure, cancellation, and nothing left running."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import status
from pkuslurm.rundir import RunDir, read_json, write_json
from pkuslurm.submit import local, owner
from pkuslurm.submit.attempt_numbers import renumbering
from pkuslurm.worker import processes
from tests import conftest
from tests.conftest import REPO, environment
from tests.conftest import run as command

OK = 'import os; open(os.environ[\'ANSWERS\'], \'w\').write(\'{"prompt": "a", "tuned": "b"}\\n\')'
SLEEP = "import subprocess, time; subprocess.Popen(['setsid', 'sleep', '977.25']); time.sleep(977.25)"
DRIVER = """
import sys
from pathlib import Path
from pkuslurm.rundir import RunDir
from pkuslurm.submit.local import run_jobs

class Silent:
    def started(self, kind): print("started", kind, flush=True)
    def tick(self, kind): pass
    def ended(self, kind, state, reason): print("ended", kind, state, flush=True)

sys.exit(run_jobs(RunDir(Path(sys.argv[1])), sys.argv[2:], Silent()))
"""


def make_run(path: Path, **scripts: str) -> RunDir:
    """A run whose jobs are infer-like: complete when their answers are there. Kinds in the order given, a chain."""
    run = RunDir(path / "20260101-000000-x-0000")
    jobs = {}
    before: list[str] = []
    for kind, script in scripts.items():
        answers = run.answers if kind == "infer" else run.path / f"{kind}.jsonl"
        expect = {"infer": {"file": str(answers), "lines": 1}, "report": {"file": str(answers)}}[kind]
        job = {
            "schema_version": 1,
            "run_id": run.run_id,
            "kind": kind,
            "key": f"{run.run_id}-{kind}",
            "run_dir": str(run.path),
            "parents": before,
            "nodes": 1,
            "nproc_per_node": 1,
            "first_attempt": 1,
            "command": [sys.executable, "-c", script],
            "env": {"ANSWERS": str(answers), "PKUSLURM_TEST": str(run.path)},
            "unset": [],
            "payload": {"prompts": [{"prompt": "a"}]},
            "expect": expect,
        }
        write_json(run.job(kind), job)
        jobs[kind] = {"job_id": None, "key": job["key"], "first_attempt": 1, "parents": before, "num_nodes": 1}
        before = [kind]
    for folder in ("logs", "state", "done", "results"):
        (run.path / folder).mkdir(mode=0o700, exist_ok=True)
    write_json(
        run.run_json, {"schema_version": 1, "run_id": run.run_id, "executor": "local", "jobs": jobs, "launcher": None}
    )
    return run


def drive(run: RunDir, *kinds: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(run.path), *kinds],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def left_running(run: RunDir) -> list[str]:
    return conftest.left_running(f"PKUSLURM_TEST={run.path}")


def states(run: RunDir, *kinds: str) -> list[str]:
    return [(read_json(run.state(kind)) or {}).get("state", "?") for kind in kinds]


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=40)
    return process.returncode, out + err


def test_jobs_run_in_order_and_leave_markers(weird: Path) -> None:
    run = make_run(weird, infer=OK, report=OK)
    assert end(drive(run, "infer", "report"))[0] == 0
    assert states(run, "infer", "report") == ["COMPLETED", "COMPLETED"]
    assert run.done("infer").exists() and run.done("report").exists()
    assert (read_json(run.run_json) or {})["launcher"] is None
    assert run.log("infer", "local-1", 0).stat().st_mode & 0o077 == 0


def test_a_failed_job_skips_what_depends_on_it(weird: Path) -> None:
    run = make_run(weird, infer="raise SystemExit(3)", report=OK)
    code, text = end(drive(run, "infer", "report"))
    assert code == 1
    assert states(run, "infer", "report") == ["FAILED", "SKIPPED"]
    assert "ended report SKIPPED" in text
    assert "infer" in (read_json(run.state("report")) or {})["reason"]
    assert not run.done("report").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_cancels_and_leaves_nothing(weird: Path, number: signal.Signals) -> None:
    run = make_run(weird, infer=SLEEP, report=OK)
    process = drive(run, "infer", "report")
    until(lambda: any("sleep" in line for line in left_running(run)))
    process.send_signal(number)
    assert end(process)[0] == 130
    assert states(run, "infer", "report") == ["CANCELLED", "CANCELLED"]
    how = {signal.SIGINT: "by Ctrl-C", signal.SIGTERM: "by SIGTERM (`pkuslurm cancel`, or the system)"}[number]
    words = f"the run was cancelled {how} on {socket.gethostname()}"
    reasons = [(read_json(run.state(kind)) or {})["reason"] for kind in ("infer", "report")]
    assert reasons == [words, f"{words} before this job started"]
    assert left_running(run) == []


def test_what_waits_in_a_retry_is_not_what_it_was_before(weird: Path) -> None:
    run = make_run(weird, infer=SLEEP, report=OK)
    for last in (False, True):
        process = drive(run, "infer", "report")
        until(lambda: any("sleep" in line for line in left_running(run)))
        now = {job.kind: (job.state, job.attempt, job.reason) for job in status.read(run.path).jobs}
        process.send_signal(signal.SIGINT)
        assert end(process)[0] == 130
        if not last:
            renumbering(run, ["infer", "report"])()
    assert now == {"infer": ("RUNNING", 2, None), "report": ("PENDING", 2, None)}


def test_a_closed_terminal_ends_nothing(weird: Path) -> None:
    run = make_run(weird, infer=f"import time; time.sleep(1.5); {OK}")
    process = drive(run, "infer")
    until(run.state("infer").exists)
    process.send_signal(signal.SIGHUP)
    assert end(process)[0] == 0
    assert states(run, "infer") == ["COMPLETED"]


def test_a_killed_worker_is_a_failure_and_leaves_nothing(weird: Path) -> None:
    run = make_run(weird, infer=SLEEP, report=OK)
    process = drive(run, "infer", "report")
    until(lambda: any("sleep" in line for line in left_running(run)))
    os.kill((read_json(run.state("infer")) or {})["pid"], signal.SIGKILL)
    assert end(process)[0] == 1
    assert states(run, "infer", "report") == ["FAILED", "SKIPPED"]
    assert left_running(run) == []


def test_a_killed_launcher_takes_its_jobs_along(weird: Path) -> None:
    run = make_run(weird, infer=SLEEP, report=OK)
    process = drive(run, "infer", "report")
    until(lambda: any("sleep" in line for line in left_running(run)))
    process.kill()
    process.communicate()
    until(lambda: left_running(run) == [])
    until(lambda: states(run, "infer") == ["CANCELLED"])


def test_cancel_from_another_shell(weird: Path) -> None:
    run = make_run(weird, infer=SLEEP, report=OK)
    process = drive(run, "infer", "report")
    until(lambda: any("sleep" in line for line in left_running(run)))
    assert owner.cancel(run) is True
    assert end(process)[0] == 130
    assert states(run, "infer", "report") == ["CANCELLED", "CANCELLED"]
    assert owner.cancel(run) is False


def test_a_sites_lines_run_before_the_job_and_end_it_in_words(weird: Path) -> None:
    needs = f"import os; assert os.environ['MODULE'] == 'it\\'s loaded'; {OK}"
    run = make_run(weird, infer=needs, report=OK)
    lines = {"infer": ["# nothing", 'export MODULE="it\'s loaded"'], "report": ["module load 'no such'; false"]}
    for kind, setup in lines.items():
        write_json(run.job(kind), (read_json(run.job(kind)) or {}) | {"setup": setup})
    assert end(drive(run, "infer", "report"))[0] == 1
    assert states(run, "infer", "report") == ["COMPLETED", "FAILED"]
    log = run.log("report", "local-1", 0).read_text(encoding="utf-8")
    assert "pkuslurm: cluster.setup failed: module load 'no such'; false" in log


def test_a_failed_second_try_takes_nothing_away(weird: Path) -> None:
    run = make_run(weird, infer=OK)
    assert end(drive(run, "infer"))[0] == 0
    before = {path: path.read_bytes() for path in (run.done("infer"), run.state("infer"), run.run_json)}
    job = read_json(run.job("infer")) or {}
    write_json(run.job("infer"), job | {"command": [sys.executable, "-c", "raise SystemExit(3)"]})
    ended = command(["infer", str(run.path), "--force"], weird, environment(weird), module="pkuslurm")
    assert ended.code == 1 and "the earlier infer stays as it was" in ended.err, ended
    assert {path: path.read_bytes() for path in before} == before
    status = json.loads(command(["status", str(run.path), "--json"], weird, environment(weird), module="pkuslurm").out)
    assert status["state"] == "COMPLETED"


def test_another_users_run_is_not_signalled(weird: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(weird, infer=OK)
    victim = subprocess.Popen(["sleep", "60"])
    document = read_json(run.run_json) or {}
    seen = processes.look(victim.pid)
    assert seen is not None
    host = socket.gethostname()
    write_json(run.run_json, document | {"launcher": {"host": host, "pid": victim.pid, "pid_start": seen.start}})
    monkeypatch.setattr(os, "getuid", lambda: run.path.stat().st_uid + 1)
    with pytest.raises(PkuslurmError, match="belongs to another user"):
        owner.cancel(run)
    assert victim.poll() is None
    victim.kill()
    victim.wait()


def test_one_run_is_run_by_one(weird: Path) -> None:
    run = make_run(weird, infer=SLEEP)
    process = drive(run, "infer")
    until(run.state("infer").exists)
    code, text = end(drive(run, "infer"))
    assert code != 0 and "still running" in text
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 130


def test_a_reused_pid_is_not_signalled(weird: Path) -> None:
    run = make_run(weird, infer=OK)
    document = json.loads(run.run_json.read_text(encoding="utf-8"))
    document["launcher"] = {"host": socket.gethostname(), "pid": os.getpid(), "pid_start": 1}
    write_json(run.run_json, document)
    assert owner.cancel(run) is False


def test_a_damaged_run_is_refused_in_words(weird: Path) -> None:
    run = make_run(weird, infer=OK)
    run.run_json.write_text('{"schema_version"', encoding="utf-8")

    class Nobody:
        def started(self, kind: str) -> None: ...
        def tick(self, kind: str) -> None: ...
        def ended(self, kind: str, state: str, reason: str | None) -> None: ...

    with pytest.raises(PkuslurmError, match="cannot be read"):
        local.run_jobs(run, ["infer"], Nobody())


def elsewhere(run: RunDir, nonce: str) -> None:
    """run.json as a launcher on another machine writes it."""
    launcher = {"host": "elsewhere", "pid": 1, "pid_start": 1, "meeting": str(run.meeting), "nonce": nonce}
    write_json(run.run_json, (read_json(run.run_json) or {}) | {"launcher": launcher})


def test_who_was_quicker_while_the_dead_was_listened_to_keeps_the_run(
    weird: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(weird, infer=OK)
    elsewhere(run, "dead")

    def listen(file: Path, nonce: str, seconds: float) -> bool | None:
        if nonce == "dead":
            elsewhere(run, "quick")
            return None
        return True

    monkeypatch.setattr(owner.beats, "alive", listen)
    with pytest.raises(PkuslurmError, match="at work on elsewhere"):
        owner.take(run, {})
    assert (read_json(run.run_json) or {})["launcher"]["nonce"] == "quick"


def test_a_launcher_that_was_taken_for_dead_stops_and_leaves_the_run_to_the_next(weird: Path) -> None:
    run = make_run(weird, infer=SLEEP)
    write_json(run.run_json, (read_json(run.run_json) or {}) | {"executor": "meet"})
    process = drive(run, "infer")
    until(lambda: any("sleep" in line for line in left_running(run)))
    elsewhere(run, "next")
    code, text = end(process)
    assert code != 0 and "another command on elsewhere took this launcher for dead" in text
    assert left_running(run) == []
    assert (read_json(run.run_json) or {})["launcher"]["nonce"] == "next"


def test_a_wish_to_cancel_that_cannot_be_written_is_told(weird: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(weird, infer=OK)
    elsewhere(run, "x")
    run.meeting.parent.rmdir()
    monkeypatch.setattr(owner.beats, "alive", lambda *_: True)
    with pytest.raises(PkuslurmError, match="No such file or directory"):
        owner.cancel(run)
