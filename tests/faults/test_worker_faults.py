"""What befalls a worker and its files, without a cluster: torn and empty files, clocks, a port, a merge cut off."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pkuslurm import rundir
from pkuslurm.worker import marker, network
from pkuslurm.worker.head import head
from tests.conftest import REPO, environment
from tests.conftest import run as command
from tests.faults.recorder import Row
from tests.payload.small_models import ENTRY, make_flows, merge_job
from tests.payload.small_models import start as payload
from tests.read.fake_run import finished
from tests.verify import problems
from tests.worker.conftest import Lab, lab

__all__ = ["lab"]
# the clock of a Python, by as many seconds as $CLOCK holds (libfaketime breaks what Python asks of the monotonic one)
CLOCK = """\
import datetime, os, time
def off():
    return float(open(os.environ["CLOCK"]).read())
class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=off())
right = time.time
time.time = lambda: right() + off()
datetime.datetime = Shifted
"""
# writes the file again and again, each time whole, longer and shorter; what is printed is the last that was there whole
WRITER = f"""\
import sys
sys.path.insert(0, {str(REPO)!r})
from pathlib import Path
from pkuslurm.rundir import write_json
number = 0
while True:
    number += 1
    write_json(Path(sys.argv[1]), {{"number": number, "padding": "北" * (number * 7919 % 60000)}})
    print(number, flush=True)
