"""What nodes that meet compare, and what is printed to be typed on the others."""

from __future__ import annotations

import shlex
import socket
import sys
from pathlib import Path

import pytest

from pkuslurm.compose import compose
from pkuslurm.submit.meet_settings import again, difference, rooted, settings, variables
from pkuslurm.submit.meet_where import Role

SCOW = ("cluster=scow", "cluster.accelerator=cpu", "nodes=2")
JOB = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
YAML = "model_name_or_path: model\ntemplate: qwen\ndataset: rows\noutput_dir: o\nlora_rank: {}\n"


@pytest.fixture
def apps(tmp_path: Path) -> list[Path]:
    """Two applications' own folders: a copy of the data and of the prompts in each."""
    made = [tmp_path / "一 app", tmp_path / "w1"]
    for folder in made:
        folder.mkdir()
        (folder / "rows.json").write_text('[{"instruction": "a", "output": "b"}]', encoding="utf-8")
        (folder / "asked.txt").write_text("who?\n", encoding="utf-8")
    return made


def of(monkeypatch: pytest.MonkeyPatch, folder: Path, *typed: str) -> tuple[str, ...]:
    monkeypatch.chdir(folder)
    composed = compose([*SCOW, *typed])
    return settings(composed.yaml, composed.config)


def test_yamls_are_compared_by_what_they_say(apps: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """`my.yaml` in two folders may be two; by its whole path it is the same."""
    for folder, rank in zip(apps, (64, 8), strict=True):
        (folder / "my.yaml").write_text(YAML.format(rank), encoding="utf-8")
    ours, theirs = (of(monkeypatch, folder, "from_yaml=my.yaml") for folder in apps)
    assert difference(ours, theirs) == "train.lora_rank=64 here, but train.lora_rank=8"
    assert of(monkeypatch, apps[1], f"from_yaml={apps[0]}/my.yaml") == ours
    (apps[0] / "my.yaml").write_text(YAML.format(64) + "learning_rate: 0.005\n", encoding="utf-8")
    words = difference(of(monkeypatch, apps[0], "from_yaml=my.yaml"), ours)
    assert words == "train.learning_rate=0.005 here, but nothing of it", "a shipped default, too, is something said"


def test_paths_are_compared_by_where_they_lead(apps: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ("model=tiny", "dataset.path=rows.json", "infer.prompts=asked.txt", f"cluster.meet={apps[0].parent}")
    ours = of(monkeypatch, apps[0], *typed)
    own = ("cluster.join_timeout=5", "cluster.python=/some/python", "wait=true")
    assert of(monkeypatch, apps[1], *typed[:3], "cluster.meet=..", *own) == ours, "copies of what node 0 alone reads"
    (apps[1] / "rows.json").write_text('[{"instruction": "c", "output": "d"}]', encoding="utf-8")
    words = difference(ours, of(monkeypatch, apps[1], *typed))
    assert words is not None and words.count("dataset.path=rows.json (content ") == 2
    for folder in apps:  # a model is read on every node, where node 0 says
        (folder / "模型").mkdir()
    words = difference(*(of(monkeypatch, folder, "model.path=模型") for folder in apps))
    assert words == f"model.path={apps[0]}/模型 here, but model.path={apps[1]}/模型"
    assert of(monkeypatch, apps[0], f"model.path={apps[1]}/模型") == of(monkeypatch, apps[1], "model.path=模型")


def test_of_many_differences_the_first_are_told() -> None:
    ours, theirs = [f"k{n}=1" for n in range(5)], [f"k{n}=2" for n in range(5)]
    assert difference(ours, theirs) == "k0=1 k1=1 k2=1 here, but k0=2 k1=2 k2=2 (and 2 more that differ)"
    assert difference(ours, list(reversed(ours))) is None


def test_what_is_to_be_typed_means_the_same_in_any_folder(apps: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(apps[0])
    (apps[0] / "模型").mkdir()
    typed = ["nodes=2", "cluster.meet=.", "model.path='模型'", "dataset.path=rows.json", "--config-dir=.", "name=模型"]
    typed += ["model.path=Qwen/Qwen3-0.6B", "run_root=${oc.env:X}/runs", "run_root=runs", "infer.prompts=[who?]"]
    expected = ["nodes=2", f"cluster.meet={apps[0]}", f"model.path={apps[0]}/模型", f"dataset.path={apps[0]}/rows.json"]
    expected += [f"--config-dir={apps[0]}", "name=模型", "model.path=Qwen/Qwen3-0.6B", "run_root=${oc.env:X}/runs"]
    expected += [f"run_root={apps[0]}/runs", "infer.prompts=[who?]"]
    assert rooted(typed) == expected
    line = again(typed[:2], variables={"RANK": "1", "MASTER_ADDR": "a b"})
    wanted = ["env", "RANK=1", "MASTER_ADDR=a b", sys.executable, "-m", "pkuslurm.launch", *expected[:2]]
    assert shlex.split(line) == wanted


@pytest.mark.parametrize(
    ("own", "nodes", "environ", "expected"),
    [
        (Role(), 2, JOB, {}),
        (Role(0), 2, {"NODE_RANK": "0"}, {"NODE_RANK": "1"}),
        (Role(1), 2, {"NODE_RANK": "1"}, {"NODE_RANK": "0"}),
        (Role(0), 2, JOB | {"RANK": "0"}, {"RANK": "1"} | JOB),
        (
            Role(0, "localhost", 23456),
            2,
            JOB | {"NODE_RANK": "0", "MASTER_ADDR": "localhost"},
            JOB | {"NODE_RANK": "1", "MASTER_ADDR": socket.gethostname()},
        ),
        (Role(0), 3, {"NODE_RANK": "0"}, {"NODE_RANK": "1_TO_2"}),
        (Role(0), 2, JOB | {"RANK": "0", "WORLD_SIZE": "2"}, None),
    ],
)
def test_what_another_node_needs_in_its_environment(
    own: Role, nodes: int, environ: dict[str, str], expected: dict[str, str] | None
) -> None:
    assert variables(own, nodes, environ) == expected
    if expected is not None:
        assert variables(own, nodes, environ, "/r") == expected | {"PKUSLURM_RUN_ROOT": "/r"}
