"""Presets of one's own: found where people keep them, before ours, and blamed by their file's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkuslurm.compose import compose, groups
from pkuslurm.compose.presets import roots
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import CONF


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def refused(overrides: list[str]) -> str:
    with pytest.raises(PkuslurmError) as refusal:
        compose(overrides)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_the_first_folder_that_has_a_preset_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, user, group = tmp_path / "给 conf", tmp_path / "home/.config/pkuslurm/conf", tmp_path / "group"
    here = tmp_path / "cwd" / "conf"
    monkeypatch.setenv("PKUSLURM_CONF", str(group))
    expected = "slurm"
    for name, folder in (("group", group), ("user", user), ("here", here)):
        write(folder / "cluster" / "slurm.yaml", f"executor: slurm\npartition: {name}\n")
        composed = compose(["cluster=slurm"])
        assert composed.config.cluster.partition == name
        assert composed.choices["cluster"] == expected
    write(given / "cluster" / "slurm.yaml", "executor: slurm\npartition: given\n")
    assert compose(["cluster=slurm"], [given]).config.cluster.partition == "given"
    assert roots([given]) == (given, here, user, group, CONF)


def test_our_own_checkout_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONF.parent)
    assert roots() == (CONF,)
    other = tmp_path / "another checkout"
    write(other / "conf" / "config.yaml", "nodes: 7\n")
    write(other / "pkuslurm" / "__init__.py", "")
    monkeypatch.chdir(other)
    assert roots() == (CONF,)


def test_another_programs_config_yaml_is_not_ours(tmp_path: Path) -> None:
    write(tmp_path / "cwd" / "conf" / "config.yaml", "defaults: [db: mysql]\nlearning: true\n")
    assert compose([]).config.nodes == 1


def test_ones_own_choices_are_named(tmp_path: Path) -> None:
    write(tmp_path / "cwd/conf/cluster/zhongguancun.yaml", "executor: slurm\n")
    assert "zhongguancun" in groups()["cluster"]
    assert refused(["cluster=zhongguancum"]) == (
        "cluster=zhongguancum: no such choice; did you mean zhongguancun?; launch --help lists all"
    )


def test_a_missing_folder_of_the_group_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PKUSLURM_CONF", "/no/such")
    assert refused([]) == "PKUSLURM_CONF=/no/such: there is no such folder; mend the variable, or unset it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("executor: slurm\npartition: [a\n", ":3: not YAML ("),
        ("executor: slurm\nqos: a\nqos: b\n", ":3: not YAML (found duplicate key qos)"),
        (
            "executor: slurm\ntime: 1:00:00\n",
            ":2: 1:00:00: YAML reads another number here; write it in quotes: '1:00:00'",
        ),
        ("executor: slurm\npartition: 0012\n", ":2: 0012: YAML reads another number here; write it in quotes: '0012'"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "cwd/conf/cluster/mine.yaml", text)
    assert refused(["cluster=mine"]).startswith(f"{file}{message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("executor: slurm\npartitoin: a\n", "cluster.partitoin: no such key; did you mean cluster.partition?"),
        ("executor: slurm\ntime: 1h\n", "cluster.time=1h: it must be one of Slurm's forms"),
        ("executor: slrum\n", "cluster.executor=slrum: it must be local or slurm or meet"),
        ("# @package _global_\ntrain: {lerning_rate: 1}\n", "train.lerning_rate: LLaMA-Factory has no such key"),
        ("gres: ${oc.env:NOPE_X}\n", "cluster.gres=${oc.env:NOPE_X}: the variable NOPE_X is not set"),
        ("env: {HF_TOKEN: abc}\n", "cluster.env.HF_TOKEN: a secret does not belong into a configuration"),
    ],
)
def test_a_wrong_value_names_the_file_that_it_stands_in(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "cwd/conf/cluster/mine.yaml", text)
    said = refused(["cluster=mine"])
    assert said.startswith(message)
    assert said.endswith(f"; it stands in {file}")


def test_a_file_that_holds_no_keys_is_said(tmp_path: Path) -> None:
    file = write(tmp_path / "cwd/conf/cluster/mine.yaml", "- a\n")
    assert str(file) in refused(["cluster=mine"])
    write(file, "")
    assert compose(["cluster=mine"]).choices["cluster"] == "mine"


def test_quoted_times_and_leading_zeros_arrive(tmp_path: Path) -> None:
    write(tmp_path / "cwd/conf/cluster/mine.yaml", "executor: slurm\ntime: '1:00:00'\npartition: \"0012\"\n")
    cluster = compose(["cluster=mine"]).config.cluster
    assert (cluster.time, cluster.partition) == ("1:00:00", "0012")


def test_a_preset_can_extend_ours(tmp_path: Path) -> None:
    file = write(tmp_path / "cwd/conf/cluster/mine.yaml", "defaults: [ascend, _self_]\npartition: npu\n")
    composed = compose(["cluster=mine"])
    assert (composed.config.cluster.gres, composed.config.cluster.partition) == ("npu:2", "npu")
    origins = {item.key: item.origin for item in composed.settings}
    assert origins["cluster.partition"] == str(file)
    assert origins["cluster.gres"] == "cluster=mine"


def test_an_experiment_of_ones_own(tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - override /cluster: ascend\nnodes: 3\ntrain: {max_steps: 5}\n"
    file = write(tmp_path / "cwd/conf/experiment/mine.yaml", text)
    composed = compose(["experiment=mine", "train.max_steps=6"])
    assert (composed.config.nodes, composed.choices["cluster"]) == (3, "ascend")
    origins = {item.key: item.origin for item in composed.settings}
    assert origins["nodes"] == str(file)
    assert origins["train.max_steps"] == "command line"


def test_defaults_yaml_is_below_the_command_line_and_above_ours(tmp_path: Path) -> None:
    text = "cluster: ascend\nmodel: tiny\nrun_root: /data/me/runs\ncluster.partition: npu\ntrain: {seed: 7}\n"
    file = write(tmp_path / "cwd/conf/defaults.yaml", text)
    composed = compose(["train.seed=8"])
    config = composed.config
    assert (composed.choices["cluster"], composed.choices["model"]) == ("ascend", "tiny")
    assert (config.run_root, config.cluster.partition, config.train["seed"]) == ("/data/me/runs", "npu", 8)
    origins = {item.key: item.origin for item in composed.settings}
    assert origins["run_root"] == origins["cluster.partition"] == str(file)
    assert compose(["cluster=local"]).choices["cluster"] == "local"
    assert compose(["run_root=/x"]).config.run_root == "/x"


def test_an_experiment_wins_over_defaults_yaml(tmp_path: Path) -> None:
    write(tmp_path / "cwd/conf/defaults.yaml", "nodes: 5\nexperiment: tutorial10\ntrain.cutoff_len: 99\n")
    config = compose([]).config
    assert (config.nodes, config.train["cutoff_len"]) == (2, 1024)
    assert compose(["experiment=null"]).config.nodes == 5


def test_the_first_defaults_yaml_has_the_word_on_a_key(tmp_path: Path) -> None:
    write(tmp_path / "cwd/conf/defaults.yaml", "nodes: 2\n")
    write(tmp_path / "home/.config/pkuslurm/conf/defaults.yaml", "nodes: 3\nname: users\ncluster: slurm\n")
    composed = compose([])
    assert (composed.config.nodes, composed.config.name, composed.choices["cluster"]) == (2, "users", "slurm")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodez: 2\n", "nodez: no such key; did you mean nodes?; it stands in {file}"),
        ("nodes: two\n", "nodes=two: it must be a whole number; it stands in {file}"),
        ("cluster: ascent\n", "cluster=ascent: no such choice; did you mean ascend?; launch --help lists all"),
        (
            "cluster.partitoin: a\n",
            "cluster.partitoin: no such key; did you mean cluster.partition?; it stands in {file}",
        ),
        ("a: [\n", "{file}:2: not YAML ("),
        ("cluster：ascend\n", "{file}:1: write `cluster: ascend` (a plain colon and a space)"),
        ("nodes: 2\ncluster:ascend\n", "{file}:2: write `cluster: ascend` (a plain colon and a space)"),
        ("cluster= ascend\nnodes: 2\n", "{file}:1: write `cluster: ascend` (a plain colon and a space)"),
        (
            "cluster: ascend\ncluster:\n  partition: npu\n",
            "{file}: cluster is there twice; write `cluster.partition: npu` beside `cluster: ascend`",
        ),
    ],
)
def test_a_wrong_defaults_yaml_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "cwd/conf/defaults.yaml", text)
    said = refused([])
    assert said.startswith(message.replace("{file}", str(file)))
    assert str(file) in said
