"""Which devices a job by hand has, from what its node says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pkuslurm import byhand

STOCK = "JobId=9 JobName=train\\n     Nodes=a01 CPU_IDs=0 Mem=1 GRES=npu:2(IDX:1,3)"


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, ("cpu", 0)),
        ({"ASCEND_RT_VISIBLE_DEVICES": "0,1"}, ("npu", 2)),
        ({"SLURM_STEP_NPUS": "4"}, ("npu", 1)),
        ({"SLURM_NPUS_ON_NODE": "8"}, ("npu", 8)),
        ({"SLURM_JOB_GPUS": "0,1,2"}, ("cuda", 3)),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_GPUS_ON_NODE": "4"}, ("cuda", 4)),
        ({"SLURM_JOB_GPUS": "0,1", "PKUSLURM_ACCELERATOR": "npu"}, ("npu", 2)),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "PKUSLURM_ACCELERATOR": "cpu"}, ("cpu", 0)),
        ({"SLURM_JOB_ID": "9", "SLURMD_NODENAME": "a01"}, ("npu", 2)),
        ({"SLURM_JOB_ID": "9", "SLURMD_NODENAME": "a02"}, ("cpu", 0)),
    ],
)
def test_the_devices_of_a_job_by_hand(environ: dict[str, str], found: tuple[str, int], tmp_path: Path) -> None:
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\nprintf '{STOCK}'\n")
    program.chmod(0o755)
    assert byhand.devices_of({}, environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"}) == found


def test_its_job_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my.yaml"
    file.write_text("stage: sft\noutput_dir: out\n")
    environ = {"SLURM_STEP_NPUS": "4,5", "SLURM_JOB_NUM_NODES": "2", "HCCL_CONNECT_TIMEOUT": "300"}
    job = json.loads(byhand.job_file("train", file, None, environ).read_text())
    assert (job["accelerator"], job["devices"], job["nproc_per_node"]) == ("npu", 2, 2)
    assert "torch.distributed.run" in job["command"]
    hccl = {name: value for name, value in job["env"].items() if name.startswith("HCCL")}
    # the YAML says no ddp_timeout: torch's 1800 s
    assert hccl == {"HCCL_WHITELIST_DISABLE": "1", "HCCL_EXEC_TIMEOUT": "900"}
    late = environ | {"HCCL_CONNECT_TIMEOUT": "3600"}
    assert "HCCL_EXEC_TIMEOUT" not in json.loads(byhand.job_file("train", file, None, late).read_text())["env"]
    job = json.loads(byhand.job_file("train", file, None, {}).read_text())
    assert (job["accelerator"], job["devices"]) == ("cpu", None) and not [n for n in job["env"] if "HCCL" in n]
    assert "prefork" in job["command"]
