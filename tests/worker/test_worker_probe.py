"""What is looked at on each node before the launcher, with a torch of our own whose cards fail in their ways."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.paths import PAYLOAD
from pkuslurm.rundir import read_json
from pkuslurm.worker.versions import difference, line

from .conftest import REPOSITORY, Lab

PROBE = PAYLOAD.with_name("probe.py")
TORCH = """
import os, sys, time
open(os.environ.get("TORCH_WAS_IMPORTED", os.devnull), "w").close()
class ones:
    def __init__(self, number, device):
        todo = os.environ.get("CARD_" + device.partition(":")[2], "")
        if todo == "hang":
            while True: time.sleep(1)
        if todo == "deaf":
            import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)
        if todo == "raise":
            raise RuntimeError("SetDevice: error code is 507033\\n[ERROR] and 40 lines more")
        if todo == "die":
            sys.stderr.write("driver: no heartbeat\\n"); os.abort()
        self.total = 128 if todo != "wrong" else 127
    __add__ = lambda self, other: self
    sum = lambda self: self
    item = lambda self: self.total
class npu:
    def device_count():
        named = os.environ.get("ASCEND_RT_VISIBLE_DEVICES") or os.environ.get("CUDA_VISIBLE_DEVICES")
        return int(os.environ.get("COUNTED") or len(named.split(",")))
    synchronize = staticmethod(lambda number: None)
cuda = npu
"""
WRITE = f"""
sys.path[:0] = [{str(REPOSITORY)!r}]
from pathlib import Path
from tests.worker.conftest import adapter
if os.environ.get('RANK', '0') == '0':
    adapter(Path('adapter'))
