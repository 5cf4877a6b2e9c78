"""What the nodes of doctor's job found becomes lines with remedies; a node that says nothing is told of, too."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.compose import compose
from pkuslurm.doctor.verdict import Found, judge
from pkuslurm.plan.inputs import Inputs
from pkuslurm.plan.plan import plan
from pkuslurm.render.render import render
from pkuslurm.rundir import RunDir, write_json
from pkuslurm.worker import network, trial
from pkuslurm.worker.rendezvous import Rendezvous

SPEC = {"nodes": 2, "folder": "/shared/doctor-1"}
PACKAGES = {"llamafactory": "0.9.5", "torch": "2.11.0"}


def report(host: str, rank: int, **other: Any) -> dict[str, Any]:
    return {
        "host": host,
        "rank": rank,
        "python": {"ok": True, "detail": "3.11.7 /python (aarch64)", "packages": PACKAGES},
        "devices": {"ok": True, "detail": "2 npu compute"},
        "folder": {"ok": True, "detail": "/shared/doctor-1"},
        "meeting": {"ok": True, "detail": "met"},
    } | other


def bad(
    seen: dict[int, Any], heard: dict[int, Any] | None = None, words: str = "", state: str = "COMPLETED"
) -> list[str]:
    """Names of what is not right; each of these has a remedy."""
    found = judge(Found(seen, heard or {}, ["n1", "n2"], SPEC, words, state))
    assert all(check.remedy and check.needed for check in found if not check.ok), found
    return [check.check for check in found if not check.ok]


def test_all_is_well() -> None:
    both = {0: report("n1", 0), 1: report("n2", 1)}
    assert bad(both, {1: report("n2", 1)}) == []
    names = [check.check for check in judge(Found(both, {}, ["n1", "n2"], SPEC))]
    node = ["folder", "python", "LLaMA-Factory", "devices"]
    assert names == [*(f"n1 {one}" for one in node), *(f"n2 {one}" for one in node), "versions", "rendezvous"]


def test_each_thing_that_can_be_wrong_is_named() -> None:
    good = report("n1", 0)
    broken = {"ok": False, "detail": "/nosuch: No such file or directory"}
    assert bad({0: good, 1: report("n2", 1, python=broken)}) == ["n2 python"]
    without = {"ok": True, "detail": "3.11", "packages": {"torch": "2.11.0"}}
    assert bad({0: good, 1: report("n2", 1, python=without)}) == ["n2 LLaMA-Factory", "versions"]
    other = {"ok": True, "detail": "3.11", "packages": PACKAGES | {"torch": "2.7.1"}}
    assert bad({0: good, 1: report("n2", 1, python=other)}) == ["versions"]
    hangs = {"ok": False, "detail": "node n2: npu device 3 hangs"}
    assert bad({0: good, 1: report("n2", 1, devices=hangs)}) == ["n2 devices"]
    assert bad({0: good, 1: report("n2", 1, python=None)}) == ["n2 python"], "it was ended before"
    lost = {"ok": False, "detail": "10.0.0.1:10000: timed out"}
    assert bad({0: report("n1", 0, meeting=lost), 1: report("n2", 1, meeting=lost)}) == ["rendezvous"]


def test_a_node_that_sees_no_folder_is_heard_by_network() -> None:
    blind = report("n2", 1, folder={"ok": False, "detail": "/shared/doctor-1: it is not there"}, meeting=None)
    assert bad({0: report("n1", 0)}, {1: blind}) == ["n2 folder"]
    assert bad({0: report("n1", 0)}, {1: report("n2", 1, meeting=None)}) == ["n2 folder"], "its file is not seen here"


@pytest.mark.parametrize(
    ("seen", "words", "state", "names", "told"),
    [
        ({}, "", "FAILED", ["n1", "n2"], "neither seen nor written there (the job is FAILED"),
        ({}, "pkuslurm: cluster.setup failed: false", "FAILED", ["n1", "n2"], "cluster.setup failed: false"),
        (
            {0: report("n1", 0)},
            "srun: error: task 1 launch failed: Slurmd could not connect IO\nsrun: x",
            "CANCELLED",
            ["n2"],
            "/shared/doctor-1: not seen there (srun: error: task 1 launch failed: Slurmd could not connect IO)",
        ),
        ({0: report("n1", 0)}, "slurmstepd: error: execve(): /venv/bin/python", "FAILED", ["n2"], "execve()"),
    ],
)
def test_who_does_not_report(seen: dict[int, Any], words: str, state: str, names: list[str], told: str) -> None:
    assert bad(seen, {}, words, state) == names
    assert any(told in check.detail for check in judge(Found(seen, {}, ["n1", "n2"], SPEC, words, state)))


def test_two_nodes_meet_and_node_0_hears_the_other() -> None:
    port = network.free_port(4711)
    first, second = (Rendezvous(rank, 2, "127.0.0.1", port, "test") for rank in (0, 1))
    told: list[Any] = []
    listening = threading.Thread(target=lambda: told.append(trial.meet(first, "t", {"rank": 0})))
    listening.start()
    went, _ = trial.meet(second, "t", {"rank": 1, "host": "北大"})
    listening.join(30)
    (came, heard) = told[0]
    assert went["ok"] and came["ok"] and heard == [{"rank": 1, "host": "北大"}]


def test_nobody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MEET_SECONDS", 0.3)
    port = network.free_port(4712)
    came, heard = trial.meet(Rendezvous(0, 2, "127.0.0.1", port, "test"), "t", {})
    assert not came["ok"] and heard == [] and "0 of 1" in came["detail"]
    went, _ = trial.meet(Rendezvous(1, 2, "127.0.0.1", port, "test"), "t", {})
    assert not went["ok"] and f"127.0.0.1:{port}" in went["detail"]


def of_one(run: Path, python: str, **changes: Any) -> dict[str, Any]:
    """The job file of a training on one node, and what doctor tells that node."""
    config = compose(["cluster=ascend", "model=tiny", "pipeline=train", "cluster.env.A=2.7.1"])
    config = replace(config.config, run_root=str(run.parent), **changes)
    inputs = Inputs("/m", "default", "a", {"a": {}}, "/a.json", "alpaca", (), None, None, python)
    job = render(plan(config), inputs, RunDir(run), "", sys.executable).jobs["train"]
    write_json(RunDir(run).job("train"), job)
    (run / trial.LOGIN).write_text("t", encoding="utf-8")
    return {"nodes": 1, "folder": str(run), "token": "t"}


def ended(run: Path, spec: dict[str, Any], **environ: str) -> dict[str, Any]:
    assert trial.main([json.dumps(spec)], {"SLURM_PROCID": "0", "SLURMD_NODENAME": "n1", "PATH": "/bin"} | environ) == 0
    found: dict[str, Any] = json.loads((run / "node.0.json").read_text(encoding="utf-8"))
    return found


def fake(file: Path, *lines: str) -> str:
    file.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
    file.chmod(0o755)
    return str(file)


def test_one_node_by_itself(weird: Path) -> None:
    run = weird / "doctor-1"
    found = ended(run, of_one(run, "/nosuch/python"))
    assert found["folder"]["ok"] and found["meeting"]["ok"] and found["host"] == "n1" and "devices" not in found
    assert "/nosuch/python" in found["python"]["detail"] and "No such file" in found["python"]["detail"]
    assert not found["python"]["ok"]


def test_a_python_is_asked_with_the_trainings_variables(tmp_path: Path) -> None:
    run = tmp_path / "doctor-1"
    said = """echo "pkuslurm-probe {\\"versions\\": {\\"python\\": \\"3.11.0\\", \\"torch\\": \\"$A\\"}}\""""
    found = ended(run, of_one(run, fake(tmp_path / "python", "echo noise", said)), ASCEND_RT_VISIBLE_DEVICES="0,1")
    assert found["python"]["ok"] and found["python"]["packages"] == {"torch": "2.7.1"}
    assert found["python"]["detail"].startswith(f"3.11.0 {tmp_path}/python (")
    assert not found["devices"]["ok"] and "node n1" in found["devices"]["detail"], "it does not say that they compute"
    found = ended(run, of_one(run, fake(tmp_path / "python", "exit 127")))
    assert found["python"]["detail"] == f"{tmp_path}/python: it is no Python that answers"


