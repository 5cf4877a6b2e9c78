"""The local executor of sweeps on stand-in jobs: order, failures, cancellation; nothing left running or done twice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import RunDir, read_json, write_json
from pkuslurm.submit import local_sweep, owner
from pkuslurm.submit.sweep_lines import Lines, Work
from pkuslurm.submit.terminal import PLAIN_SECONDS
from pkuslurm.sweepdir import SweepDir
from pkuslurm.worker import marker
from tests import conftest
from tests.conftest import REPO
from tests.submit.test_local import until

DRIVER = """
import sys
from pathlib import Path
from pkuslurm.guard import guarded
from pkuslurm.submit.local_sweep import run_sweep
from pkuslurm.sweepdir import SweepDir

def say(text):
    print(text, flush=True)

points = [int(word) for word in sys.argv[3:]]
sys.exit(guarded(lambda: run_sweep(SweepDir(Path(sys.argv[1])), int(sys.argv[2]), points, say)))
"""
# What a job does is written in ACTS, by the point's number and the job's kind: once started it leaves a line in TRACE.
JOB = """
import json, os, struct, subprocess, sys, time
from pathlib import Path

name, sweep, run = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
act = json.loads((sweep / "acts.json").read_text()).get(f"{run.name} {name}", "ok")
with open(sweep / "trace", "a") as trace:
    trace.write(f"{run.name} {name}\\n")
if act == "fail":
    raise SystemExit(3)
if act == "hang":
    subprocess.Popen(["setsid", "sleep", "977.25"])
    time.sleep(977.25)
