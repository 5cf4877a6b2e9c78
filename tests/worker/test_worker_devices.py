"""Recorded environments of sites, and what scontrol prints, to a job's devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkuslurm.worker.accelerators import ACCELERATORS
from pkuslurm.worker.devices import Devices, allocated, count_files, find, problem

# Slurm 22.05 of `scontrol show job -d` on a site whose gres.conf has File=
TWO_NODES = """\
JobId=72 JobName=train
   UserId=student(1001) GroupId=student(1001) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   NodeList=ascend[01-02]
   BatchHost=ascend01
   NumNodes=2 NumCPUs=2 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   TRES=cpu=2,mem=1000M,node=2,billing=2
   Socks/Node=* NtasksPerN:B:S:C=1:0:*:* CoreSpec=*
   JOB_GRES=npu:4
     Nodes=ascend[01-02] CPU_IDs=0 Mem=500 GRES=npu:2(IDX:0-1)
   MinCPUsNode=1 MinMemoryNode=500M MinTmpDiskNode=0
   Comment=Nodes=ascend01 GRES=npu:2(IDX:7)
"""
UNLIKE = """\
JobId=73 JobName=train
     Nodes=a01 CPU_IDs=0-3 Mem=500 GRES=npu:910B3:2(IDX:0,3)
     Nodes=a[02-03,07] CPU_IDs=0 Mem=500 GRES=npu:910B3:2(IDX:4-5)
     Nodes=a09 CPU_IDs=0 Mem=500 GRES=gpu:a100:1(IDX:1),npu:Ascend-910B3:3(IDX:0,2-3),npu:910B4:1(IDX:6)
     Nodes=a10 CPU_IDs=0 Mem=500 GRES=npu:2(CNT:2)
     Nodes=a11 CPU_IDs=0 Mem=500 GRES=
     Nodes=a12 CPU_IDs=0 Mem=500 GRES_IDX=npu(IDX:1)
     Nodes=a13 CPU_IDs=0 Mem=500 GRES=gpu:Ascend910B:2(IDX:2-3)
"""
ARRAY = """\
JobId=75 ArrayJobId=74 ArrayTaskId=1 JobName=train
     Nodes=a01 CPU_IDs=0 Mem=500 GRES=npu:1(IDX:1)

JobId=74 ArrayJobId=74 ArrayTaskId=0 JobName=train
     Nodes=a01 CPU_IDs=0 Mem=500 GRES=npu:1(IDX:0)
