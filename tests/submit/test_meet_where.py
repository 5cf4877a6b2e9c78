"""Which node this is and where it meets the others, from what platforms set."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pkuslurm import launch, launch_sweep
from pkuslurm.compose import Sweep, compose
from pkuslurm.config.schema import Config
from pkuslurm.errors import PkuslurmError
from pkuslurm.retry import _join_seconds
from pkuslurm.rundir import RunDir
from pkuslurm.submit import meet_where
from pkuslurm.submit.cards import counted
from pkuslurm.submit.meet_where import Role, placed, platforms, role
from pkuslurm.worker import devices, network

JOB = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}


@pytest.mark.parametrize(
    ("environ", "nodes", "expected"),
    [
        ({}, 2, Role()),
        ({"MASTER_ADDR": "left-over"}, 2, Role()),
        (JOB | {"RANK": "1", "WORLD_SIZE": "2"}, 2, Role(1, "job-master-0", 23456)),
        (JOB | {"RANK": "0"}, 2, Role(0, "job-master-0", 23456)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1, Role(0)),
        ({"NODE_RANK": "1"}, 2, Role(1)),
        (JOB | {"NODE_RANK": "2", "RANK": "9", "WORLD_SIZE": "9"}, 3, Role(2, "job-master-0", 23456)),
    ],
)
def test_roles(environ: dict[str, str], nodes: int, expected: Role) -> None:
    assert role(environ, nodes) == expected


@pytest.mark.parametrize(
    ("environ", "nodes", "words"),
    [
        (JOB | {"RANK": "2", "WORLD_SIZE": "2"}, 2, "RANK=2: nodes=2 has node 0 to 1; write as many nodes as"),
        (JOB | {"RANK": "1"}, 1, "RANK=1: nodes=1 has node 0 alone"),
        (JOB | {"RANK": "1", "WORLD_SIZE": "4"}, 2, "WORLD_SIZE=4: the platform has started 4 pods, for nodes=2"),
        (JOB | {"RANK": "0", "WORLD_SIZE": "2"}, 1, "WORLD_SIZE=2: the platform has started 2 pods, for nodes=1"),
        (JOB | {"RANK": "one"}, 2, "RANK=one: it must be a number"),
        (JOB | {"NODE_RANK": "-1"}, 2, "NODE_RANK=-1: it must be a number"),
        (JOB | {"RANK": "1", "MASTER_PORT": "http"}, 2, "MASTER_PORT=http: it must be a number from 1 to 65535"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(environ: dict[str, str], nodes: int, words: str) -> None:
    with pytest.raises(PkuslurmError, match=words):
        role(environ, nodes)


def test_some_platforms_count_ranks_as_their_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("2", "16"):
        assert role(JOB | {"RANK": "1", "WORLD_SIZE": size}, 2, 8).rank == 1
    with pytest.raises(PkuslurmError, match="started 8 pods, for nodes=2, and not the 16 ranks of nodes=2 with 8 each"):
        role(JOB | {"RANK": "1", "WORLD_SIZE": "8"}, 2, 8)


def test_a_job_is_known_by_its_node_0_on_all_its_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "job-master-0")
    assert role(JOB | {"RANK": "1"}, 2).key == "job-master-0-23456"
    for address in ("localhost", "127.0.0.1"):
        assert role(JOB | {"RANK": "0", "MASTER_ADDR": address}, 2).key == "job-master-0-23456"
    assert Role(1).key == Role().key == "meeting"
    assert Role(0, "../../x", 1).key == "------x-1"


def scow(*overrides: str) -> Callable[..., Config]:
    composed = compose(["cluster=scow", *overrides])
    changed = {item.key for item in composed.settings}
    return lambda **environ: counted(placed(composed.config, changed, environ), environ)


def test_folders_that_all_nodes_see(tmp_path: Path) -> None:
    found = scow("nodes=2", "model=tiny", f"cluster.meet={tmp_path}")()
    assert (found.run_root, found.cache_root) == (f"{tmp_path}/runs", f"{tmp_path}/runs/.cache")
    given = scow("nodes=2", "model=tiny", f"cluster.meet={tmp_path}", "run_root=/r", "cache_root=/c")()
    assert (given.run_root, given.cache_root) == ("/r", "/c")
    with pytest.raises(PkuslurmError, match="there is no such folder here; it must be a mount point"):
        scow("nodes=2", f"cluster.meet={tmp_path}/no")()


@pytest.mark.parametrize(
    ("overrides", "told", "own", "expected"),
    [
        ([], {}, Role(), None),
        ([], {"WORK_DIR": "/w/appData/a"}, Role(), None),
        ([], {}, Role(1), None),
        ([], {}, Role(1, "m", 2), "runs"),
        (["run_root=/shared/runs"], {}, Role(), "/shared/runs"),
        ([], {"PKUSLURM_RUN_ROOT": "/x"}, Role(), "runs"),
        (["cluster.meet=/shared"], {}, Role(1, "m", 2), "/shared"),
    ],
)
def test_where_they_meet(overrides: list[str], told: dict[str, str], own: Role, expected: str | None) -> None:
    composed = compose(["cluster=scow", "nodes=2", *overrides])
    changed = {item.key for item in composed.settings}
    found = meet_where.place(composed.config, changed, own, told)
    assert found is expected if expected is None else str(found).endswith(expected)


def test_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "count_files", lambda accelerator: {"npu": 8, "cuda": 4}[accelerator])
    assert scow()(VC_GPU_NUM="2").cluster.nproc_per_node == 2
    assert scow()().cluster.nproc_per_node == 8
    assert scow("cluster.nproc_per_node=1")(VC_GPU_NUM="2").cluster.nproc_per_node == 1
    assert scow("cluster.accelerator=cpu")(VC_GPU_NUM="2").cluster.nproc_per_node is None
    assert scow()(VC_GPU_NUM="8", ASCEND_RT_VISIBLE_DEVICES="4,5").cluster.nproc_per_node == 2, "no more are seen"
    local = compose(["cluster.accelerator=cuda"]).config
    assert counted(local, {"VC_GPU_NUM": "2"}).cluster.nproc_per_node == 4
    assert counted(local, {"CUDA_VISIBLE_DEVICES": "2"}).cluster.nproc_per_node == 1
    assert counted(local, {"CUDA_VISIBLE_DEVICES": ""}).cluster.nproc_per_node == 4, "left to the site"


def test_what_the_platform_names_is_taken_unless_something_else_is_typed(tmp_path: Path) -> None:
    model, data = tmp_path / "Qwen2.5-0.5B-Instruct", tmp_path / "data"
    environ = {"SCOW_AI_MODEL_PATH": str(model), "SCOW_AI_DATASET_PATH": str(data)}
    assert platforms(["cluster=scow"], environ) == [], "neither is there"
    for folder in (model, data, tmp_path / "mine"):
        folder.mkdir()
    (model / "config.json").touch()
    (tmp_path / "mine" / "config.json").touch()
    found = ["model=qwen2.5-0.5b-instruct", f"model.path={model}"]
    assert platforms(["cluster=scow"], environ) == found, "an empty folder is no data"
    (data / "identity.json").touch()
    assert platforms(["model=tiny"], environ) == [f"dataset.path={data}"]
    assert platforms(["model=tiny", "dataset.name=aa"], environ) == [f"dataset.path={data}"], "aa is one of its"
    assert platforms(["dataset=identity", "model.path=/m"], environ) == []
    assert platforms([], environ | {"SCOW_AI_MODEL_PATH": f"{tmp_path}/mine"})[0] == f"model.path={tmp_path}/mine"
    assert platforms(["from_yaml=a.yaml"], environ) == []
    for name in ("tiny", "Custom", "auto"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
        assert platforms(["dataset=identity"], {"SCOW_AI_MODEL_PATH": f"{tmp_path}/{name}"}) == [
            f"model.path={tmp_path}/{name}"
        ]
    composed = compose(["cluster=scow", *found])
    assert (composed.config.model.path, composed.config.model.template) == (str(model), "qwen")


def test_a_sweep_takes_what_the_platform_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.json").touch()
    monkeypatch.setenv("SCOW_AI_DATASET_PATH", f"{tmp_path}/data")
    seen: list[str | None] = []

    def keep(sweep: Sweep, typed: list[str], environ: object) -> int:
        seen.extend(point.composed.config.dataset.path for point in sweep.points)
        assert f"dataset.path={tmp_path}/data" in typed, "a sweep that is extended goes by what was typed"
        return 0

    monkeypatch.setattr(launch_sweep, "launch_sweep", keep)
    assert launch.main(["-m", "cluster=scow", "model=tiny", "train.lora_rank=8,16"]) == 0
    assert seen == [f"{tmp_path}/data"] * 2


def test_an_address_that_the_platform_tells_counts_if_it_is_this_machines() -> None:
    own = network.own_address("")
    assert network.interface_of(own) is not None
    assert network.own_address("192.0.2.7") == own and network.own_address("no address") == own
    assert network.own_address("127.0.0.1") == "127.0.0.1", "it is asked for"


def test_a_retry_waits_as_long_as_the_launch_was_told_to(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert _join_seconds(run) == 600
    run.config_yaml.write_text("cluster:\n  join_timeout: 30\n", encoding="utf-8")
    assert _join_seconds(run) == 30
