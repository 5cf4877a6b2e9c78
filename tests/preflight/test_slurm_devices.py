"""Devices that are asked for and are not there, or are there and not asked for: said before anything is submitted."""

from __future__ import annotations

import pytest

from pkuslurm.compose import compose
from pkuslurm.errors import PkuslurmError
from pkuslurm.plan.plan import plan
from pkuslurm.plan.resources import cluster_for
from pkuslurm.preflight.slurm import check_devices, site_notes
from pkuslurm.slurm.gres import Device, devices
from pkuslurm.slurm.site import groups

SINFO = """\
npu*|4|8|16000|npu:2
typed|2|192|768000|npu:910B3:8(S:0-1)
gpu|3|64|250000|gpu:a100:4(S:0-1),lscratch:1T
gpu|1|64|250000|gpu:h100:8(S:0-1)
bare|9|72|237000|(null)
mixed|1|64|250000|gpu:4
mixed|1|64|250000|(null)
"""


def refusal(*overrides: str, kind: str = "train") -> str | None:
    config = compose(["model=tiny", *overrides]).config
    job = plan(config).job(kind)
    names = str(job.request.options.get("partition", "npu")).split(",")
    try:
        check_devices(job, groups(SINFO), names, cluster_for(config, kind))
    except PkuslurmError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "typed",
    [
        "cluster=ascend",
        "cluster=ascend cluster.partition=typed cluster.nproc_per_node=8",
        "cluster=ascend cluster.partition=typed cluster.gres=npu:910b3:2",
        "cluster=ascend cluster.partition=hidden cluster.gres=npu:64",
        "cluster=ascend cluster.partition='bare,npu'",
        "cluster=nvidia cluster.partition=gpu cluster.nproc_per_node=8",
        "cluster=nvidia cluster.partition=gpu cluster.gres=gpu:h100:8",
        "cluster=nvidia cluster.partition=gpu cluster.gres=null cluster.gpus=8 cluster.nproc_per_node=4 nodes=2",
        "cluster=nvidia cluster.partition=gpu cluster.gres=null cluster.exclusive=true",
        "cluster=nvidia cluster.partition=gpu cluster.gres=null cluster.extra.gpus_per_task=1",
        "cluster=nvidia cluster.partition=mixed cluster.gres=null",
        "cluster=tacc-vista cluster.partition=bare",
        "cluster=slurm cluster.partition=gpu",
        "cluster=ascend cluster.accelerator=cpu",
    ],
)
def test_it_may_be_asked(typed: str) -> None:
    assert refusal(*typed.split()) is None


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            "cluster=ascend cluster.partition=gpu",
            "cluster.gres=npu:2: no node of partition gpu has npu:2; they have gpu:",
        ),
        ("cluster=ascend cluster.partition=bare", "no node of partition bare has npu:2; they have no devices"),
        (
            "cluster=ascend cluster.nproc_per_node=4",
            "cluster.gres=npu:4: no node of partition npu has npu:4; they have npu:2",
        ),
        ("cluster=ascend cluster.gres=npu:910B3:2", "no node of partition npu has npu:910B3:2; they have npu:2"),
        ("cluster=ascend cluster.partition='gpu,bare'", "no node of partition gpu has npu:2"),
        ("cluster=nvidia", "cluster.gres=gpu:1: no node of partition npu has gpu:1; they have npu:2"),
        (
            "cluster=cscs-alps cluster.partition=bare",
            "cluster.gpus_per_node=4: no node of partition bare has gpu:4; they have no devices",
        ),
        (
            "cluster=slurm cluster.accelerator=npu",
            "cluster.accelerator=npu: the train job asks for no device, so Slurm gives it none; the nodes of partition "
            "npu have npu:2; write cluster.gres=…",
        ),
    ],
)
def test_it_is_refused_with_what_there_is(typed: str, message: str) -> None:
    assert message in (refusal(*typed.split()) or "")


def test_the_key_of_one_kind_of_job_is_named() -> None:
    typed = ("cluster=ascend", "cluster.jobs.infer.gres=npu:5", "cluster.jobs.merge.gres=gpu:1")
    assert "cluster.jobs.infer.gres=npu:5: no node" in (refusal(*typed, kind="infer") or "")
    assert "cluster.jobs.merge.gres=gpu:1: no node" in (refusal(*typed, kind="merge") or "")
    assert refusal(*typed) is None and refusal("cluster=ascend", "cluster.partition=gpu", kind="merge") is None


def test_devices_in_slurms_words() -> None:
    assert devices("gpu:a100:4(S:0-1),lscratch:1T") == (Device("gpu", "a100", 4), Device("lscratch", "", 1))
    assert devices("npu") == (Device("npu", "", 1),) and devices("gres/npu:2") == (Device("npu", "", 2),)
    assert devices("a100:2", "gpu") == (Device("gpu", "a100", 2),) and devices("4", "gpu") == (Device("gpu", "", 4),)
    assert devices("(null)") == devices("") == ()
    assert [str(one) for one in devices("dcu:K100-PCIE-64GB-LS:8")] == ["dcu:K100-PCIE-64GB-LS:8"]
    assert devices("gpu:Ascend910B:8")[0].accelerator == "npu" and devices("dcu:8")[0].accelerator == "cuda"


def test_the_first_run_on_a_new_site_says_what_to_fill_in() -> None:
    (note,) = site_notes(compose(["cluster=ascend"]).config)
    assert "cluster.account" in note and "doctor --preset" in note
    for quiet in ("cluster.partition=npu", "cluster.account=a", "cluster.time=10"):
        assert site_notes(compose(["cluster=ascend", quiet]).config) == []
    assert site_notes(compose([]).config) == []
