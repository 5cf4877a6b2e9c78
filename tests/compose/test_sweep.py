"""Sweeps: each point is what it would be alone, the points are Hydra's, and a wrong one is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pkuslurm.compose import compose, compose_sweep, copies, presets
from pkuslurm.compose.expansion import axes_of, points_of
from pkuslurm.errors import PkuslurmError

EXPERIMENT = """\
# @package _global_
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      train.learning_rate: 1e-5,5e-5
      train.seed: choice(1,2)
nodes: 3
"""
LONG = "一行很长的文字 that is folded " * 5
FORMS = (
    "train.learning_rate=1e-5,5e-5",
    "++train.learning_rate=1e-4,1",
    "train.seed=range(1,3)",
    "train.seed=7",
    "train.max_steps=4,null",
    "+train.warmup_steps=1,2",
    "train.lora_target=all,'q_proj,v_proj'",
    "train.report_to=none,[tensorboard]",
    "train.run_name=y,'1e3'",
    "train.run_name='null',${name}",
    "train.deepspeed={a: 1},null",
    "~train.seed",
    "~train.learning_rate",
    "merge.export_size=1,2.5",
    "nodes=1,2",
    "name='a,b',c",
    "name=${train.seed},x",
    f"infer.expect={LONG},清华😀",
    "infer.expect=(a|b),c: d",
    "infer.expect=null,[a,b]",
    "infer.prompts=[你好:),在吗],[c]",
    "infer.prompts=[a,b]",
    "infer.batch_size=choice(1,2)",
    "cluster.env={A: 1},{B: 2}",
    "cluster.env.A=x,true",
    "cluster.env.A=${oc.env:HOME},\\${b}",
    "cluster.setup=[a],[b,c]",
    "cluster.time=1:00:00,90",
    "cluster.nproc_per_node=1,2",
    "cluster.gres=gpu:${nodes},null",
    "cluster.jobs.merge.mem=1G,2G",
    "cluster.jobs={merge: {mem: 3G}},{}",
    "cluster.extra.mail-type=END,FAIL",
    "cluster=ascend",
    "dataset.columns={prompt: q},null",
    "dataset.path=/d.json,/e f.json",
    "model=tiny,qwen3-8b",
    "model.trust_remote_code=true,false",
    "train=lora,full",
    "train.finetuning_type=full,lora",
    "experiment=tutorial10",
    "experiment=null,tutorial10",
    "experiment=mine",
    "resume.hang_minutes=null,3",
    "nodes=1,0",
    "train.seed=3,abc",
)


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    return write(tmp_path / "cwd/conf/experiment/mine.yaml", EXPERIMENT)


def refused(*typed: str) -> str:
    with pytest.raises(PkuslurmError) as refusal:
        compose_sweep(typed)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def overrides_of(*typed: str) -> list[tuple[str, ...]]:
    return [point.overrides for point in compose_sweep(typed).points]


def labels_of(*typed: str) -> list[str]:
    return [point.label for point in compose_sweep(typed).points]


# no shrinking: a composition takes a tenth of a second
@settings(max_examples=15, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(forms=st.lists(st.sampled_from(FORMS), min_size=1, max_size=5), checked=st.randoms(use_true_random=False))
def test_a_point_is_what_it_would_be_alone(forms: list[str], checked: Any, experiment: Path) -> None:
    while len(forms) > 1 and _count(forms) > 4:
        forms = forms[1:]
    alone: dict[tuple[str, ...], Any] = {}

    def alone_of(overrides: tuple[str, ...]) -> Any:
        if overrides not in alone:
            try:
                alone[overrides] = compose(overrides)
            except PkuslurmError as error:
                alone[overrides] = str(error)
        return alone[overrides]

    try:
        sweep = compose_sweep(forms)
    except PkuslurmError as error:
        number, colon, said = str(error).partition("): ")
        if colon and number.startswith("point ") and "all points of a sweep share it" not in said:
            assert alone_of(points_alone(forms)[int(number.split()[1])]) == said
        return
    for point in checked.sample(sweep.points, min(3, len(sweep.points))):
        assert point.composed == alone_of(point.overrides)
        assert repr(point.composed) == repr(alone_of(point.overrides))


@pytest.mark.parametrize(
    "typed",
    [
        ["cluster=ascend", "cluster.nproc_per_node=1,2", "train.seed=1,2"],
        ["train.seed=${nodes},2", "nodes=1,2"],
        ["train=lora,full", "train.learning_rate=1e-5,2", "cluster.env.A=x", "cluster.env={A: 1}"],
    ],
)
def test_what_is_referred_to_follows(typed: list[str]) -> None:
    for point in compose_sweep(typed).points:
        assert repr(point.composed) == repr(compose(point.overrides))


def _count(forms: list[str]) -> int:
    try:
        return len(points_alone(forms))
    except PkuslurmError:
        return 0


def points_alone(typed: Sequence[str]) -> list[tuple[str, ...]]:
    roots = presets.roots()
    axes = axes_of(typed, roots, presets.defaults(roots))
    return [tuple(axis.items[at] for axis, at in zip(axes, point, strict=True)) for point in points_of(axes)]


TEXTS = st.text("abc 你。:#'\"-?!&*%@`{}[],|>\\~0123456789\n", max_size=30).filter(lambda text: text != "???")
LEAVES = st.one_of(
    TEXTS,
    st.text("ab 你", min_size=70, max_size=120),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["y", "no", "1e3", "0x1", "null", "~", "1:00:00", "2024-01-01", "😀", "=", "<<", "é"]),
)
KEYS = st.sampled_from(["a", "b_c", "mail-type", "y", "A1"])
TREES = st.recursive(
    LEAVES | st.lists(LEAVES, max_size=3), lambda inner: st.dictionaries(KEYS, inner, max_size=4), max_leaves=15
).filter(lambda tree: isinstance(tree, dict))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(TREES, st.data())
def test_yaml_in_pieces_is_omegaconfs_byte_for_byte(tree: dict[str, Any], data: st.DataObject) -> None:
    paths = sorted(_paths(tree))
    holes = data.draw(st.lists(st.sampled_from(paths), unique=True, max_size=3)) if paths else []
    holes = [path for path in holes if not any(other != path and path[: len(other)] == other for other in holes)]
    written = []
    for piece in copies._pieces(tree, holes):
        value: Any = tree
        for key in piece if isinstance(piece, tuple) else ():
            value = value[key]
        written.append(piece if isinstance(piece, str) else copies._below(piece[:-1], {piece[-1]: value}))
    assert "".join(written) == (OmegaConf.to_yaml(tree) if tree else "")


def _paths(tree: dict[str, Any], above: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    found = set()
    for key, value in tree.items():
        found.add((*above, key))
        if isinstance(value, dict):
            found |= _paths(value, (*above, key))
    return found


@pytest.mark.parametrize(
    ("typed", "compositions"),
    [
        (["train.seed=range(0,300)"], 1),
        (["train.seed=range(0,150)", "model=qwen3-8b,qwen3-4b", "cluster=slurm"], 2),
        (
            [
                "train=lora,full",
                "train.learning_rate=1e-5,2e-5,3e-5",
                "model=tiny,qwen3-8b",
                "model.template=qwen3,qwen",
            ],
            4,
        ),
        (["train.learning_rate=1e-5,2e-5", "train.lora_rank=4,8", "infer.batch_size=1,2", "name=a,b,c"], 1),
        (["cluster=ascend", "cluster.nproc_per_node=1,2", "train.seed=range(0,50)"], 2),
        (["train.seed=${nodes},2", "train.max_steps=range(1,51)", "nodes=1,2"], 3),
    ],
)
def test_what_differs_in_plain_values_is_composed_once(
    typed: list[str], compositions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten milliseconds a point are the whole of a launch's allowance; a composition takes a hundred."""
    composed = []
    parts = copies.compose_parts
    monkeypatch.setattr(copies, "compose_parts", lambda *given: composed.append(given) or parts(*given))
    compose_sweep(typed)
    assert len(composed) == compositions


