"""cluster=scow as it is typed: pods with addresses, names and WORK_DIRs of their own, and one folder in common."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.rundir import RunDir, read_json
from tests.meet.pods import Pod, Terminal, until

Pair = tuple[Terminal, Terminal]
TRAIN = "pipeline=train"
LONG = {"STANDIN_TRAIN": "steps:400"}  # until it is ended


def both(pods: list[Pod], *arguments: str, **variables: str) -> Pair:
    return pods[0].launch(*arguments, **variables), pods[1].launch(*arguments, **variables)


def training(pods: list[Pod], pair: Pair, steps: int = 1) -> tuple[RunDir, int]:
    """The run, once both nodes have trained; which of ``pair`` is node 0."""
    until(lambda: list(pods[0].shared.glob("runs/2*/views/steps.1")), 60, lambda: pair[0].err + pair[1].err)
    [run] = map(RunDir, pods[0].shared.glob("runs/2*"))
    until(lambda: len((run.path / "views" / "steps.1").read_text().splitlines()) >= steps)
    return run, 0 if "waits in" in pair[0].err else 1


def states(run: RunDir, *kinds: str) -> list[Any]:
    return [(read_json(run.state(kind)) or {}).get("state") for kind in kinds]


def view(run: RunDir, rank: int) -> dict[str, Any]:
    return read_json(run.path / "views" / f"train.{rank}.json") or {}


def left_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in ("trainer", "runs"))


def test_two_applications_from_an_empty_folder_to_the_report(pods: list[Pod]) -> None:
    pair = both(pods, STANDIN_TRAIN="steps:16")
    run, first = training(pods, pair)
    for terminal in pair:
        terminal.send(signal.SIGHUP)  # the browser's tab is closed
    third = pods[2].launch()
    follower = pods[2].verb("logs", "-f", run.path)
    second = pods[2].verb("retry", run.path)
    looked = pods[2].verb("status", run.path, "--json")
    assert looked.ended() == 0
    now = json.loads(looked.out)
    assert (now["state"], now["jobs"][1]["state"]) == ("RUNNING", "RUNNING"), now
    assert second.ended() == 2 and f"it is at work on {pods[first].name}; wait, or cancel" in second.err, second.err
    assert third.ended() == 2 and "that many have come together already with" in third.err, third.err
    assert [terminal.ended() for terminal in pair] == [0, 0], pair[0].err + pair[1].err
    assert follower.ended() == 0 and "train COMPLETED" in follower.out

    assert pair[0].run == pair[1].run == run.path
    for pod in pods[:2]:
        known = pod.home / "state" / "pkuslurm" / "run_roots"
        assert known.read_text(encoding="utf-8") == f"{run.path.parent}\n", "its name alone finds it on each pod"
    for rank, pod in ((0, pods[first]), (1, pods[1 - first])):
        seen = view(run, rank)
        assert (seen["NODE_RANK"], seen["MASTER_ADDR"]) == (str(rank), pods[first].address)
        assert seen["GLOO_SOCKET_IFNAME"] == "eth0"
        assert (read_json(run.state("train", rank)) or {})["host"] == pod.name
    assert f"SCOW_AI_MODEL_PATH={run.merged}" in pair[first].err and "NextChat" not in pair[1 - first].err
    assert run.report.exists() and left_in(pods[0].shared) == []
    assert not any((pod.home / "work").exists() for pod in pods), "WORK_DIR is each pod's own"
    looked = pods[2].verb("status", run.path, "--json")
    assert looked.ended() == 0 and json.loads(looked.out)["state"] == "COMPLETED"


def test_a_training_job_and_two_applications_five_seconds_apart(pods: list[Pod]) -> None:
    """Node 1 of the job comes first, and the application on the other pod."""
    shared = pods[0].shared
    job = {"MASTER_ADDR": pods[0].address, "MASTER_PORT": "29411", "WORLD_SIZE": "2", "WORK_DIR": str(shared / "job")}
    pairs = [pods[1].launch(TRAIN, shared=False, RANK="1", **job), pods[1].launch(TRAIN)]
    time.sleep(5)
    pairs += [pods[0].launch(TRAIN, shared=False, RANK="0", **job), pods[0].launch(TRAIN)]
    assert [one.ended() for one in pairs] == [0, 0, 0, 0], [one.err for one in pairs]
    assert pairs[0].run == pairs[2].run and pairs[0].run.parent == shared / "job" / "runs"
    assert pairs[1].run == pairs[3].run and pairs[1].run.parent == shared / "runs"
    seen = view(RunDir(pairs[0].run), 1)
    assert (seen["NODE_RANK"], seen["MASTER_ADDR"], seen["MASTER_PORT"]) == ("1", pods[0].address, "29411")
    assert view(RunDir(pairs[1].run), 0)["MASTER_ADDR"] == pods[1].address, "the first to arrive is node 0"
    assert left_in(shared) == ["job"] and left_in(shared / "job" / "runs") == [".cache", pairs[0].run.name]


def test_one_application_alone_and_a_partner_that_never_comes_and_a_folder_that_nobody_named(pods: list[Pod]) -> None:
    alone = pods[0].launch("cluster.join_timeout=1")
    nowhere = pods[1].launch(shared=False)
    one = pods[2].launch("nodes=1", TRAIN, shared=False, VC_GPU_NUM="1")
    assert one.ended() == 0 and one.run.parent == pods[2].home / "work" / "runs", one.err
    assert alone.ended() == 2 and nowhere.ended() == 2
    last = alone.err.splitlines()[-1]
    assert "cluster.join_timeout=1: node 1 of 2 did not come" in last and "pod1 (10.99.0.1)" in last
    assert "-m pkuslurm.launch cluster=scow" in last
    assert "挂载点" in nowhere.err and "add the same mount point" in nowhere.err and "cluster.meet=DIR" in nowhere.err
    assert left_in(pods[0].shared) == [] and not (pods[0].shared / "runs").exists()
    assert not (pods[1].home / "work").exists()


def test_ctrl_c_on_the_other_node_cancels_everywhere(pods: list[Pod]) -> None:
    pair = both(pods, TRAIN, **LONG)
    run, first = training(pods, pair)
    pair[1 - first].send(signal.SIGINT)
    assert [terminal.ended() for terminal in pair] == [130, 130], pair[0].err + pair[1].err
    assert f"the run was cancelled by Ctrl-C on {pods[1 - first].name}" in pair[first].err
    assert states(run, "train") == ["CANCELLED"] and left_in(pods[0].shared) == []


def killed(pods: list[Pod], pair: Pair, who: str) -> tuple[RunDir, int]:
    """``who`` dies once there is a checkpoint."""
    run, first = training(pods, pair, 7)
    process = pair[first] if who == "host" else pair[1 - first]
    if who == "worker":
        os.kill((read_json(run.state("train", 1)) or {})["pid"], signal.SIGKILL)
    else:
        process.send(signal.SIGKILL)
    return run, first


def test_node_1_dies_and_retry_on_both_goes_on_until_a_third_pod_cancels_it(pods: list[Pod]) -> None:
    pair = both(pods, TRAIN, **LONG)
    run, first = killed(pods, pair, "guest")
    name = pods[1 - first].name
    assert pair[first].ended() == 1, pair[first].err
    assert f"node 1 on {name} is gone" in pair[first].err
    assert states(run, "train") == ["FAILED"] and left_in(pods[0].shared) == []
    again = [pod.verb("retry", run.path, **LONG) for pod in pods[:2]]

    def second() -> list[int]:
        lines = (run.path / "views" / "steps.1").read_text(encoding="utf-8").splitlines()
        return [int(step) for attempt, step in map(str.split, lines) if attempt == "2"]

    until(second, 60, lambda: again[0].err + again[1].err)
    assert second()[0] > 5, "it goes on from the checkpoint"
    cancel = pods[2].verb("cancel", run.path)
    assert cancel.ended() == 0 and cancel.out == f"{run.run_id}: CANCELLED\n", cancel.out + cancel.err
    assert [terminal.ended() for terminal in again] == [130, 130], again[0].err + again[1].err
    assert any("the run was cancelled by `pkuslurm cancel` on pod3" in terminal.err for terminal in again)
    assert states(run, "train") == ["CANCELLED"] and not list(run.path.glob("state/meeting*"))


@pytest.mark.faults
def test_node_0_dies(pods: list[Pod]) -> None:
    pair = both(pods, TRAIN, **LONG)
    run, first = killed(pods, pair, "host")
    assert pair[1 - first].ended() == 1, pair[1 - first].err
    assert f"node 0 on {pods[first].name} is gone" in pair[1 - first].err
    assert states(run, "train") == ["FAILED"]
    looked = pods[2].verb("status", run.path, "--json")
    assert looked.ended() == 0 and json.loads(looked.out)["state"] == "FAILED", looked.out


@pytest.mark.faults
def test_node_1s_worker_dies(pods: list[Pod]) -> None:
    pair = both(pods, TRAIN, **LONG)
    run, first = killed(pods, pair, "worker")
    assert [terminal.ended() for terminal in pair] == [1, 1], pair[0].err + pair[1].err
    assert f"node 1 on {pods[1 - first].name}: its worker was ended by signal 9" in pair[first].err
    assert states(run, "train") == ["FAILED"]


@pytest.mark.faults
@pytest.mark.parametrize("who", ["guest", "host", "worker"])
def test_with_the_patience_of_a_real_run_it_ends_within_a_minute(pods: list[Pod], who: str) -> None:
    for pod in pods:
        pod.patience = (10.0, 30.0)
    pair = both(pods, TRAIN, **LONG)
    _, first = killed(pods, pair, who)
    assert pair[1 - first if who == "host" else first].ended(60) == 1


@pytest.mark.faults
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_sixty_seconds_apart(pods: list[Pod], order: tuple[int, int]) -> None:
    job = {"MASTER_ADDR": pods[0].address, "MASTER_PORT": "29412", "WORK_DIR": str(pods[0].shared / "job")}
    found = [pods[order[0]].launch(TRAIN), pods[order[0]].launch(TRAIN, shared=False, RANK=str(order[0]), **job)]
    time.sleep(60)
    found += [pods[order[1]].launch(TRAIN), pods[order[1]].launch(TRAIN, shared=False, RANK=str(order[1]), **job)]
    assert [one.ended(120) for one in found] == [0, 0, 0, 0], [one.err for one in found]
