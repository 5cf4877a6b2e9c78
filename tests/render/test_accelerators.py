"""What of the table of accelerators stands in a run's files."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pkuslurm.launch import main
from pkuslurm.paths import PAYLOAD


def files(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, str]:
    assert main([*overrides, "dry_run=true", "run_root=/runs", "cache_root=/cache"]) == 0
    text = capsys.readouterr().out
    return dict(part.partition("\n")[::2] for part in text.split("\n# file ")[1:])


def jobs(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    found = files(capsys, *overrides)
    return {kind: json.loads(found[f"jobs/{kind}.json"]) for kind in ("prepare", "train", "merge", "infer", "report")}


@pytest.mark.parametrize(
    ("overrides", "accelerator", "devices"),
    [
        (["cluster=ascend", "nodes=2"], "npu", 2),
        (["cluster=ascend", "cluster.nproc_per_node=4"], "npu", 4),
        (["cluster=ascend", "cluster.gres=npu:8"], "npu", 8),  # more than there are ranks
        (["cluster=nvidia"], "cuda", 1),
        (["cluster=nvidia", "cluster.gres=null", "cluster.gpus=4", "nodes=2", "cluster.nproc_per_node=2"], "cuda", 2),
        (["cluster=slurm", "cluster.accelerator=npu", "cluster.nproc_per_node=4"], "npu", 4),  # none is asked for
        (["cluster=ascend", "cluster.accelerator=cpu"], "cpu", None),
        (["cluster=local"], "cpu", None),
    ],
)
def test_each_job_says_what_it_computes_on(
    overrides: list[str], accelerator: str, devices: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = jobs(capsys, *overrides)
    assert (found["train"]["accelerator"], found["train"]["devices"]) == (accelerator, devices)
    assert (found["infer"]["accelerator"], found["infer"]["devices"]) == (accelerator, None)
    for kind in ("prepare", "merge", "report"):
        assert (found[kind]["accelerator"], found[kind]["devices"]) == ("cpu", None)
        assert found[kind]["env"]["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    hccl = {name: value for job in found.values() for name, value in job["env"].items() if name.startswith("HCCL")}
    assert bool(hccl) == (accelerator == "npu")


IMAGE = ["container=apptainer", "container.image=/images/lf.sif"]


@pytest.mark.parametrize(
    ("overrides", "launcher"),
    [
        (["cluster=local"], "prefork"),
        (["cluster=slurm", *IMAGE], "prefork"),
        (["cluster=ascend"], "torch.distributed.run"),  # torch-npu documents no fork
        (["cluster=nvidia", *IMAGE], "torch.distributed.run"),  # not compared on a device
        (["cluster=nvidia", "cluster.launcher=prefork"], "prefork"),
        (["cluster=local", "cluster.launcher=torchrun"], "torch.distributed.run"),
        (["cluster=ascend", "cluster.jobs.train={accelerator: cpu}"], "prefork"),
    ],
)
def test_who_starts_the_ranks(overrides: list[str], launcher: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By default prefork only where what it computes is known to be the same."""
    train = jobs(capsys, *overrides)["train"]
    assert [word for word in train["command"] if word in ("prefork", "torch.distributed.run")] == [launcher]
    if train["container"]:  # it needs no more of the image than its python
        assert train["command"][0] == "python3" and str(PAYLOAD.parent.parent) in train["container"]["mounts"]


@pytest.mark.parametrize(
    ("overrides", "line", "execute"),
    [
        (["cluster=ascend"], "ddp_timeout: 7200", "3600"),
        (["cluster=ascend", "train.ddp_timeout=3000"], "ddp_timeout: 3000", "1500"),
        (["cluster=ascend", "cluster.env.HCCL_EXEC_TIMEOUT=9000"], "ddp_timeout: 18000", "9000"),
        (["cluster=ascend", "cluster.jobs.train.env.HCCL_EXEC_TIMEOUT=9000"], "ddp_timeout: 18000", "9000"),
        (["cluster=nvidia"], None, None),
        (["cluster=nvidia", "train.ddp_timeout=3000"], "ddp_timeout: 3000", None),
    ],
)
def test_time_outs(
    overrides: list[str], line: str | None, execute: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = files(capsys, *overrides)
    lines = [one for one in found["train.yaml"].splitlines() if one.startswith("ddp_timeout")]
    assert lines == ([line] if line else [])
    assert json.loads(found["jobs/train.json"])["env"].get("HCCL_EXEC_TIMEOUT") == execute


def test_time_outs_in_another_order_are_refused_before_anything_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster=ascend", "train.ddp_timeout=200", "dry_run=true"]) == 2
    assert "train.ddp_timeout=200: on NPUs it must be HCCL_CONNECT_TIMEOUT" in capsys.readouterr().err