def test_families_are_choices_of_groups() -> None:
    sweep = compose_sweep(["model=qwen3-8b,qwen3-4b", "train.seed=1,2", "cluster=slurm"])
    assert [point.family for point in sweep.points] == [0, 0, 1, 1]
    assert sweep.keys == ("model", "train.seed")
    assert sweep.points[1].values == {"model": "qwen3-8b", "train.seed": "2"}
    assert sweep.points[1].overrides == ("model=qwen3-8b", "train.seed=2", "cluster=slurm")


def test_a_sweep_of_one_point_is_one() -> None:
    sweep = compose_sweep(["nodes=2", "infer.prompts=[a,b]", "infer.expect=null"])
    assert (sweep.keys, len(sweep.points), sweep.points[0].values) == ((), 1, {})
    assert sweep.points[0].composed.config.infer.prompts == ["a", "b"]


def test_notes_are_said_once() -> None:
    sweep = compose_sweep(["infer.prompts=[你是谁，你好]", "infer.expect=null", "train.seed=1,2,1"])
    assert sweep.notes == (
        "train.seed=1 is among the values more than once: the same point again",
        "infer.prompts: one text, since ， is part of it; a plain , between the texts makes several",
    )


REFUSED = {
    "cluster=ascend,nvidia": "cluster=ascend,nvidia: a sweep is submitted to one cluster; launch it once for each",
    "cluster.executor=local,slurm": "cluster.executor=local,slurm: a sweep is submitted to one cluster; "
    "launch it once for each",
    "run_root=/a,/b": "run_root=/a,/b: all points of a sweep share it; write one value",
    "dry_run=true,false": "dry_run=true,false: all points of a sweep share it; write one value",
    "cluster.pack=true,false": "cluster.pack=true,false: it says how the whole sweep is run; write one value",
    "sweep.metric=a,b": "sweep.metric=a,b: it says how the whole sweep is run; write one value",
    "from_yaml=a,b": "from_yaml=a,b: all points of a sweep share it; write one value",
    "lr=1e-5,2e-5": "lr: no such key; did you mean train.learning_rate=1e-5,2e-5?",
    "hydra.sweeper.params.x=1,2": "hydra.sweeper.params.x: Hydra's own settings have no use here; leave it out",
    "train.seed=1,": "train.seed=1,: a value is missing beside a comma; write train.seed=1",
    "infer.expect=北大,,清华": "infer.expect=北大,,清华: a value is missing beside a comma; "
    "write infer.expect=北大,清华",
    "train.seed=range(3,1)": "train.seed=range(3,1): it holds no value; range(start,stop,step) ends before stop",
    "train.seed=interval(0,1)": "train.seed=interval(0,1): an interval has no end of values; "
    "write range(start,stop,step)",
    "train.seed=1,range(2,4)": "train.seed=1,range(2,4): these cannot be listed; write each value, or one range()",
    "train.seed=range(0,5,0)": "train.seed=range(0,5,0): these cannot be listed; write each value, or one range()",
    "train.seed=glob(*)": "train.seed=glob(*): glob() names choices of a group; write the values with commas",
    "container=glob(x*)": "container=glob(x*): no choice is named so; there are: apptainer, "
    "charliecloud, docker, enroot, none, podman, pyxis, singularity",
    "train.learning_rate=1e-5，5e-5": "train.learning_rate=1e-5，5e-5: ， separates no values; "
    "write train.learning_rate=1e-5,5e-5",
    "model=tiny，qwen3-8b": "model=tiny，qwen3-8b: ， separates no values; write model=tiny,qwen3-8b",
    "train.seed=range(0,10001)": "-m: 10001 of train.seed make 10001 points; a sweep has at most 10000",
    "dataset=identity,idenity": "point 1 (ds=idenity): dataset=idenity: no such choice; did you mean identity?; "
    "there are: custom, identity",
    "model=tiny,/a/m": "point 1 (model=m): model=/a/m: model takes one of its choices; "
    "for a path, write model.path=/a/m",
    "train.learning_rate=1e-5,2e-5,abc": "point 2 (lr=abc): train.learning_rate=abc: it must be a number",
    "train.learning_rate=1e-5,5e−5": "point 1 (lr=5e_5): train.learning_rate=5e−5: − (U+2212) is no part of a number; "
    "write train.learning_rate=5e-5",
    "train.hub_token=null,abc": "point 1 (hub_token=abc): train.hub_token: a secret does not belong into a "
    "configuration; export HUB_TOKEN in your shell, and write cluster.env.HUB_TOKEN=${oc.env:HUB_TOKEN}",
    "cluster.env.MY_KEY='',abc": "point 1 (MY_KEY=abc): cluster.env.MY_KEY: a secret does not belong into a "
    "configuration; export MY_KEY, and write cluster.env.MY_KEY=${oc.env:MY_KEY}",
    "nodes=1,0": "point 1 (nodes=0): nodes=0: it must be 1 or more",
    "nodes=two": "nodes=two: it must be a whole number",
}