if act == "meet":  # with another point
    (run / "here").touch()
    deadline = time.monotonic() + 15
    while len(list(sweep.glob("*/here"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
if name == "prepare":
    (run / "data").mkdir()
    (run / "data" / "part.arrow").write_text("x")
    (run / "data" / "state.json").write_text("{}")
    (run / "data" / "dataset_info.json").write_text("{}")
elif name == "train":
    (run / "adapter").mkdir(exist_ok=True)
    (run / "adapter" / "trainer_state.json").write_text('{"global_step": 2, "max_steps": 2}')
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "adapter" / "trainer_log.jsonl").write_text('{"current_steps": 2, "total_steps": 2, "loss": 1.25}\\n')
    header = b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}'
    (run / "adapter" / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
else:
    (run / "answers.jsonl").write_text(json.dumps({"prompt": "a", "passed": act != "unmet"}) + "\\n")
"""
EXPECT = {"prepare": ("dir", "data"), "train": ("dir", "adapter"), "infer": ("file", "answers.jsonl")}


def job_file(sweep: SweepDir, folder: str, run_id: str, kind: str, parents: list[str]) -> dict[str, Any]:
    run_dir = f"{sweep.path}/{folder}"
    what, name = EXPECT[kind]
    return {
        "schema_version": 1,
        "run_id": run_id,
        "kind": kind,
        "key": f"{run_id}-{kind}",
        "run_dir": run_dir,
        "parents": parents,
        "nodes": 1,
        "nproc_per_node": 1,
        "first_attempt": 1,
        "command": [sys.executable, str(sweep.path / "job.py"), kind, str(sweep.path), run_dir],
        "env": {"PKUSLURM_TEST": str(sweep.path)},
        "unset": [],
        "payload": {},
        "expect": {what: f"{run_dir}/{name}", "lines": 1},
    }


def described(run: RunDir, chain: dict[str, list[str]], **more: Any) -> dict[str, Any]:
    jobs = {
        kind: {"job_id": None, "key": kind, "first_attempt": 1, "parents": parents, "num_nodes": 1}
        for kind, parents in chain.items()
    }
    head = {"schema_version": 1, "run_id": run.run_id, "executor": "local", "launcher": None, "pipeline": list(chain)}
    return head | {"jobs": jobs} | more


def make_sweep(folder: Path, points: int, *kinds: str, shares: int = 1, prepared: bool = True, **acts: str) -> SweepDir:
    """``acts``: what jobs do other than well, as ``infer_2="fail"``; of what points share, ``prepare_0``."""
    sweep = SweepDir(folder / "20260101-000000-sweep-0000")
    chain: dict[str, list[str]] = {"prepare": []}
    for kind in kinds or ("infer",):
        chain[kind] = [list(chain)[-1]]
    for number in range(shares):
        share = sweep.shared(number)
        write_json(share.job("prepare"), job_file(sweep, f"shared/{number}", share.run_id, "prepare", []))
        write_json(share.run_json, described(share, {"prepare": []}))
        (share.path / "logs").mkdir()
        if prepared:
            (share.path / "data").mkdir()
            (share.path / "data" / "part.arrow").write_text("x", encoding="utf-8")
            marker.write(share, share.run_id, "prepare", 1, "local-1", [share.path / "data" / "part.arrow"])
    own = {kind: parents for kind, parents in chain.items() if kind != "prepare"}
    texts = {
        f"jobs/{kind}.json": json.dumps(job_file(sweep, "@POINT@", f"{sweep.sweep_id}/@POINT@", kind, parents))
        for kind, parents in own.items()
    }
    write_json(sweep.texts(0), texts)
    entries = []
    for number in range(points):
        run = sweep.point(number)
        write_json(run.run_json, described(run, chain, texts={"family": 0, "changes": {}}))
        (run.path / "shared").symlink_to(f"../shared/{number % shares}")
        entries.append({"n": number, "label": f"lr=1e-{number}", "shared": number % shares, "family": 0})
    (sweep.path / "job.py").write_text(JOB, encoding="utf-8")
    set_acts(sweep, **acts)
    write_json(
        sweep.sweep_json,
        {"schema_version": 1, "sweep_id": sweep.sweep_id, "launcher": None, "cancelled": None, "points": entries},
    )
    return sweep


def set_acts(sweep: SweepDir, **acts: str) -> None:
    write_json(sweep.path / "acts.json", {" ".join(reversed(name.split("_"))): act for name, act in acts.items()})


def drive(sweep: SweepDir, *points: int, at_once: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(sweep.path), str(at_once), *map(str, points)],
        env=os.environ | {"PYTHONPATH": str(REPO), "PKUSLURM_TEST": str(sweep.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    text, _ = process.communicate(timeout=40)
    return process.returncode, text


def left_running(sweep: SweepDir) -> list[str]:
    return conftest.left_running(f"PKUSLURM_TEST={sweep.path}")


def trace(sweep: SweepDir) -> list[str]:
    file = sweep.path / "trace"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def state(run: RunDir, kind: str = "infer") -> tuple[str, str]:
    found = read_json(run.state(kind)) or {}
    return found.get("state", "?"), found.get("reason") or ""


def sweep_json(sweep: SweepDir) -> dict[str, Any]:
    return read_json(sweep.sweep_json) or {}


def test_all_complete_in_their_order(weird: Path) -> None:
    sweep = make_sweep(weird, 3, "train", prepared=False)
    code, text = end(drive(sweep, 0, 2))
    assert code == 0, text
    assert trace(sweep) == ["0 prepare", "0 train", "2 train"]
    told = [line for line in text.splitlines() if not line.startswith(" ")]  # a slow machine tells what runs, too
    assert len(told) == 3 and told[0].startswith("[shared] prepare  COMPLETED in "), text
    assert told[1].startswith("[1/2] lr=1e-0  COMPLETED in ") and told[1].endswith("; loss 1.2500"), text
    assert told[2].startswith("[2/2] lr=1e-2  COMPLETED in ")
    assert sweep_json(sweep)["launcher"] is None and sweep_json(sweep)["cancelled"] is None
    assert sorted(path.name for path in sweep.point(1).path.iterdir()) == ["run.json", "shared"]
    assert left_running(sweep) == []


def test_a_failed_point_costs_no_other_and_is_done_again_alone(weird: Path) -> None:
    sweep = make_sweep(weird, 2, "train", "infer", train_0="fail", infer_1="unmet")
    code, text = end(drive(sweep, 0, 1, at_once=2))
    assert code == 1
    assert state(sweep.point(0), "train")[0] == "FAILED" and state(sweep.point(0))[0] == "SKIPPED"
    assert state(sweep.point(1))[0] == "COMPLETED"
    assert "lr=1e-0  FAILED train: " in text and "loss 1.2500; passed NO\n" in text
    set_acts(sweep, infer_0="fail")
    begun = len(trace(sweep))
    code, text = end(drive(sweep, 1, 0))
    assert code == 1 and trace(sweep)[begun:] == ["0 train", "0 infer"]
    assert "[1/2] complete already\n[2/2] lr=1e-0  FAILED infer: " in text
    set_acts(sweep)
    assert end(drive(sweep, 0))[0] == 0
    assert trace(sweep)[begun + 2 :] == ["0 infer"]
    assert (read_json(sweep.point(0).state("infer")) or {})["attempt"] == 3


def test_a_failed_share_costs_its_own_points_only(weird: Path) -> None:
    sweep = make_sweep(weird, 3, shares=2, prepared=False, prepare_0="fail")
    code, text = end(drive(sweep, 0, 1, 2))
    assert code == 1
    assert trace(sweep) == ["0 prepare", "1 prepare", "1 infer"]
    assert "[shared] prepare 0  FAILED: " in text
    assert "[1/3] lr=1e-0  SKIPPED: prepare did not complete: " in text
    assert state(sweep.point(0))[0] == state(sweep.point(2))[0] == "SKIPPED"
    set_acts(sweep)
    assert end(drive(sweep, 0, 1, 2))[0] == 0
    assert trace(sweep)[3:] == ["0 prepare", "0 infer", "2 infer"]


def test_two_at_once_overlap(weird: Path) -> None:
    sweep = make_sweep(weird, 2, infer_0="meet", infer_1="meet")
    assert end(drive(sweep, 0, 1, at_once=2))[0] == 0


def test_ctrl_c_leaves_the_finished_finished_and_it_goes_on(weird: Path) -> None:
    sweep = make_sweep(weird, 3, infer_1="hang")
    process = drive(sweep, 0, 1, 2)
    until(lambda: any("sleep" in line for line in left_running(sweep)))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    code, text = end(process)
    assert code == 130 and left_running(sweep) == []
    how = f"the run was cancelled by Ctrl-C on {socket.gethostname()}"
    assert f"[2/3] lr=1e-1  CANCELLED infer: {how}\ncancelled; 1 of 3 points are complete" in text
    assert [state(sweep.point(point))[0] for point in range(3)] == ["COMPLETED", "CANCELLED", "?"]
    assert sweep_json(sweep)["cancelled"] and sweep_json(sweep)["launcher"] is None
    set_acts(sweep)
    assert end(drive(sweep, 0, 1, 2))[0] == 0
    assert trace(sweep) == ["0 infer", "1 infer", "1 infer", "2 infer"]
    assert sweep_json(sweep)["cancelled"] is None


def test_a_killed_launcher_takes_all_along(weird: Path) -> None:
    sweep = make_sweep(weird, 2, infer_0="hang", infer_1="hang")
    process = drive(sweep, 0, 1, at_once=2)
    until(lambda: sum("sleep" in line for line in left_running(sweep)) == 2)
    process.kill()
    process.communicate()
    until(lambda: left_running(sweep) == [])
    assert state(sweep.point(0))[0] == state(sweep.point(1))[0] == "CANCELLED"
    assert local_sweep.cancel_sweep(sweep) is False
    set_acts(sweep)
    assert end(drive(sweep, 0))[0] == 0


def test_one_launcher_and_cancelling_from_another_shell(weird: Path) -> None:
    sweep = make_sweep(weird, 3, infer_0="hang", infer_2="hang")
    process = drive(sweep, 0, 1, 2)
    until(lambda: any("sleep" in line for line in left_running(sweep)))
    code, text = end(drive(sweep, 1))
    assert code == 2 and f"it is still running (pid {process.pid}); wait, or cancel it first" in text
    assert owner.cancel(sweep.point(0)) is True
    until(lambda: "2 infer" in trace(sweep))  # the sweep goes on
    assert local_sweep.cancel_sweep(sweep) is True
    assert end(process)[0] == 130
    assert [state(sweep.point(point))[0] for point in range(3)] == ["CANCELLED", "COMPLETED", "CANCELLED"]
    assert left_running(sweep) == []


def test_a_killed_child_is_a_failure_and_a_closed_terminal_nothing(weird: Path) -> None:
    sweep = make_sweep(weird, 2, infer_0="hang")
    process = drive(sweep, 0, 1)
    until(lambda: any("sleep" in line for line in left_running(sweep)))
    process.send_signal(signal.SIGHUP)
    os.kill((read_json(sweep.point(0).run_json) or {})["launcher"]["pid"], signal.SIGKILL)
    code, text = end(process)
    assert code == 1 and "[1/2] lr=1e-0  FAILED: its process ended with exit code -9" in text
    assert state(sweep.point(1))[0] == "COMPLETED" and left_running(sweep) == []


def test_a_point_that_cannot_be_unpacked_says_so(weird: Path) -> None:
    sweep = make_sweep(weird, 2, "train", "infer")
    value = read_json(sweep.point(0).run_json) or {}
    write_json(sweep.point(0).run_json, value | {"texts": {"family": 7, "changes": {}}})
    code, text = end(drive(sweep, 0, 1))
    assert code == 1 and "[1/2] lr=1e-0  FAILED train: " in text and "texts-7.json: it cannot be read" in text
    assert state(sweep.point(0))[0] == "SKIPPED" and state(sweep.point(1))[0] == "COMPLETED"


def test_damage_and_another_users_sweep_are_refused_in_words(weird: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = make_sweep(weird, 1)
    sweep.sweep_json.write_text('{"schema_version"', encoding="utf-8")
    with pytest.raises(PkuslurmError, match=r"sweep\.json: it cannot be read"):
        local_sweep.run_sweep(sweep, 1, [0], print)
    monkeypatch.setattr(os, "getuid", lambda: sweep.path.stat().st_uid + 1)
    with pytest.raises(PkuslurmError, match="belongs to another user"):
        local_sweep.run_sweep(sweep, 1, [0], print)
    with pytest.raises(PkuslurmError, match="belongs to another user"):
        local_sweep.cancel_sweep(sweep)


def test_what_runs_now_is_told_and_a_gone_terminal_silences(weird: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = make_sweep(weird, 2, "train", "infer")
    running = [(Work(f"lr=1e-{n}", sweep.point(n), ("train", "infer")), 0.0) for n in range(2)]
    write_json(sweep.point(0).progress("train"), {"step": 3, "total_steps": 9, "loss": 1.5, "eta_seconds": 2.0})
    clock = [PLAIN_SECONDS]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    told: list[str] = []
    lines = Lines(told.append)
    lines.tick(running)
    clock[0] = 2.5 * PLAIN_SECONDS
    lines.tick(running)
    lines.tick(running)
    assert told == ["      lr=1e-0: train step 3/9, loss 1.5000; lr=1e-1: train, 25 s"]

    def gone(text: str) -> None:
        raise BrokenPipeError

    lines.say = gone
    lines.line("a")
    lines.say = told.append
    lines.line("b")
    assert len(told) == 1


def test_the_lines_on_a_terminal(weird: Path) -> None:
    """The live line goes before a point's line is printed, and comes back."""
    import pty

    sweep = make_sweep(weird, 2, infer_0="meet", infer_1="meet")
    leader, follower = pty.openpty()
    script = DRIVER.replace("print(text, flush=True)", "print(text, file=sys.stderr, flush=True)")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(sweep.path), "1", "0", "1"],
        env=os.environ | {"PYTHONPATH": str(REPO), "PKUSLURM_TEST": str(sweep.path), "TERM": "xterm", "COLUMNS": "100"},
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    until((sweep.point(0).path / "here").exists)
    shown = b""
    while b"lr=1e-0: infer, " not in shown:
        shown += os.read(leader, 65536)
    (sweep.point(1).path / "here").touch()
    while b"[1/2] lr=1e-0  COMPLETED in " not in shown:
        shown += os.read(leader, 65536)
    os.close(leader)  # the terminal goes away
    assert process.wait(timeout=40) == 0
    assert state(sweep.point(1))[0] == "COMPLETED"
