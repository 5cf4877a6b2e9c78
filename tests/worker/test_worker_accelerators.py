"""The table of accelerators: what a rank gets, what it never sees, in which order time-outs run out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import RunDir
from pkuslurm.worker import environment, network
from pkuslurm.worker.accelerators import ACCELERATORS, base_port, timeouts
from pkuslurm.worker.job import Job
from pkuslurm.worker.rendezvous import Rendezvous

HOSTILE = {
    "PATH": "/bin",
    "NCCL_DEBUG": "INFO",
    "TORCH_NCCL_BLOCKING_WAIT": "1",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "CUDA_HOME": "/usr/local/cuda",
    "HCCL_IF_BASE_PORT": "51000",
    "ASCEND_RT_VISIBLE_DEVICES": "0",
    "ASCEND_VISIBLE_DEVICES": "0",
    "ASCEND_HOME_PATH": "/usr/local/Ascend/cann",
    "ASCEND_TOOLKIT_HOME": "/usr/local/Ascend/cann",
    "SLURM_JOB_ID": "7",
}


def job(**fields: Any) -> Job:
    return Job(**{
        "run_id": "r", "kind": "train", "run": RunDir(Path("/runs/r")), "parents": (), "nodes": 2, "nproc_per_node": 2,
        "first_attempt": 1, "command": ("python",), "env": {}, "env_names": {}, "unset": (), "expect": {},
        "cwd": Path("/runs/r"), "accelerator": "npu",
    } | fields)  # fmt: skip


def seen(given: dict[str, str], nodes: int = 2, **fields: Any) -> dict[str, str]:
    meeting = Rendezvous(0, nodes, "127.0.0.1", 12345, "a test")
    return environment.of(given, job(nodes=nodes, **fields), meeting, 1)


def test_a_rank_sees_only_its_own_accelerators_variables() -> None:
    def left(accelerator: str) -> set[str]:
        return {name for name in seen(HOSTILE, 1, accelerator=accelerator) if name in HOSTILE}

    everywhere = {"PATH", "SLURM_JOB_ID"}
    homes = {"ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"}
    hccl = {"HCCL_IF_BASE_PORT", "ASCEND_RT_VISIBLE_DEVICES", "ASCEND_VISIBLE_DEVICES"}
    nccl = {"NCCL_DEBUG", "TORCH_NCCL_BLOCKING_WAIT", "CUDA_VISIBLE_DEVICES", "CUDA_HOME"}
    assert left("npu") == everywhere | homes | hccl
    assert left("cuda") == everywhere | nccl
    assert left("cpu") == everywhere | homes  # torch-npu is imported where it is installed
    assert seen(HOSTILE, 1, accelerator=None).items() >= HOSTILE.items()


def test_what_the_user_sets_wins_everywhere() -> None:
    own = {"NCCL_DEBUG": "WARN", "HCCL_IF_IP": "10.0.0.9", "HCCL_IF_BASE_PORT": "62000", "GLOO_SOCKET_IFNAME": "ib0"}
    assert seen(HOSTILE, env=own).items() >= own.items()
    exported = {"HCCL_IF_IP": "10.0.0.9", "HCCL_IF_BASE_PORT": "62000", "GLOO_SOCKET_IFNAME": "ib0"}
    assert seen(exported).items() >= exported.items()
    assert seen({"NCCL_DEBUG": "X"}, env_names={"NCCL_DEBUG": "NCCL_DEBUG"})["NCCL_DEBUG"] == "X"


@pytest.mark.parametrize(
    ("accelerator", "names"),
    [
        ("npu", {"HCCL_IF_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}),
        ("cuda", {"NCCL_SOCKET_IFNAME": "=lo", "GLOO_SOCKET_IFNAME": "lo"}),
        ("cpu", {"GLOO_SOCKET_IFNAME": "lo"}),
    ],
)
def test_the_interface_towards_the_master(accelerator: str, names: dict[str, str]) -> None:
    given = seen({}, accelerator=accelerator)
    assert {name: value for name, value in given.items() if name.endswith(("IFNAME", "IF_IP"))} == names
    alone = seen({}, 1, accelerator=accelerator)
    assert not [name for name in alone if name.endswith(("IFNAME", "IF_IP"))]


def test_hccl_has_ports_of_its_own_where_nodes_are_shared() -> None:
    assert seen({"SLURM_JOB_ID": "7"})["HCCL_IF_BASE_PORT"] == str(28000 + 32 * 7)
    for fields in ({"exclusive": True}, {"accelerator": "cuda"}, {"kind": "infer"}):
        assert "HCCL_IF_BASE_PORT" not in seen({"SLURM_JOB_ID": "7"}, **fields), fields
    assert "HCCL_IF_BASE_PORT" not in seen({})
    ports = {int(base_port({"SLURM_JOB_ID": str(job_id)})["HCCL_IF_BASE_PORT"]) for job_id in range(1000, 1148)}
    assert len(ports) == 148, "neighbours in time never share one"
    assert min(ports) >= network.FIRST_PORT + network.PORTS and max(ports) + 31 < 32768
    again = base_port({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    assert again != base_port({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}) == base_port({"SLURM_JOB_ID": "7"})


@pytest.mark.parametrize(
    ("ddp", "given", "found"),
    [
        (None, {}, (600, 3600, 7200)),
        (180000000, {}, (600, 3600, 180000000)),
        (3601, {}, (600, 3600, 3601)),
        (1800, {}, (450, 900, 1800)),
        (300, {}, (120, 150, 300)),
        (None, {"HCCL_EXEC_TIMEOUT": "9000"}, (600, 9000, 18000)),
        (None, {"HCCL_CONNECT_TIMEOUT": "3600"}, (3600, 9000, 14400)),
        (None, {"HCCL_EXEC_TIMEOUT": "0"}, (600, 0, 7200)),
        (2000, {"HCCL_CONNECT_TIMEOUT": "1500"}, (1500, 1750, 2000)),
    ],
)
def test_time_outs_run_out_in_order(ddp: int | None, given: dict[str, str], found: tuple[int, int, int]) -> None:
    total, variables = timeouts(ddp, given)
    names = ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT")
    assert (*(int((variables | given)[name]) for name in names), total) == found
    assert not set(variables) & set(given), "what the user has set is not rendered twice"


@pytest.mark.parametrize(
    ("ddp", "given"),
    [
        (200, {}),
        (1800, {"HCCL_EXEC_TIMEOUT": "1800"}),
        (None, {"HCCL_EXEC_TIMEOUT": "100"}),
        (None, {"HCCL_EXEC_TIMEOUT": "600", "HCCL_CONNECT_TIMEOUT": "600"}),
    ],
)
def test_time_outs_in_another_order_are_refused(ddp: int | None, given: dict[str, str]) -> None:
    with pytest.raises(PkuslurmError, match=r"HCCL_CONNECT_TIMEOUT \(\d+, at least 120\) < HCCL_EXEC_TIMEOUT \(\d+\)"):
        timeouts(ddp, given)


def test_a_time_out_that_is_not_known_here_is_left_alone() -> None:
    assert timeouts("${oc.env:X}", {})[0] is None
    assert timeouts(None, {"HCCL_EXEC_TIMEOUT": "${oc.env:X}"})[1] == {"HCCL_CONNECT_TIMEOUT": "600"}


def test_the_table_is_whole() -> None:
    for name, row in ACCELERATORS.items():
        assert row.device == name
        assert bool(row.visible) == (name != "cpu") == bool(row.file) == bool(row.gres)
        assert set(row.batch_lists) <= set(row.lists)
        mine = {*row.env, *row.collective, row.visible, row.address, *row.interfaces} - {""}
        foreign = {one for one in mine if row.never.match(one)}
        assert foreign == ({"CUDA_VISIBLE_DEVICES"} if name == "cpu" else set())  # which hides them
    assert [row.backend for row in ACCELERATORS.values()] == ["gloo", "nccl", "hccl"]