@pytest.mark.parametrize(("typed", "message"), REFUSED.items())
def test_what_cannot_be_swept_is_named(typed: str, message: str) -> None:
    assert refused(typed) == message


def test_the_point_and_the_key_are_named() -> None:
    assert refused("train.seed=1,2", "train.max_steps=3,0") == (
        "point 1 (seed=1,steps=0): train.max_steps=0: it must be 1 or more, or leave it out"
    )


def test_words_of_a_shell_are_seen_before_values() -> None:
    assert "without spaces around the =" in refused("train.seed", "=", "1,2")


def test_experiments_share_what_a_sweep_has_once(tmp_path: Path) -> None:
    for name, text in {"a": "run_root: /a", "b": "run_root: /b", "c": "defaults: [override /cluster: slurm]"}.items():
        write(tmp_path / f"cwd/conf/experiment/{name}.yaml", f"# @package _global_\n{text}\n")
    assert refused("experiment=a,b") == (
        "point 1 (experiment=b): run_root=/b: all points of a sweep share it, and point 0 has /a"
    )
    assert refused("experiment=null,c").startswith("point 1 (experiment=c): cluster=slurm: all points of a sweep share")


def test_an_experiment_is_swept(tmp_path: Path, experiment: Path) -> None:
    write(tmp_path / "cwd/conf/experiment/b.yaml", "# @package _global_\nnodes: 2\n")
    sweep = compose_sweep(["experiment=mine,b,null"])
    assert [point.composed.config.nodes for point in sweep.points] == [3, 2, 1]
    assert sweep.notes == (
        "experiment=mine: its own sweep of train.learning_rate, train.seed is left out, since experiments are swept",
    )