"""


def cut(path: Path, size: int) -> None:
    os.truncate(path, max(0, path.stat().st_size + size if size < 0 else size))


ANSWERS = 'open(\'answers.jsonl\', \'w\').write(\'{"prompt": "a"}\\n{"prompt": "b"}\\n\')\n'


@pytest.mark.row(
    "30", "a marker that is empty, half, of zeros, or whose writer stands still", "no proof; the job is done again"
)
def test_a_marker_that_is_no_proof(lab: Lab, row: Row) -> None:
    job = lab.job("infer", ANSWERS + "open('count', 'a').write('x')\n")
    assert lab.work(job) == 0
    done = lab.run.done("infer")
    whole = done.read_bytes()
    rounds = 1
    for text in (b"", whole[: len(whole) // 2], b"\0" * len(whole), whole[:-7], b"{}", b"[]", b"null"):
        done.write_bytes(text)
        assert marker.doubt(lab.run, lab.run.run_id, "infer") is not None
        assert lab.work(job) == 0, lab.log("infer")
        rounds += 1
        assert marker.doubt(lab.run, lab.run.run_id, "infer") is None
    assert (lab.run.path / "count").read_text() == "x" * rounds
    done.unlink()
    paused = subprocess.Popen(
        [sys.executable, "-c", PAUSED, str(done)], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(REPO)}
    )
    assert paused.stdout is not None and paused.stdout.readline() == "written\n"
    assert not done.exists() and marker.doubt(lab.run, lab.run.run_id, "infer") is not None
    paused.kill()
    paused.communicate()
    assert lab.work(job) == 0 and problems(lab.run.path, ["infer"], content=False) == []
    row.final("FAILED or not yet; COMPLETED by the next try")
    row.counted(0, 0, "9 markers")


# stands still between its last byte and the rename
PAUSED = """\
import os, signal, sys
from pathlib import Path
from pkuslurm import rundir
os.fsync = lambda handle: (print("written", flush=True), signal.pause())
rundir.write_json(Path(sys.argv[1]), {"kind": "infer"})
"""


def _torn_at_random(path: Path, kills: int) -> None:
    seen = 0
    for _ in range(kills):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(random.random() * 0.05)
        writer.kill()
        said = writer.communicate()[0].split()
        value = rundir.read_json(path)
        assert value is not None and value["number"] >= int(said[-1] if said else 1), "the last whole one, or the next"
        seen += 1
    assert seen == kills


@pytest.mark.faults
@pytest.mark.row("34", "kill -9 while a file of ours is written, twenty times", "the old one or the new one, whole")
def test_a_writer_killed_at_any_moment(tmp_path: Path, row: Row) -> None:
    _torn_at_random(tmp_path / "run.json", 20)
    row.final("whole")
    row.counted(0, 0, "20 files")


@pytest.mark.row(
    "34", "the last 7 bytes are cut off each file of a run", "said, or done without; never a wrong state, no traceback"
)
def test_files_that_have_lost_their_end(tmp_path: Path, row: Row) -> None:
    """What ``status`` then says of it is true, or that it does not know."""
    fake = finished(tmp_path)
    env = environment(tmp_path)
    shown = command(["status", str(fake.path)], tmp_path, env, module="pkuslurm")
    assert shown.code == 0 and ": COMPLETED" in shown.out, shown.err
    names = [path for path in sorted(fake.path.rglob("*.json*")) if path.is_file()]
    assert len(names) >= 8
    markers = [rundir.read_json(path) or {} for path in (fake.path / "done").iterdir()]
    artifacts = {entry["path"] for found in markers for entry in found["artifacts"]}
    for path in names:
        whole = path.read_bytes()
        cut(path, -7)
        shown = command(["status", str(fake.path)], tmp_path, env, module="pkuslurm")
        assert shown.code in (0, 2) and "Traceback" not in shown.err, shown.err
        said = shown.out.partition("\n")[0]
        proof = str(path.relative_to(fake.path)) in artifacts or path.parent.name == "done" or path == fake.run_json
        assert (": COMPLETED" in said) == (not proof), (path, shown.out, shown.err)
        path.write_bytes(whole)
    row.final("UNKNOWN, FAILED or refused by name; COMPLETED where no proof was hurt")
    row.counted(0, 0, f"{len(names)} files")


RANKS = "rank = int(os.environ['RANK']); open(f'rank{rank}.pid', 'w').write(str(os.getpid()))\n"


def clock(lab: Lab, name: str, seconds: int) -> dict[str, str]:
    """The environment of a worker whose clock is wrong by what the file ``name`` says."""
    folder = lab.run.path.parent / "clocks"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(CLOCK, encoding="utf-8")
    (folder / name).write_text(str(seconds), encoding="utf-8")
    return {"PYTHONPATH": f"{folder}:{REPO}", "CLOCK": str(folder / name)}


@pytest.mark.row(
    "35",
    "the second node's clock is an hour behind, or ahead, and a rank dies",
    "all ends, that rank is named",
    within=60,
)
@pytest.mark.parametrize(
    ("hours", "dies"), [(-1, 3), *(pytest.param(*case, marks=pytest.mark.faults) for case in ((1, 3), (-1, 1), (1, 1)))]
)
def test_clocks_of_nodes_that_differ(lab: Lab, row: Row, hours: int, dies: int) -> None:
    job = lab.job("train", RANKS + "time.sleep(600)\n", ranks=True, nodes=2, nproc_per_node=2)
    workers = [lab.start(job, 0), lab.start(job, 1, **clock(lab, "1", hours * 3600))]
    pids = [lab.pid_of(f"rank{rank}.pid") for rank in range(4)]
    time.sleep(0.5)
    os.kill(pids[dies], signal.SIGKILL)
    row.happened()
    assert [worker.wait(timeout=60) for worker in workers] == [1, 1]
    row.told()
    assert lab.state("train")["reason"] == f"rank {dies} on node{dies // 2} was killed by signal 9 (SIGKILL)"
    row.final("FAILED")
    row.left(len(lab.left()), 0)


@pytest.mark.row(
    "35", "files of a run bear the times of other clocks (a day before, a day after)", "nothing is ordered by them"
)
def test_times_of_files_mean_nothing(lab: Lab, row: Row) -> None:
    parent = lab.job("infer", ANSWERS)
    assert lab.work(parent) == 0
    job = lab.job("report", "open('report.html', 'w').write('x')\n", parents=["infer"])
    for days in (-1, 1):
        now = time.time() + days * 86400
        for path in lab.run.path.rglob("*"):
            os.utime(path, (now, now))
        assert marker.doubt(lab.run, lab.run.run_id, "infer") is None
        lab.run.done("report").unlink(missing_ok=True)
        assert lab.work(job) == 0, lab.log("report")
    row.final("COMPLETED")


@pytest.mark.row(
    "36",
    "a node's clock is put back by an hour, or forward, in the middle",
    "a failure is seen all the same",
    within=30,
)
@pytest.mark.parametrize("hours", [-1, pytest.param(1, marks=pytest.mark.faults)])
def test_a_nodes_clock_jumps(lab: Lab, row: Row, hours: int) -> None:
    job = lab.job(
        "train", RANKS + "time.sleep(600)\n", ranks=True, nodes=2, nproc_per_node=2, resume={"hang_minutes": 0.5}
    )
    env = clock(lab, "both", 0)
    workers = [lab.start(job, rank, **env) for rank in (0, 1)]
    pids = [lab.pid_of(f"rank{rank}.pid") for rank in range(4)]
    Path(env["CLOCK"]).write_text(str(hours * 3600), encoding="utf-8")
    time.sleep(3)
    assert [worker.poll() for worker in workers] == [None, None], "no time has passed"
    os.kill(pids[1], signal.SIGKILL)
    row.happened()
    assert [worker.wait(timeout=30) for worker in workers] == [1, 1]
    row.told()
    assert lab.state("train")["reason"] == "rank 1 on node0 was killed by signal 9 (SIGKILL)"
    row.final("FAILED")
    row.left(len(lab.left()), 0)


@pytest.mark.row(
    "39", "MASTER_PORT of this job is taken on its head", "the next free one, below those of clients, told to all ranks"
)
def test_a_port_of_the_ranks_that_is_taken(row: Row) -> None:
    job = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "123456", "SLURMD_NODENAME": "here"}
    first = int(head(job).rpartition(":")[2])
    with socket.socket() as listener:
        listener.bind(("", first))
        listener.listen()
        second = int(head(job).rpartition(":")[2])
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    assert network.FIRST_PORT <= second < network.FIRST_PORT + network.PORTS <= low and second != first
    assert int(head(job | {"SLURM_RESTART_COUNT": "1"}).rpartition(":")[2]) != first, "another one after a requeue"
    row.final("met elsewhere")


@pytest.mark.real
@pytest.mark.faults
@pytest.mark.row(
    "44",
    "a real merge is killed at a random moment, twenty times",
    "no half model under merged/; the next one is whole",
)
def test_a_merge_killed_at_any_moment(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, row: Row) -> None:
    flow = make_flows(tmp_path_factory.mktemp("flows"))["llama"]
    whole = {path.name: path.read_bytes() for path in flow.merged.iterdir()}
    job = merge_job(tmp_path / "run", flow.base, flow.adapter)
    began = time.monotonic()
    assert payload(job).returncode == 0
    took = time.monotonic() - began
    merged, seen = tmp_path / "run" / "merged", {"before": 0, "after": 0}
    for number in range(20):
        if number % 2:  # half of them with an older model in its place
            subprocess.run(["rm", "-rf", str(merged)], check=True)
        old = merged.exists()
        file = tmp_path / "run" / "jobs" / "merge.json"
        process = subprocess.Popen(
            [sys.executable, str(ENTRY), "merge", str(file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        )
        time.sleep(random.uniform(0.2, 1) * took)
        process.send_signal(random.choice((signal.SIGTERM, signal.SIGKILL)))
        process.wait()
        there = {path.name: path.read_bytes() for path in merged.iterdir()} if merged.exists() else None
        assert there in (None, whole), "half a model under its final name"
        # between the two renames of a swap the old one lies beside it, whole
        asides = list(merged.parent.glob(".merged.old-*"))
        assert there == whole or not old or len(asides) == 1
        seen["after" if there == whole and not old else "before"] += 1
    assert payload(job).returncode == 0
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == whole
    assert sorted(path.name for path in merged.parent.iterdir()) == ["jobs", "merge.yaml", "merged", "results"]
    row.final(f"none or whole ({seen['after']} of 20 had ended)")
    row.counted(0, 0, "21 merges")


@pytest.mark.faults
@pytest.mark.row(
    "2",
    "a killed controller starts a job anew under the same number, while its first start runs on elsewhere",
    "the first finds out, and ends before the second one's first step",
    within=30,
)
def test_two_starts_of_one_attempt(lab: Lab, row: Row) -> None:
    script = (
        "here = os.environ['SLURMD_NODENAME']; open('steps', 'a').write(here + '\\n')\n"
        "time.sleep(600 if here == 'a' else 0)\n"
    )
    job = lab.job("infer", script + ANSWERS, resume={"max_attempts": 20})
    first = lab.start(job, SLURMD_NODENAME="a")
    lab.until((lab.run.path / "steps").exists)
    second = lab.start(job, SLURMD_NODENAME="b")
    row.happened()
    assert first.wait(timeout=20) == 0
    assert (lab.run.path / "steps").read_text() == "a\n", "the second one has waited for the first to end"
    row.told()
    assert second.wait(timeout=40) == 0
    assert (lab.run.path / "steps").read_text() == "a\nb\n"
    assert lab.state("infer")["host"] == "b" and lab.state("infer")["state"] == "COMPLETED"
    row.final("COMPLETED, by the second")
    row.left(len(lab.left()), 0)