def test_devices_that_compute(tmp_path: Path) -> None:
    run = tmp_path / "doctor-1"
    lines = [
        """echo 'pkuslurm-probe {"versions": {"python": "3.11.0", "llamafactory": "0.9.4"}}'""",
        """[ "$2" = npu ] && echo 'pkuslurm-probe {"count": 2}' && echo 'pkuslurm-probe {"done": 2}'; exit 0""",
    ]
    found = ended(run, of_one(run, fake(tmp_path / "python", *lines)), ASCEND_RT_VISIBLE_DEVICES="4,5")
    assert found["devices"] == {"ok": True, "detail": "2 npu compute (ASCEND_RT_VISIBLE_DEVICES=4,5)"}
    found = ended(run, of_one(run, fake(tmp_path / "python", *lines)), ASCEND_RT_VISIBLE_DEVICES="4")
    assert not found["devices"]["ok"] and found["python"]["ok"]


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "FOLDER_SECONDS", 0.0)
    spec = {"nodes": 1, "folder": str(tmp_path / "not" / "here"), "token": "t"}
    assert trial.main([json.dumps(spec)], {"SLURM_PROCID": "0"}) == 0
    assert list(tmp_path.iterdir()) == [] and "it is not there" in trial.folder(spec)["detail"]


def test_the_images_python_is_asked(tmp_path: Path) -> None:
    """By a stand-in for the runtime, which starts what comes after the image's name."""
    run, image, programs = tmp_path / "doctor-1", tmp_path / "a b.sif", tmp_path / "bin"
    image.touch()
    programs.mkdir()
    fake(programs / "python3", """echo 'pkuslurm-probe {"versions": {"python": "3.10.1"}}'""")
    fake(programs / "apptainer", 'while [ "$1" != python3 ]; do shift; done', 'exec "$@"')
    container = replace(compose([]).config.container, runtime="apptainer", image=str(image))
    spec, path = of_one(run, "python3", container=container), f"{programs}:/usr/bin:/bin"
    found = ended(run, spec, PATH=path)
    assert found["python"]["ok"] and f"3.10.1 python3 in {image} (" in found["python"]["detail"], found
    image.unlink()
    assert "this node has no such file" in ended(run, spec, PATH=path)["python"]["detail"]
    assert "apptainer is not on this node" in ended(run, spec, PATH=str(tmp_path))["python"]["detail"]
