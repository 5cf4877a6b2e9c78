"""Presets of real sites are examples, say so, and ask for what the site wants; what no site takes is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pkuslurm.compose import compose
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import CONF
from pkuslurm.plan.plan import plan

OWN = ("ascend", "nvidia", "slurm", "local", "scow")
EXAMPLES = sorted(file.stem for file in (CONF / "cluster").glob("*.yaml") if file.stem not in OWN)


def test_there_are_enough_of_them() -> None:
    kinds = [compose([f"cluster={name}"]).config.cluster.accelerator for name in EXAMPLES]
    assert len(kinds) >= 6 and kinds.count("npu") >= 3


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_that_it_is_one(name: str) -> None:
    text = (CONF / "cluster" / f"{name}.yaml").read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert head[1].startswith("# An example, check with your site: ") and "From" in text and "November 2026" in text
    composed = compose([f"cluster={name}"])
    (note,) = composed.config.notes
    assert note.startswith(f"cluster={name} is an example") and "fill in" in note
    cluster = composed.config.cluster
    assert cluster.executor == "slurm" and cluster.partition and cluster.account is None and cluster.python is None
    assert set(yaml.safe_load(text)) == {"notes", "cluster"} and "/home" not in text
    assert composed.choices["model"] == "qwen2.5-1.5b-instruct", "not the model that is made on this machine"


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_examples_values_can_be_changed(name: str) -> None:
    typed = [f"cluster={name}", "cluster.account=a", "cluster.partition=b", "cluster.nproc_per_node=4", "notes=[]"]
    config = compose(typed).config
    assert (config.cluster.account, config.cluster.partition, config.notes) == ("a", "b", [])
    options = plan(config).job("train").request.options
    assert "4" in str(options.get("gres") or options.get("gpus_per_node") or options.get("gpus") or "4")


STEPS = "this site gives devices in steps of 2 (cluster.devices_step): 2, 4, 6, …"
OTHERS = "or ask for others (cluster.gres, cluster.gpus, cluster.gpus_per_node)"
REFUSED = {
    "cluster=hkust-gz-hpc4 cluster.nproc_per_node=3": f"cluster.nproc_per_node=3: {STEPS}",
    "cluster=hkust-gz-hpc4 cluster.jobs.infer.gres=npu:1": f"cluster.jobs.infer.gres=npu:1: {STEPS}",
    "cluster=ascend cluster.accelerator=cuda": "cluster.accelerator=cuda: the job asks Slurm for npu:2, "
    f"which cuda cannot compute on; write cluster.accelerator=npu, {OTHERS}",
    "cluster=nvidia cluster.accelerator=npu": "cluster.accelerator=npu: the job asks Slurm for gpu:1, "
    f"which npu cannot compute on; write cluster.accelerator=cuda, {OTHERS}",
    "cluster=ascend cluster.gres=npu:1": "cluster.nproc_per_node=2: each rank computes on a device of its own, "
    "and a node is asked for npu:1",
    "cluster=paratera nodes=2": "cluster.gpus=4: it counts all nodes' devices; 2 × 4 ranks need cluster.gpus=8",
    "cluster=ascend cluster.devices_step=0": "cluster.devices_step=0: it must be 1 or more",
}


@pytest.mark.parametrize(("typed", "message"), REFUSED.items())
def test_it_is_refused_in_one_line(typed: str, message: str) -> None:
    with pytest.raises(PkuslurmError) as refused:
        compose(typed.split())
    assert str(refused.value).partition("; it stands in")[0] == message


@pytest.mark.parametrize(
    "typed",
    [
        "cluster=ascend cluster.accelerator=cpu cluster.gres=npu:1",
        "cluster=ascend cluster.gres=gpu:Ascend910B:2",
        "cluster=nvidia cluster.gres=tmpdisk:100 cluster.nproc_per_node=4",
        "cluster=nvidia cluster.gres=null cluster.extra.gpus_per_task=1 cluster.nproc_per_node=4",
        "cluster=paratera nodes=2 cluster.gpus=8",
        "cluster=hkust-gz-hpc4 cluster.nproc_per_node=16",
        "pipeline=infer model=custom model.path=/m cluster=ascend cluster.gres=npu:1",
    ],
)
def test_it_is_taken(typed: str) -> None:
    compose(typed.split())


@pytest.mark.parametrize(
    ("typed", "ranks"),
    [
        ("cluster.gres=npu:910B3:8", 8),
        ("cluster.gres=null cluster.gpus_per_node=a100:4 cluster.accelerator=cuda", 4),
        ("cluster.gres=null cluster.gpus=8 cluster.accelerator=cuda nodes=2", 4),
        ("cluster.gres=null", 1),
        ("cluster.jobs.train.gres=npu:4", 4),
    ],
)
def test_ranks_that_are_not_counted_are_the_devices(typed: str, ranks: int) -> None:
    config = compose(["cluster=ascend", "cluster.nproc_per_node=null", *typed.split()]).config
    assert plan(config).job("train").nproc_per_node == ranks


def test_a_site_that_demands_a_device_of_every_job() -> None:
    asked = [job.request.options["gres"] for job in plan(compose(["cluster=sjtu-910b3"]).config).jobs]
    assert asked == ["npu:1"] * 5


SITES = (CONF.parent / "docs" / "sites.md").read_text(encoding="utf-8")


def test_the_page_names_every_example_and_its_own_preset_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", SITES, re.MULTILINE)) == EXAMPLES
    monkeypatch.chdir(tmp_path)
    own = re.search(r"```yaml\n(.*?)```", SITES, re.DOTALL)
    assert own is not None and own[1].count("\n") == 10
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text(own[1], encoding="utf-8")
    steps = plan(compose(["cluster=mine"], [tmp_path]).config)
    asked = [(job.request.options["partition"], job.request.options.get("gres")) for job in steps.jobs]
    assert asked[1:4] == [("ascend", "npu:910B3:8"), ("cpu", None), ("ascend", "npu:910B3:1")]
    assert steps.job("train").request.options["time"] == "1-00:00:00"