print('RT=' + os.environ.get('ASCEND_RT_VISIBLE_DEVICES', 'unset'))
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Something like a site-packages folder, with our torch."""
    folder = tmp_path / "site 包"
    folder.mkdir()
    (folder / "torch.py").write_text(TORCH, encoding="utf-8")
    (folder / "torch_npu.py").touch()
    for name in ("torch-2.7.1", "torch_npu-2.7.1.post2", "LLaMAFactory-0.9.4", "transformers-4.57.1", "torchvision-1"):
        (folder / f"{name}.dist-info").mkdir()
    return folder


def fields(packages: Path, lab: Lab, **more: Any) -> dict[str, Any]:
    env = {"TOKEN_OF_TEST": lab.token, "PYTHONPATH": str(packages), "ASCEND_RT_VISIBLE_DEVICES": "4,6"}
    env |= {"DEVICE_PROBE_SECONDS": "2"}
    value = {"accelerator": "npu", "devices": 2, "env": env | more.pop("env", {})}
    return value | more


def probe(packages: Path, *words: str, **environ: str) -> list[dict[str, Any]]:
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(packages), **environ}
    done = subprocess.run([sys.executable, str(PROBE), *words], env=env, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return [json.loads(one.removeprefix("pkuslurm-probe ")) for one in done.stdout.splitlines()]


def test_versions_without_importing_anything(packages: Path, tmp_path: Path) -> None:
    (answer,) = probe(packages, "versions", TORCH_WAS_IMPORTED=str(tmp_path / "imported"))
    found = answer["versions"]
    assert found.pop("python").startswith("3.")
    assert found == {"llamafactory": "0.9.4", "torch": "2.7.1", "torch-npu": "2.7.1.post2", "transformers": "4.57.1"}
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        ("aarch64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.3.RC2\n", "8.3.RC2"),
        (
            "version.cfg",
            "# version: 1.0\nruntime_running_version=[7.8.0:8.0]\ntoolkit_running_version=[7.8:8.1]",
            "8.1",
        ),
        ("version.cfg", "runtime_running_version=[7.8.0.3.220:8.0.RC2]\n", "8.0.RC2"),
    ],
)
def test_the_version_of_cann(packages: Path, tmp_path: Path, file: str, text: str, version: str) -> None:
    path = tmp_path / "cann [1]" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (answer,) = probe(packages, "versions", ASCEND_TOOLKIT_HOME=str(tmp_path / "cann [1]"))
    assert answer["versions"]["CANN"] == version
    assert line(answer["versions"]).endswith(f"transformers 4.57.1, CANN {version}")


def test_each_device_is_tried(packages: Path) -> None:
    answers = probe(packages, "npu", ASCEND_RT_VISIBLE_DEVICES="4,6")
    assert [one for one in answers if "device" in one] == [{"device": 0}, {"device": 1}]
    assert answers[-1] == {"done": 2}
    assert (
        probe(packages, "cuda", CUDA_VISIBLE_DEVICES="0", CARD_0="wrong")[-1]["error"]
        == "RuntimeError: 64 × 2 gives 127"
    )


def test_versions_stand_in_the_log_and_the_state(lab: Lab, packages: Path) -> None:
    job = lab.job("train", WRITE, **fields(packages, lab))
    assert lab.work(job) == 0
    lines = [one for one in lab.log("train").splitlines() if one.startswith("pkuslurm worker: ")]
    assert lines[1] == "pkuslurm worker: devices: npu 4,6 (ASCEND_RT_VISIBLE_DEVICES=4,6)"
    assert lines[2].startswith("pkuslurm worker: versions: python 3.")
    assert lines[2].endswith("llamafactory 0.9.4, torch 2.7.1, torch-npu 2.7.1.post2, transformers 4.57.1")
    assert lab.state("train")["versions"]["torch"] == "2.7.1"


def test_a_python_that_tells_nothing_is_no_failure(lab: Lab, packages: Path) -> None:
    python = packages / "python"
    python.write_text(f'#!/bin/sh\ncase "$1" in */probe.py) exit 3;; esac\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    job = lab.job("train", WRITE)
    value = json.loads(job.read_text())
    job.write_text(json.dumps(value | {"command": [str(python), *value["command"][1:]]}))
    assert lab.work(job) == 0
    assert "versions" not in lab.state("train") and "does not tell" in lab.log("train")


CARDS = [
    ("hang", "node node0: npu device 6 hangs: a small sum takes more than 2 s; see npu-smi info there"),
    ("deaf", "node node0: npu device 6 hangs"),
    ("raise", "node node0: npu device 6 does not work: RuntimeError: SetDevice: error code is 507033; see npu-smi"),
    ("die", "node node0: npu device 6 does not work: the probe ended with -6: driver: no heartbeat; see npu-smi"),
    ("wrong", "node node0: npu device 6 does not work: RuntimeError: 64 × 2 gives 127; see npu-smi"),
]


@pytest.mark.parametrize(("todo", "reason"), CARDS)
def test_a_bad_card_is_named_and_its_node_remembered(lab: Lab, packages: Path, todo: str, reason: str) -> None:
    job = lab.job("train", "open('started', 'w')", **fields(packages, lab, env={"CARD_1": todo}))
    assert lab.work(job) == 1
    state = lab.state("train")
    assert state["state"] == "FAILED" and state["reason"].startswith(reason), state
    assert (read_json(lab.run.attempt("train")) or {})["bad_nodes"] == ["node0"]
    assert not (lab.run.path / "started").exists() and lab.left() == []


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_one_bad_card_ends_all_nodes(lab: Lab, packages: Path, bad: int) -> None:
    job = lab.job("train", "time.sleep(60)", ranks=True, nodes=3, nproc_per_node=2, **fields(packages, lab))
    workers = [lab.start(job, rank, **({"CARD_0": "hang"} if rank == bad else {})) for rank in range(3)]
    assert [worker.wait(timeout=40) for worker in workers] == [1, 1, 1]
    for rank in range(3):
        state = lab.state("train", rank)
        assert state["state"] == "FAILED" and f"node node{bad}: npu device 4 hangs" in state["reason"], (rank, state)
    assert (read_json(lab.run.attempt("train")) or {})["bad_nodes"] == [f"node{bad}"]
    assert lab.left() == []


def test_slurm_starts_it_again(lab: Lab, packages: Path) -> None:
    program = packages / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> "{packages}/asked"\n')
    program.chmod(0o755)
    more = {"resume": {"max_attempts": 3}, "env": {"CARD_0": "hang"}}
    job = lab.job("infer", "", **fields(packages, lab, **more))
    path = f"{packages}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node0", "PKUSLURM_JOB_ID": "77"}
    worker = lab.start(job, PATH=path, NODE_RANK="", **slurm)
    lab.until(lambda: (packages / "asked").exists(), 20)
    lab.until(lambda: lab.state("infer")["state"] == "REQUEUED")
    worker.send_signal(signal.SIGTERM)  # as Slurm does then
    assert worker.wait(timeout=20) == 75
    assert (packages / "asked").read_text() == "requeue 77\n"
    assert (read_json(lab.run.attempt("infer")) or {})["bad_nodes"] == ["node0"]


def test_what_no_other_node_would_cure_is_said(lab: Lab, packages: Path) -> None:
    job = lab.job("train", "", **fields(packages, lab, env={"COUNTED": "1"}))
    assert lab.work(job) == 1
    reason = lab.state("train")["reason"]
    assert reason.startswith("node node0: torch sees 1 npu device (ASCEND_RT_VISIBLE_DEVICES=4,6), and 2 are wanted; ")
    (packages / "torch_npu.py").write_text("raise ImportError('libascend_hal.so: cannot open shared object file')")
    assert lab.work(lab.job("train", "", **fields(packages, lab))) == 1
    reason = lab.state("train")["reason"]
    assert "cannot use npu (importing torch_npu): ImportError: libascend_hal.so" in reason and "cluster.setup" in reason
    assert "bad_nodes" not in (read_json(lab.run.attempt("train")) or {})


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (
            {"ASCEND_RT_VISIBLE_DEVICES": "0"},
            "node node0: 1 npu device (ASCEND_RT_VISIBLE_DEVICES=0), and 2 are wanted",
        ),
        ({"DEVICE_PROBE_SECONDS": "soon"}, "DEVICE_PROBE_SECONDS=soon: it must be a number of seconds"),
    ],
)
def test_nothing_is_started_where_the_number_is_wrong(
    lab: Lab, packages: Path, environ: dict[str, str], words: str
) -> None:
    assert lab.work(lab.job("train", "open('started', 'w')", **fields(packages, lab, env=environ))) == 1
    assert words in lab.state("train")["reason"] and not (lab.run.path / "started").exists()


def test_the_index_in_the_jobs_record_becomes_the_variable(lab: Lab, packages: Path) -> None:
    program = packages / "scontrol"
    program.write_text("#!/bin/sh\necho 'JobId=77\n     Nodes=node0 CPU_IDs=0 Mem=1 GRES=npu:2(IDX:1,3)'\n")
    program.chmod(0o755)
    value = fields(packages, lab)
    del value["env"]["ASCEND_RT_VISIBLE_DEVICES"]
    slurm = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node0", "NODE_RANK": ""}
    assert lab.work(lab.job("train", WRITE, **value), PATH=f"{packages}:{os.environ['PATH']}", **slurm) == 0
    assert "RT=1,3" in lab.log("train") and "GRES index 1,3 of the job" in lab.log("train")


def test_a_slow_disk_may_do_without(lab: Lab, packages: Path) -> None:
    job = lab.job("train", WRITE, **fields(packages, lab, env={"CARD_0": "hang", "DEVICE_PROBE_SECONDS": "0"}))
    assert lab.work(job) == 0


def test_a_cancelled_probe_ends_at_once(lab: Lab, packages: Path) -> None:
    value = fields(packages, lab, env={"CARD_0": "hang", "DEVICE_PROBE_SECONDS": "60"})
    worker = lab.start(lab.job("train", "", **value))
    lab.until(lambda: len(lab.left()) > 1)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=10) == 143
    assert lab.state("train")["state"] == "CANCELLED" and lab.left() == []


def test_nodes_that_differ_do_not_train_together(lab: Lab, packages: Path, tmp_path: Path) -> None:
    other = shutil.copytree(packages, tmp_path / "other")
    (other / "torch-2.7.1.dist-info").rename(other / "torch-2.11.0.dist-info")
    value = fields(packages, lab)
    del value["env"]["PYTHONPATH"]
    job = lab.job("train", "time.sleep(60)", ranks=True, nodes=2, nproc_per_node=2, **value)
    workers = [lab.start(job, 0, PYTHONPATH=f"{REPOSITORY}:{packages}")]
    workers += [lab.start(job, 1, PYTHONPATH=f"{REPOSITORY}:{other}")]
    assert [worker.wait(timeout=40) for worker in workers] == [1, 1]
    for rank in (0, 1):
        reason = lab.state("train", rank)["reason"]
        assert "node node1 has torch 2.11.0, node 0 on node0 has 2.7.1; give all nodes one installation" in reason
    assert lab.left() == []


def test_what_counts_as_different() -> None:
    ours: dict[str, Any] = {"python": "3.11.2", "torch": "2.7.1", "torch-npu": "2.7.1"}

    def against(host: str = "a02", **theirs: Any) -> str | None:
        changed = {name.replace("_", "-"): value for name, value in theirs.items()}
        return difference(("a01", ours), (host, 1, {n: v for n, v in (ours | changed).items() if v is not None}))

    assert against() is None and against(python="3.11.9") is None
    assert difference(("a01", ours), ("a02", 1, None)) is None and difference(("a01", {}), ("a02", 1, ours)) is None
    assert str(against(python="3.12.1")).startswith("node a02 has python 3.12.1, node 0 on a01 has 3.11.2; ")
    assert str(against(torch_npu=None)).startswith("node a02 has no torch-npu, node 0 on a01 has 2.7.1; ")
    assert str(against("a01", CANN="8.3")).startswith("node 1 on a01 has CANN 8.3, node 0 on a01 has none; ")