"""


@pytest.mark.parametrize(
    ("text", "host", "job_id", "indices"),
    [
        (TWO_NODES, "ascend01", "72", [0, 1]),
        (TWO_NODES, "ascend02", "72", [0, 1]),
        (TWO_NODES, "ascend03", "72", None),
        (UNLIKE, "a01", "73", [0, 3]),
        (UNLIKE, "a02", "73", [4, 5]),
        (UNLIKE, "a07", "73", [4, 5]),
        (UNLIKE, "a09", "73", [0, 2, 3, 6]),
        (UNLIKE, "a10", "73", None),
        (UNLIKE, "a11", "73", None),
        (UNLIKE, "a12", "73", [1]),
        (UNLIKE, "a13", "73", [2, 3]),
        (ARRAY, "a01", "75", [1]),
        (ARRAY, "a01", "74", [0]),
        ("", "a01", "1", None),
        ("slurm_load_jobs error: Invalid job id specified", "a01", "1", None),
    ],
)
def test_the_index_of_plain_slurm(text: str, host: str, job_id: str, indices: list[int] | None) -> None:
    assert allocated(text, ACCELERATORS["npu"].gres, host, job_id) == indices


def test_the_index_of_gpus() -> None:
    assert allocated(UNLIKE, ACCELERATORS["cuda"].gres, "a09", "73") == [1]
    assert allocated(UNLIKE.replace("gpu:a100", "dcu"), ACCELERATORS["cuda"].gres, "a09", "73") == [1]


SLURM = {"SLURM_JOB_ID": "72", "SLURM_JOB_NUM_NODES": "1", "SLURM_STEP_ID": "0"}
RT, CUDA = "ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("environ", "names", "value"),
    [
        # the plugin of PKU's computer centre
        (
            {"SLURM_STEP_NPUS": "2,3", "SLURM_JOB_NPUS": "2,3", "ASCEND_VISIBLE_DEVICES": "2,3"}
            | {"NPU_DEVICE_ORDINAL": "2,3"},
            ("2", "3"),
            "2,3",
        ),
        ({"NPU_DEVICE_ORDINAL": "0,1", "SLURM_STEP_NPUS": "6,7"}, ("0", "1"), "0,1"),
        ({"SLURM_STEP_NPUS": "3, 1"}, ("1", "3"), "1,3"),
        ({"SLURM_JOB_NPUS": "0-3"}, ("0", "1", "2", "3"), "0,1,2,3"),
        # SJTU's fork: it names them to CANN itself
        ({"SLURM_JOB_NPUS": "4,5", "SLURM_NPUS_ON_NODE": "2", RT: "4,5"}, ("4", "5"), None),
        # a count alone names none: the job's record does
        ({"SLURM_NPUS_ON_NODE": "2"}, ("0", "1"), "0,1"),
        # a device plugin's names
        ({"ASCEND_VISIBLE_DEVICES": "Ascend910-3,Ascend910-0"}, ("0", "3"), "0,3"),
        # words that name no device
        ({"ASCEND_VISIBLE_DEVICES": "all", "SLURM_STEP_NPUS": "5"}, ("5",), "5"),
        ({"SLURM_STEP_NPUS": "NoDevFiles"}, ("0", "1"), "0,1"),
        # a site that calls them gpu:Ascend910B
        ({"SLURM_STEP_GPUS": "2", "GPU_DEVICE_ORDINAL": "0"}, ("0",), "0"),
        # plain Slurm
        ({}, ("0", "1"), "0,1"),
        # of several nodes, srun carries the first one's list to all
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NPUS": "5,6"}, ("0", "1"), "0,1"),
        # the user's own
        ({RT: "7", "SLURM_STEP_NPUS": "1"}, ("7",), None),
    ],
)
def test_npus_of_a_slurm_job(environ: dict[str, str], names: tuple[str, ...], value: str | None) -> None:
    found = find("npu", SLURM | environ, lambda: TWO_NODES, "ascend01")
    assert found.names == names and found.env.get(RT) == value and not found.hidden


@pytest.mark.parametrize(
    ("environ", "names", "value"),
    [
        ({CUDA: "0,1"}, ("0", "1"), None),
        ({CUDA: "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"}, ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",), None),
        ({CUDA: "MIG-6a7a4d52-c4b4-5c9e-8e6b-0000aaaabbbb"}, ("MIG-6a7a4d52-c4b4-5c9e-8e6b-0000aaaabbbb",), None),
        ({CUDA: "NoDevFiles"}, (), None),
        # counted within the job, where the others count the node's
        ({"GPU_DEVICE_ORDINAL": "0,1", "SLURM_STEP_GPUS": "6,7", "SLURM_JOB_GPUS": "6,7"}, ("0", "1"), "0,1"),
        ({"SLURM_STEP_GPUS": "7,6"}, ("6", "7"), "6,7"),
        ({"SLURM_JOB_GPUS": "GPU-ab12,GPU-cd34"}, ("GPU-ab12", "GPU-cd34"), "GPU-ab12,GPU-cd34"),
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_GPUS": "6,7"}, None, None),
        ({"ASCEND_VISIBLE_DEVICES": "3"}, None, None),
    ],
)
def test_gpus_of_a_slurm_job(environ: dict[str, str], names: tuple[str, ...] | None, value: str | None) -> None:
    found = find("cuda", SLURM | environ, lambda: TWO_NODES, "ascend01")
    assert found.names == names and found.env.get(CUDA) == value


def test_scontrol_is_asked_only_where_nothing_else_tells() -> None:
    def never() -> str:
        raise AssertionError("asked")

    assert find("npu", SLURM | {"SLURM_STEP_NPUS": "1"}, never, "a").names == ("1",)
    assert find("cpu", SLURM, never, "a").names == ()
    # in a platform's container its variable counts the node's devices; the container shows its own, from 0
    assert find("npu", {"ASCEND_VISIBLE_DEVICES": "4,5"}, never, "a") == Devices(None, "all that there are")


def test_set_to_nothing_it_is_left_to_the_site() -> None:
    found = find("npu", SLURM | {RT: "", "ASCEND_VISIBLE_DEVICES": "4,5"}, lambda: TWO_NODES, "ascend01")
    assert found.names is None and found.env == {} and found.hidden == (RT,)


def test_devices_are_counted_by_their_files(tmp_path: Path) -> None:
    for name in ("davinci0", "davinci12", "davinci_manager", "nvidia0", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert [count_files(name, tmp_path) for name in ("npu", "cuda", "cpu")] == [2, 1, 0]
    assert count_files("npu", tmp_path / "none") == 0


NAMED = Devices(("0", "1"), "SLURM_STEP_NPUS=0,1")
UNNAMED = Devices(None, "nothing says which are the job's")


@pytest.mark.parametrize(
    ("found", "seen", "asked", "free", "words"),
    [
        (NAMED, None, 2, False, None),
        (NAMED, 2, 2, False, None),
        (NAMED, 2, None, False, None),
        (NAMED, None, 1, True, None),
        (NAMED, None, 1, False, "2 npu devices (SLURM_STEP_NPUS=0,1), and 1 is wanted; make cluster.gres and"),
        (NAMED, None, 4, True, "2 npu devices (SLURM_STEP_NPUS=0,1), and 4 are wanted; ask Slurm for as many"),
        (NAMED, 1, 2, True, "torch sees 1 npu device (SLURM_STEP_NPUS=0,1), and 2 are wanted; where the site counts"),
        (NAMED, 0, 2, True, "write cluster.env.ASCEND_RT_VISIBLE_DEVICES='', else a card is missing: see npu-smi info"),
        (Devices((), "X=NoDevFiles"), None, None, True, "0 npu devices (X=NoDevFiles), and at least one is wanted"),
        (UNNAMED, None, 2, False, None),
        (UNNAMED, 8, 2, True, None),
        (UNNAMED, 8, 2, False, "nothing tells which of them are this job's: write cluster.exclusive=true"),
        (UNNAMED, 1, 2, True, "torch sees 1 npu device (nothing says"),
        (UNNAMED, 0, None, True, "at least one is wanted"),
    ],
)
def test_too_few_or_too_many(
    found: Devices, seen: int | None, asked: int | None, free: bool, words: str | None
) -> None:
    said = problem("npu", found, seen, asked, "ascend02", free)
    assert (said is None) == (words is None)
    assert said is None or (said.startswith("node ascend02: ") and str(words) in said and "\n" not in said), said
