"""doctor cluster=NAME and doctor --preset NAME on a real Slurm: what is well, what is broken, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.fixture import Cluster
from tests.cluster.process import running
from tests.cluster.runs import Done, queued, verb

NAME = ("cluster=ascend", "cluster.accelerator=cpu")
USER = "pkbob"


@pytest.fixture
def runs(slurm: Cluster) -> Iterator[Path]:
    """A run_root that is there, in which nothing is left; nor is anything in the queue, nor does anything run."""
    root = slurm.shared(USER) / "doctor 北大"
    slurm.run(USER, ["mkdir", "-p", str(root)])
    yield root
    assert list(root.iterdir()) == []
    assert [name for name in queued(slurm, USER) if name.startswith("doctor-")] == []
    assert [line for line in slurm.processes(USER) if "worker.trial" in line] == []


def doctor(slurm: Cluster, root: Path, *words: str) -> Done:
    return verb(slurm, "doctor", *NAME, f"run_root='{root}'", f"cluster.python={slurm.python}", *words, user=USER)


def checks(done: Done) -> dict[str, dict[str, Any]]:
    return {check["check"]: check for check in json.loads(done.stdout)}


@contextmanager
def hidden(slurm: Cluster, folder: Path, node: str) -> Iterator[None]:
    """The folder is empty, and nobody's to write, on this node."""
    enter = ["nsenter", "-t", str(running(slurm.layout.pid(node))), "-m"]
    slurm.ask(*enter, "mount", "-t", "tmpfs", "-o", "mode=755", "none", str(folder))
    try:
        yield
    finally:
        slurm.ask(*enter, "umount", str(folder))


def test_two_nodes_are_proved(slurm: Cluster, runs: Path) -> None:
    done = doctor(slurm, runs, "--json")
    found = checks(done)
    nodes = [name.partition(" ")[0] for name in found if name.endswith(" folder")]
    assert len(set(nodes)) == 2 and "gres=npu:2" in found["submission"]["detail"], found
    bad = {name for name, check in found.items() if not check["ok"]}
    assert bad <= {f"{node} LLaMA-Factory" for node in nodes} and done.returncode == bool(bad), found
    assert f"{nodes[1]} from 10." in found["rendezvous"]["detail"] and "(eth0)" in found["rendezvous"]["detail"]


def test_one_node_and_a_broken_python(slurm: Cluster, runs: Path) -> None:
    found = checks(doctor(slurm, runs, "nodes=1", "cluster.python=/nosuch/python", "--json"))
    node = next((name.partition(" ")[0] for name in found if name.endswith(" folder")), "")
    assert node, found
    python = found[f"{node} python"]
    assert not python["ok"] and "/nosuch/python" in python["detail"] and "cluster.python=" in python["remedy"]
    assert found[f"{node} folder"]["ok"] and "rendezvous" not in found


def test_nodes_that_do_not_see_the_folder(slurm: Cluster, runs: Path) -> None:
    first, second = slurm.nodes[:2]
    both = f"cluster.nodelist='{first},{second}'"
    with hidden(slurm, runs, second):
        found = checks(doctor(slurm, runs, both, "--json"))
        assert not found[second]["ok"] and "not seen there" in found[second]["detail"], found
        # srun ends the first one as soon as the second cannot open its log: it may not have told by then
        assert found.get(f"{first} folder", {"ok": True})["ok"] and "run_root=" in found[second]["remedy"]
    with hidden(slurm, runs, first):
        done = doctor(slurm, runs, both)
        assert done.returncode == 1 and f"not right: {first}, {second}" in done.stdout, done
        assert "neither seen nor written there" in done.stdout


def test_refused_too_late_or_interrupted_it_leaves_nothing(slurm: Cluster, runs: Path) -> None:
    refused = doctor(slurm, runs, "cluster.account=nosuch")
    assert refused.returncode == 1 and "cluster.account can be: lab, pku" in refused.stdout, refused
    late = doctor(slurm, runs, "cluster.extra.begin=now+1hour", "--wait", "0.02")
    assert late.returncode == 1 and "did not start within 0.02 minutes and was cancelled: BeginTime" in late.stdout
    words = [*NAME, f"run_root='{runs}'", "cluster.extra.begin=now+1hour"]
    process = slurm.start(USER, [str(slurm.python), "-m", "pkuslurm", "doctor", *words])
    deadline = time.monotonic() + 30
    while not any(name.startswith("doctor-") for name in queued(slurm, USER)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err, err


def test_what_cannot_be_had_is_not_submitted(slurm: Cluster, runs: Path) -> None:
    refused = {
        ("doctor", "cluster=nvidia"): "cluster.gres=gpu:1: no node of partition npu has gpu:1; they have npu:2",
        ("launch", "cluster=slurm", "cluster.accelerator=npu"): "asks for no device, so Slurm gives it none",
    }
    for words, message in refused.items():
        done = verb(slurm, *words, "model=tiny", f"run_root='{runs}'", f"cluster.python={slurm.python}", user=USER)
        assert done.returncode == 2 and message in done.stderr, done


def test_a_preset_of_this_cluster_is_written_and_proved(slurm: Cluster, runs: Path) -> None:
    folder = slurm.shared(USER) / "presets"
    file = folder / "cluster" / "mine.yaml"
    slurm.run(USER, ["rm", "-rf", str(folder)])
    done = verb(slurm, "doctor", "--preset", "mine", "--config-dir", folder, user=USER)
    assert done.returncode == 0 and done.stdout == f"{file}\n", done
    text = file.read_text(encoding="utf-8")
    for line in ("accelerator: npu ", "partition: npu ", "gres: npu:${cluster.nproc_per_node} ", "account: pku "):
        assert f"\n{line}" in text, text
    words = ("cluster=mine", "cluster.accelerator=cpu", f"run_root='{runs}'", f"cluster.python={slurm.python}")
    found = checks(verb(slurm, "doctor", *words, "--config-dir", folder, "--json", user=USER))
    assert "partition=npu, account=pku, mem=14400M, cpus_per_task=8" in found["submission"]["detail"]
    assert found["start"]["ok"] and found["rendezvous"]["ok"], found
