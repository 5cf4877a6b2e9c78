"""What is said before a run with a container starts, and what its job files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.compose import compose
from pkuslurm.errors import PkuslurmError
from pkuslurm.launch import main
from pkuslurm.preflight import resolve as resolving

ASCEND = ["cluster=ascend", "model=tiny", "nodes=2"]


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WORK_DIR", raising=False)
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "scancel"):  # there, and without an answer
        (commands / name).write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands))


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err.removeprefix("pkuslurm: ").rstrip("\n")


def dry(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*words, "dry_run=true"]) == 0
    return capsys.readouterr().out


def jobs(text: str) -> dict[str, Any]:
    parts = text.split("# file jobs/")[1:]
    return {part.split(".json\n")[0]: json.loads(part.split(".json\n", 1)[1].split("\n# file")[0]) for part in parts}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["container.image=x.sif"], "container.image=x.sif: nothing runs it; write container=apptainer (or "),
        (["container=pyxis", "container.image=x"], "container.runtime=pyxis: it is a part of Slurm's srun; choose a"),
        (["container=charliecloud", "container.image=/x.sqfs"], "container.image=/x.sqfs: there is no such file"),
        (["container=podman", "container.image=x"], "container.runtime=podman: podman is not installed here"),
        (
            [*ASCEND, "container=apptainer", "container.image=host.cn/llm:1"],
            "container.image=host.cn/llm:1: this is a name in a registry, and apptainer runs files; "
            "write docker://host.cn/llm:1 to have it fetched; without a registry: elsewhere `docker save -o image.tar "
            "NAME`, here `apptainer build image.sif docker-archive://image.tar`",
        ),
        (
            [*ASCEND, "container=enroot", "container.image=/no/a.sqsh"],
            "container.image=/no/a.sqsh: there is no such file; without a registry: elsewhere `enroot import -o "
            "image.sqsh dockerd://NAME` (docs/containers.md)",
        ),
        (
            [*ASCEND, "container=docker", "container.image=llm:1", "run_root=/tmp/a:b"],
            "container.runtime=docker: it splits paths at ':', and /tmp/a:b has one; give a path without it, or",
        ),
    ],
)
def test_refusals(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(words, capsys).startswith(says)


def test_what_may_be_on_the_nodes_only_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "a.sif"
    image.touch()
    text = dry([*ASCEND, "container=apptainer", f"container.image={image}"], capsys)
    assert "# note: container: apptainer is not on this machine; the nodes must have it (cluster.setup may load" in text
    missing = dry([*ASCEND, "container=apptainer", "container.image=/no/a.sif"], capsys)
    assert "# note: container.image=/no/a.sif: there is no such file" in missing


def test_what_the_job_files_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The image's python3, every path of the run, devices for the jobs that compute, the report outside."""
    data, model = tmp_path / "数据 集" / "a.jsonl", tmp_path / "model"
    data.parent.mkdir()
    data.write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    words = ["cluster=ascend", "container=docker", "container.image=llm:1", f"model.path={model}"]
    words += [f"dataset.path='{data}'", f"run_root={tmp_path}/runs", f"cache_root={tmp_path}/cache"]
    text = dry([*words, "container.llamafactory=0.9.4"], capsys)
    found = jobs(text)
    train = found["train"]["container"]
    mounts = [f"{tmp_path}/runs", f"{tmp_path}/cache", str(model), str(data.parent)]
    assert train["mounts"][:4] == mounts and train["mounts"][4].endswith("/pkuslurm")
    assert train["image"] == "llm:1" and train["runtime"] == "docker" and train["accelerator"] == "npu"
    assert "/dev/davinci[0-9]*" in train["if_there"] and "/etc/hccn.conf" in train["if_there"]
    assert train["home"] == f"{tmp_path}/cache/home"
    assert found["prepare"]["container"]["if_there"] == [] and found["report"]["container"] is None
    assert found["train"]["command"][:2] == ["python3", "-m"] and found["merge"]["command"][0] == "python3"
    shown = text.split("# job train")[1].split("# ")[0].splitlines()
    assert any(line.startswith("docker run --rm --name ") and "$NODE_RANK" in line for line in shown)
    own = jobs(dry([*words, "cluster.python=/opt/llm/bin/python", "cluster.env.HOME=/scratch/me"], capsys))["train"]
    assert own["command"][0] == "/opt/llm/bin/python" and own["container"]["home"] == "/scratch/me"


def test_the_login_node_needs_no_llamafactory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "a.sif"
    image.touch()
    monkeypatch.setattr(resolving.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    words = ["cluster=slurm", "model=tiny", f"run_root={tmp_path}/runs", f"cache_root={tmp_path}/cache"]
    bare = compose(words, []).config
    with pytest.raises(PkuslurmError, match="has no LLaMA-Factory"):
        resolving.check_machine(bare, resolving.resolve(bare, {}, lenient=True))
    inside = [*words, "container=apptainer", f"container.image={image}", "cluster.python=/only/inside/python"]
    config = compose(inside, []).config
    resolving.check_machine(config, resolving.resolve(config, {}, lenient=False))


def test_without_a_container_the_job_files_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert {job["container"] for job in jobs(dry(ASCEND, capsys)).values()} == {None}
