"""As typed: what Hydra's grammar refuses arrives unchanged, usual slips get the right word."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st

from pkuslurm.compose import compose, groups, reload
from pkuslurm.compose.quoting import parsed, quoted_where_needed
from pkuslurm.errors import PkuslurmError

CLUSTERS = ", ".join(groups()["cluster"])
ARRIVES: dict[str, Any] = {
    "infer.expect=北大": "北大",
    "infer.expect=(a|b)": "(a|b)",
    "infer.expect=^我.*": "^我.*",
    "infer.expect=a{1}": "a{1}",
    "infer.expect=[0-9]+[a-z]": "[0-9]+[a-z]",
    "infer.expect=a=b": "a=b",
    "infer.expect=100%#1": "100%#1",
    "infer.expect=it's": "it's",
    "infer.expect=“北大”": "“北大”",
    'infer.expect="北大"': "北大",
    "infer.expect='北大'": "北大",
    "infer.expect= 中 ": " 中 ",
    "infer.expect=😀": "😀",
    "infer.expect=北大,清华": "北大,清华",
    "infer.expect=null": None,
    "infer.prompts=[你是谁,Who are you?]": ["你是谁", "Who are you?"],
    "infer.prompts=['a,b',你好,\"c d\"]": ["a,b", "你好", "c d"],
    "infer.prompts=[计算(1,2)的和,'90s music]": ["计算(1,2)的和", "'90s music"],
    "infer.prompts=[你是谁,]": ["你是谁"],
    "infer.prompts=[你好:),在吗]": ["你好:)", "在吗"],
    "infer.prompts=[你是谁，你好]": ["你是谁，你好"],
    "infer.prompts=[你好\\, 世界,b]": ["你好, 世界", "b"],
    "dataset.columns={prompt: 问题, response: a b}": {"prompt": "问题", "response": "a b"},
    "cluster.env={A: 'x, 中', B: 3}": {"A": "x, 中", "B": 3},
    "cluster.constraint='[rack1|rack2]'": "[rack1|rack2]",
    "infer.prompts=[1,2.5]": ["1", "2.5"],
    "infer.prompts=你是谁": "你是谁",
    "dataset.path=/家/my data(1).json": "/家/my data(1).json",
    "dataset.path=$HOME/a": "$HOME/a",
    "dataset.path=a\\": "a\\",
    "dataset.path=中\\": "中\\",
    "dataset.path=~/中/a": "~/中/a",
    "dataset.path= /my data/a.json ": "/my data/a.json",
    "cluster.nodelist=node[01-04]": "node[01-04]",
    "cluster.time=1:00:00": "1:00:00",
    "cluster.time=90": 90,
    "cluster.mem=64G": "64G",
    "cluster.partition=0012": "0012",
    "cluster.partition=64": "64",
    "cluster.env.X=$HOME": "$HOME",
    "cluster.env.X=true": "true",
    "cluster.extra.mail-type=END": "END",
    "cluster.jobs.train.time=2:00:00": "2:00:00",
    "cluster.jobs.train.partition=64": "64",
    "train.max_steps=4": 4,
    "+train.max_steps=4": 4,
    "++train.max_steps=4": 4,
    "merge.export_size=2": 2,
    "+nodes=2": 2,
    "++nodes=2": 2,
    "nodes= 2": 2,
    "dry_run=True": True,
    "name=2024": "2024",
}


def value_of(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def key_of(typed: str) -> str:
    return typed.lstrip("+").partition("=")[0]


@pytest.fixture(scope="module")
def kept() -> str:
    return compose([]).yaml


@pytest.mark.parametrize(("typed", "value"), ARRIVES.items())
def test_it_arrives_as_typed(typed: str, value: Any, kept: str) -> None:
    assert value_of(reload(kept, [typed]).config, key_of(typed)) == value


def test_all_of_it_arrives_through_hydra_too() -> None:
    """Each in one composition or another: no key twice in one."""
    rest = dict(ARRIVES)
    while rest:
        now = {key_of(typed): typed for typed in rest}
        config = compose(list(now.values())).config
        assert {typed: value_of(config, key) for key, typed in now.items() if not key.startswith("cluster.env")} == {
            typed: rest[typed] for key, typed in now.items() if not key.startswith("cluster.env")
        }
        rest = {typed: value for typed, value in rest.items() if typed not in now.values()}


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20))
def test_quoting_gives_back_what_was_typed(value: str) -> None:
    """What Hydra refuses arrives as typed; what it accepts is left alone."""
    quoted = quoted_where_needed(value)
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        if not value.startswith("["):
            assert parsed(quoted).value() == value
    else:
        assert quoted == value


PLAIN = st.text("你是谁abc ?!^$|.*=:#%&;“”、。", min_size=1, max_size=8).map(str.strip).filter(bool)


@settings(max_examples=40, deadline=None)
@given(st.lists(PLAIN, min_size=1, max_size=5))
def test_a_plain_list_gives_back_its_elements(elements: list[str]) -> None:
    def meant(element: str) -> Any:
        override = parsed(f"[{element}]")
        return element if override is None else override.value()[0]

    assert parsed(quoted_where_needed("[" + ",".join(elements) + "]")).value() == [meant(item) for item in elements]


SLIPS = {
    "--nodes=2": "--nodes=2: settings are typed without dashes: nodes=2",
    "--nodes 2": "--nodes 2: settings are typed without dashes: nodes=2",
    "-nodes=2": "-nodes=2: settings are typed without dashes: nodes=2",
    "--dry-run=true": "--dry-run=true: settings are typed without dashes: dry_run=true",
    "--lr=1": "--lr=1: settings are typed without dashes: train.learning_rate=1",
    "--verbose": "--verbose: no such option; --help lists them",
    "nodes = 2": "nodes =: write nodes=2, without spaces around the =",
    "lr = 2": "lr =: write train.learning_rate=2, without spaces around the =",
    "nodes= 2": "nodes= 2: write nodes=2, without spaces around the =",
    "nodes =2": "nodes =2: write nodes=2, without spaces around the =",
    "nodes＝2": "nodes＝2: ＝ and ： are other signs; write nodes=2",
    "nodes：2": "nodes：2: ＝ and ： are other signs; write nodes=2",
    "nodes:2": "nodes:2: write nodes=2, with = for :",
    "nodes": "nodes: a setting is typed as nodes=…, without spaces",
    "node=2": "node: no such key; did you mean nodes=2?",
    "nodez=2": "nodez: no such key; did you mean nodes=2?",
    "lr=1e-4": "lr: no such key; did you mean train.learning_rate=1e-4?",
    "epochs=3": "epochs: no such key; did you mean train.num_train_epochs=3?",
    "batch_size=4": "batch_size: no such key; did you mean train.per_device_train_batch_size=4?",
    "cutoff_len=512": "cutoff_len: no such key; did you mean train.cutoff_len=512?",
    "partition=gpu": "partition: no such key; did you mean cluster.partition=gpu?",
    "prompts=[a]": "prompts: no such key; did you mean infer.prompts=[a]?",
    "template=qwen": "template: no such key; did you mean model.template=qwen?",
    "train.lr=1": "train.lr: LLaMA-Factory has no such key; did you mean train.learning_rate?",
    "trian.learning_rate=1": "trian.learning_rate: no such key; did you mean train.learning_rate=1?",
    "modle.path=x": "modle.path: no such key; did you mean model.path=x?",
    "cluster.partiton=a": "cluster.partiton: no such key; did you mean cluster.partition=a?",
    "cluster.node=2": "cluster.node: no such key; did you mean nodes=2?",
    "modle=tiny": "modle: no such key; did you mean model=tiny?",
    "train.learning_rate=1e-4，nodes=2": "train.learning_rate=1e-4，nodes=2: ， joins no settings; "
    "write train.learning_rate=1e-4 nodes=2",
    "nodes=2，": "nodes=2，: ， (U+FF0C) is no part of a number; write nodes=2",
    "nodes=2,": "nodes=2,: , is no part of a number; write nodes=2",
    "nodes=２": "nodes=２: ２ (U+FF12) is no part of a number; write nodes=2",
    "nodes=1，2": "nodes=1，2: it must be a whole number",
    "train.learning_rate=5e−5": "train.learning_rate=5e−5: − (U+2212) is no part of a number; "
    "write train.learning_rate=5e-5",
    "train.num_train_epochs=3轮": "train.num_train_epochs=3轮: 轮 is no part of a number; "
    "write train.num_train_epochs=3",
    "infer.prompts=［a，b c］": "infer.prompts=［a，b c］: ［ ］ are full-width; write 'infer.prompts=[a,b c]'",
    "--dry-run": "--dry-run: write dry_run=true",
    "--dry_run": "--dry_run: write dry_run=true",
    "--wait": "--wait: write wait=true",
    "--here": "--here: write here=true",
    "train=qlora": "train=qlora: no such choice; write train=lora train.quantization_bit=4",
    "model=/my project/m": "model=/my project/m: model takes one of its choices; "
    "for a path, write 'model.path=/my project/m'",
    "foo=1": "foo: no such key; --cfg job shows all keys",
    "学习率=1": "学习率=1: a setting is typed as key=value, with a key such as nodes or train.learning_rate",
    "cluster=Ascend": "cluster=Ascend: no such choice; did you mean ascend?; launch --help lists all",
    "model=Qwen3-8b": "model=Qwen3-8b: no such choice; did you mean qwen3-8b?; launch --help lists all",
    "cluster=3": f"cluster=3: no such choice; there are: {CLUSTERS}",
    "cluster=": f"cluster=: no such choice; there are: {CLUSTERS}",
    "cluster=ascend,nvidia": "cluster=ascend,nvidia: several values make a sweep, which needs -m",
    "experiment=Tutorial10": "experiment=Tutorial10: no such choice; did you mean tutorial10?; there are: tutorial10",
    "model=/path/to/m": "model=/path/to/m: model takes one of its choices; for a path, write model.path=/path/to/m",
    "model=Qwen/Q": "model=Qwen/Q: model takes one of its choices; for a path, write model.path=Qwen/Q",
    "dataset=/p.json": "dataset=/p.json: dataset takes one of its choices; for a path, write dataset.path=/p.json",
    "pipeline=[prepare]": "pipeline=[prepare]: pipeline takes one of its choices; write pipeline.jobs=[prepare]",
    "cluster={a: 1}": "cluster={a: 1}: it holds keys of its own; set one of them, cluster.key=value",
    "nodes=two": "nodes=two: it must be a whole number",
    "nodes=true": "nodes=true: it must be a whole number",
    "nodes=": "nodes=: it must be a whole number",
    "nodes=1,2": "nodes=1,2: several values make a sweep, which needs -m; it must be a whole number",
    "infer.expect=a,b": "infer.expect=a,b: several values make a sweep, which needs -m; "
    "write [a,b] for a list, \"infer.expect='a,b'\" for one text",
    "dry_run=yes": "dry_run=yes: it must be true or false",
    "model.path=": "model.path=: it is empty; it must be text or null",
    "dataset.path=": "dataset.path=: it is empty; it must be text or null",
    "infer.expect=": "infer.expect=: it is empty; it must be text or a list [a,b] of text or null",
    "cluster.account=2024_01": "cluster.account=2024_01: this is read as the number 202401; "
    "for the text, quote it twice: \"cluster.account='2024_01'\"",
    "~nodes": "~nodes: only single keys of train, merge and cluster.env can be taken away; write nodes=…",
    "~train.nope": "~train.nope: nothing to take away, it is not set",
    "hydra.run.dir=x": "hydra.run.dir: Hydra's own settings have no use here; leave it out",
    "cluster.env.1A=x": "cluster.env.1A: it cannot be a key; each part is letters, digits and _, a letter first",
    "infer.expect=\udcff": "infer.expect=\\udcff: this is not UTF-8; type it in a UTF-8 terminal",
    "run_root=${nope}": "run_root: ${nope} names no key of ours; "
    "a variable of the environment is written ${oc.env:nope}",
    "run_root=${oc.env:NOPE_X}": "run_root=${oc.env:NOPE_X}: the variable NOPE_X is not set; "
    "export NOPE_X, or write ${oc.env:NOPE_X,default}",
    "run_root=${nope": "run_root: ${ begins a reference such as ${oc.env:NAME}, "
    "this one cannot be read; for text write \\${",
}


@pytest.mark.parametrize(("typed", "message"), SLIPS.items())
def test_a_slip_gets_the_right_word(typed: str, message: str) -> None:
    spaced = typed.split(" ") if typed[:5] in ("nodes", "lr = ", "--nod") else [typed]
    with pytest.raises(PkuslurmError) as refusal:
        compose(spaced)
    assert str(refusal.value) == message
    assert "\n" not in message and len(message) <= 300


def test_a_value_that_the_shell_has_split_is_told_to_be_quoted() -> None:
    with pytest.raises(PkuslurmError) as refusal:
        compose(["infer.prompts=[你是谁,Who", "are", "you?]", "nodes=2"])
    assert str(refusal.value) == "are: a value with spaces needs quotes: 'infer.prompts=[你是谁,Who are you?]'"
    with pytest.raises(PkuslurmError) as refusal:
        compose(["model.path=/a/my", "model", "folder/m"])
    assert str(refusal.value) == "model: a value with spaces needs quotes: 'model.path=/a/my model folder/m'"


def test_a_full_width_comma_is_text_and_said() -> None:
    composed = compose(["infer.prompts=[你是谁，你好]", "infer.expect=null"])
    assert composed.config.infer.prompts == ["你是谁，你好"]
    assert composed.notes == (
        "infer.prompts: one text, since ， is part of it; a plain , between the texts makes several",
    )
    assert compose(["infer.prompts=[你好，世界,再见]", "infer.expect=null"]).notes == ()


@pytest.mark.parametrize(
    ("value", "notes"),
    [
        ("1e5", ("train.learning_rate=1e5 is very large: 1e-5 meant?",)),
        ("3", ("train.learning_rate=3 is very large",)),
        ("1e-5", ()),
        ("0.1", ()),
    ],
)
def test_a_learning_rate_that_lost_its_minus_is_said(value: str, notes: tuple[str, ...], kept: str) -> None:
    assert reload(kept, [f"train.learning_rate={value}"]).notes == notes
