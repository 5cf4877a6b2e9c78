"""Devices that a real Slurm hands out, and that nothing but its record of the job names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.cluster.fixture import Cluster
from tests.cluster.runs import ended, job, launched, running, states, views


@pytest.fixture(autouse=True)
def nothing_is_left(slurm: Cluster) -> Iterator[None]:
    yield
    slurm.clear()


def test_two_jobs_on_a_node_take_a_device_each(slurm: Cluster) -> None:
    node = slurm.layout.names[0]
    one = ("cluster.accelerator=npu", "nodes=1", "cluster.nproc_per_node=1", "pipeline=train")
    one += (f"cluster.jobs.train.nodelist={node}", "cluster.env.STANDIN_TRAIN=sleep")
    runs = [launched(slurm, *one), launched(slurm, *one)]
    for run in runs:
        running(slurm, run, "train")
    seen = [views(run, "train")[0] for run in runs]
    assert sorted(view["ASCEND_RT_VISIBLE_DEVICES"] for view in seen) == ["0", "1"]
    assert seen[0]["HCCL_IF_BASE_PORT"] != seen[1]["HCCL_IF_BASE_PORT"]
    assert {view["SLURMD_NODENAME"] for view in seen} == {node}


def test_a_card_that_hangs_costs_a_minute_and_its_node(slurm: Cluster) -> None:
    run = launched(
        slurm,
        "cluster.accelerator=npu",
        "cluster.env.STANDIN_PROBE=hang",
        "cluster.env.DEVICE_PROBE_SECONDS=3",
    )
    found = ended(slurm, run, seconds=150)
    assert set(states(found).values()) == {"COMPLETED"}, found
    train = job(found, "train")
    known = json.loads((run / "state" / "train.attempt.json").read_text(encoding="utf-8"))
    (bad,) = known["bad_nodes"]
    assert train["attempt"] == 2 and bad not in train["nodes"], found
    log = next(run.glob("logs/train-*_0.log")).read_text(encoding="utf-8")
    # it says how long it waited: the three seconds, more on a busy machine
    said = re.search(rf"node {bad}: npu device 0 hangs: a small sum takes more than (\d+) s", log)
    assert said is not None and int(said[1]) >= 3, log
    for view in views(run, "train"):
        assert view["ASCEND_RT_VISIBLE_DEVICES"] == "0,1" and view["NCCL_SOCKET_IFNAME"] is None
        assert view["HCCL_IF_IP"] == slurm.layout.address(view["SLURMD_NODENAME"])