def test_an_experiments_own_sweep_is_below_the_command_line(experiment: Path) -> None:
    sweep = compose_sweep(["experiment=mine", "infer.batch_size=1,2", "train.seed=5"])
    assert sweep.keys == ("train.learning_rate", "infer.batch_size")
    assert sweep.points[0].overrides == (
        *("train.learning_rate=1e-5", "train.seed=5", "experiment=mine", "infer.batch_size=1"),
    )
    assert sweep.notes == ()
    assert len(compose_sweep(["experiment=mine"]).points) == 4
    assert len(compose_sweep(["experiment=mine", "experiment=null"]).points) == 1


def test_an_experiments_own_sweep_is_told_without_m(experiment: Path) -> None:
    composed = compose(["experiment=mine"])
    assert composed.notes == ("experiment=mine: with -m it runs its sweep of train.learning_rate, train.seed",)
    assert composed.config.nodes == 3
    assert compose(["experiment=mine", "train.learning_rate=1", "train.seed=1"]).notes == (
        "train.learning_rate=1 is very large",
    )


def test_a_default_experiment_sweeps_too(tmp_path: Path, experiment: Path) -> None:
    write(tmp_path / "cwd/conf/defaults.yaml", "experiment: mine\n")
    assert len(compose_sweep([]).points) == 4
    assert len(compose_sweep(["experiment=null"]).points) == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            "train.seed: [1, 2]",
            'hydra.sweeper.params.train.seed: values are one text with commas; write train.seed: "1,2"',
        ),
        ("train: {seed: 1}", 'hydra.sweeper.params.train: values are one text with commas; write train.seed: "1,2"'),
        ("lr: 1,2", "lr: no such key; did you mean train.learning_rate=1,2?"),
        ("run_root: a,b", "run_root=a,b: all points of a sweep share it; write one value"),
        ("experiment: a,b", "hydra.sweeper.params.experiment: an experiment is chosen on the command line"),
    ],
)
def test_a_wrong_sweep_of_an_experiment_names_the_file(tmp_path: Path, params: str, message: str) -> None:
    text = f"# @package _global_\nhydra:\n  sweeper:\n    params:\n      {params}\n"
    file = write(tmp_path / "cwd/conf/experiment/mine.yaml", text)
    assert refused("experiment=mine") == f"{message}; it stands in {file}"


def test_hydras_other_settings_in_an_experiment_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "cwd/conf/experiment/mine.yaml", "# @package _global_\nhydra: {run: {dir: x}}\n")
    assert refused("experiment=mine").endswith(
        f"hydra.run.dir: no such key; --cfg job shows all keys; it stands in {file}"
    )


def test_quoted_and_listed_values_are_single_ones() -> None:
    assert overrides_of("infer.expect='a,b',c") == [("infer.expect='a,b'",), ("infer.expect=c",)]
    assert len(overrides_of("infer.expect='a,b'")) == 1
    assert len(overrides_of("infer.prompts=[计算(1,2)的和,b]", "infer.expect=null")) == 1
    assert len(overrides_of("infer.prompts=[计算(1,2)的和],[b]", "infer.expect=a{1,3},^b$")) == 4
    assert len(overrides_of("infer.prompts=['(',你],['a, 你',\"b]\"]", "infer.expect=null")) == 2
    assert len(overrides_of("infer.expect=choice(北大,清华)")) == 2


def test_a_glob_names_choices_but_no_placeholders(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        write(tmp_path / f"cwd/conf/dataset/{name}.yaml", "path: /d.json\n")
    rest = ("infer.prompts=[a]", "infer.expect=null")
    assert [items[0] for items in overrides_of("dataset=glob(*)", *rest)] == [
        *("dataset=identity", "dataset=mine", "dataset=other"),
    ]
    assert labels_of("dataset=glob([m*,o*],exclude=o*)", *rest) == ["point"]
    assert labels_of("dataset=identity,mine", *rest) == ["ds=identity", "ds=mine"]
