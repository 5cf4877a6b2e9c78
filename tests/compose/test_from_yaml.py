"""from_yaml: what a LLaMA-Factory YAML says becomes the run's, in its meaning there; what is not taken is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pkuslurm.compose import Composed, compose, compose_sweep
from pkuslurm.config.checks import CARRIED, OWNED
from pkuslurm.config.llamafactory import Key, Keys, snapshots
from pkuslurm.errors import PkuslurmError
from pkuslurm.plan.inputs import Inputs
from pkuslurm.render.llamafactory import train_args
from pkuslurm.rundir import RunDir

BASE = {
    "model_name_or_path": "/models/mine",
    "template": "qwen",
    "do_train": True,
    "dataset": "mine",
    "output_dir": "o",
}


def write(content: Mapping[str, Any] | str, name: str = "my_train.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else yaml.safe_dump(dict(content), allow_unicode=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def composed(content: Mapping[str, Any], *typed: str) -> Composed:
    return compose([f"from_yaml={write(BASE | content)}", *typed])


def rendered(one: Composed) -> dict[str, Any]:
    """train.yaml of the run, as far as the YAML decides it."""
    config = one.config
    inputs = Inputs(
        str(config.model.path), config.model.template, str(config.dataset.name), {}, "", "alpaca", (), None, None, "py"
    )
    return train_args(config, inputs, RunDir(Path("/runs/RUN_ID")))


STAGES = ("pt", "sft", "rm", "ppo", "dpo", "kto")
WHOLE, NOT_MERGED = ["prepare", "train", "merge", "infer", "report"], ["prepare", "train", "infer", "report"]


@pytest.mark.parametrize("kind", ["lora", "oft", "full", "freeze"])
def test_the_jobs_fit_what_the_training_leaves(kind: str) -> None:
    for stage in STAGES if kind in ("lora", "full") else ("sft",):
        one = composed({"stage": stage, "finetuning_type": kind, "reward_model": "/models/reward"})
        jobs = WHOLE if kind in ("lora", "oft") else NOT_MERGED
        assert one.config.pipeline.jobs == (["prepare", "train"] if stage == "rm" else jobs), stage
        said = [note for note in one.notes if note.startswith("jobs ")]
        assert len(said) == (one.config.pipeline.jobs != WHOLE), "what is left out is said, once"
        assert rendered(one)["stage"] == stage


def test_what_is_typed_decides_the_jobs_too() -> None:
    assert composed({}, "train.finetuning_type=full").config.pipeline.jobs == NOT_MERGED
    assert composed({"stage": "rm"}, "pipeline=train_merge").config.pipeline.jobs == WHOLE[:3]
    over = {"adapter_name_or_path": "a1,a2"}
    assert composed(over).config.pipeline.jobs == WHOLE[:2]
    assert composed({"adapter_name_or_path": "a1"}).config.pipeline.jobs == WHOLE


def test_presets_say_nothing_where_the_yaml_is_silent() -> None:
    one = composed({})
    assert one.config.train == {"report_to": "none"}, "no lora_rank, no learning_rate of ours"
    assert one.config.infer.prompts == ["你好，请介绍一下你自己。"] and one.config.infer.expect is None
    assert one.config.dataset.path == "data", "LLaMA-Factory's default, from where one stands"
    assert "train.learning_rate" in {item.key for item in composed({"learning_rate": 1e-5}).settings}


def test_the_command_line_wins_over_the_yaml_and_the_yaml_over_presets() -> None:
    given = {"learning_rate": 2e-4, "lora_rank": 64, "cutoff_len": 777}
    one = composed(given, "train.lora_rank=4", "model=qwen2.5-1.5b-instruct", "dataset=identity")
    assert one.config.train["learning_rate"] == 2e-4 and one.config.train["lora_rank"] == 4
    assert one.config.model.path != "/models/mine" and one.config.dataset.name == "identity"
    origins = {item.key: item.origin for item in one.settings}
    assert origins["train.cutoff_len"] == "my_train.yaml" and origins["train.lora_rank"] == "command line"
    assert any(note == "my_train.yaml: dataset: not taken; dataset=identity is typed" for note in one.notes)
    other = composed(given, "dataset.path=/rows.json").config.dataset
    assert (other.path, other.name) == ("/rows.json", None)
    # a model's own rate asks for a finetuning_type, of which such a YAML may be silent
    assert composed({}, "model=qwen2.5-1.5b-instruct").config.train["learning_rate"] == 1e-4


def test_defaults_of_ones_own_do_not_mix_in() -> None:
    write({"train.warmup_ratio": 0.3, "nodes": 2}, "conf/defaults.yaml")
    one = composed({})
    assert one.config.nodes == 2 and "warmup_ratio" not in one.config.train


def test_each_key_that_is_not_taken_is_said_in_a_line() -> None:
    owned = {
        "overwrite_output_dir": True,
        "resume_from_checkpoint": "saves/checkpoint-9",
        "tokenized_path": "t",
        "use_cpu": True,
        "trust_remote_code": True,
    }
    one = composed(owned)
    for key in (*owned, "output_dir"):
        assert sum(note.startswith(f"my_train.yaml: {key}: not taken; ") for note in one.notes) == 1, key
    assert one.config.model.trust_remote_code is False, "never switched on silently"
    assert composed(owned, "model.trust_remote_code=true").config.model.trust_remote_code is True
    assert not any("resume" in note for note in composed({"resume_from_checkpoint": None}).notes)


def test_it_is_read_as_llamafactory_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "model_name_or_path: m\ntemplate: qwen\ndo_train: true\ndataset: [a, b]\noutput_dir: o\n"
    text += "learning_rate: 1e-4\nrun_name: '\\${HOME} ${oc.env:HOME} ${x'\nlr_scheduler_kwargs: {min_lr: 1e-6}\n"
    name = write("\ufeff" + text, "我的 文件夹/训 练.yaml")
    one = compose([f"from_yaml={name}"])
    assert one.config.train["learning_rate"] == 0.0001 and one.config.dataset.name == "a,b"
    assert one.config.train["run_name"] == "\\${HOME} ${oc.env:HOME} ${x", "nothing of it is expanded"
    assert one.config.train["lr_scheduler_kwargs"] == {"min_lr": 1e-6}
    found = compose([f"from_yaml={write(json.dumps(BASE), 'my.json')}"]).config
    assert found.model.path == "/models/mine" and found.model.template == "qwen"


REFUSED = {
    "{a: [": "not YAML",
    "- a\n- b\n": "it holds a list",
    "": "it holds nothing",
    "learning_rate: 1\nlearning_rate: 2\n": "found duplicate key learning_rate",
    "model_name_or_path: m\nexport_dir: out\n": "-m pkuslurm merge --from-yaml my_train.yaml",
    "model_name_or_path: m\ninfer_backend: vllm\n": "a YAML to chat with (no data, no output_dir)",
    "distributed_type: FSDP\n": "it is accelerate's own configuration",
    "model: m\ntrain_dataset: d\n": "LLaMA-Factory's new trainer (v1)",
    "model_name_or_path: ~/m\noutput_dir: o\ndataset: d\n": "model_name_or_path=~/m: LLaMA-Factory knows no ~",
    "model_name_or_path: m\ndataset: 'a,,b'\n": "dataset=a,,b: names of datasets are wanted",
    "model_name_or_path: m\ndo_train: true\ndataset: d\nlerning_rate: 1\n": (
        "lerning_rate: LLaMA-Factory has no such key; did you mean learning_rate?; it stands in my_train.yaml"
    ),
    "model_name_or_path: m\ndo_train: true\ndataset: d\nhf_hub_token: secret\n": "a secret does not belong",
    "model_name_or_path: m\ndo_train: true\ndataset: d\nlogging_steps: 4x\n": "stands in my_train.yaml",
}

ONE = "model_name_or_path: m\ndo_train: true\ndataset: d\n"
DEEP = "it is nested too deeply"
NOT_PLAIN = {
    ("a.yaml", ONE + "max_samples: !!set {a, b}\n"): "a list or mapping of them is wanted",
    ("a.yaml", ONE + "run_name: &a [*a]\n"): "run_name=[[...]]: a text, a number,",
    ("a.yaml", ONE + "lr_scheduler_kwargs: {~: 1}\n"): "lr_scheduler_kwargs={None: 1}: a text,",
    ("a.yaml", ONE + f"run_name: {'[' * 500}{']' * 500}\n"): DEEP,
    ("a.json", f'{{"run_name": {"[" * 30_000}{"]" * 30_000}}}'): DEEP,
    ("a.json", '{"run_name": "\\ud800"}'): "a text, a number,",
    ("a.yaml", ONE + "max_samples: !!int abc\n"): "a.yaml: it is not YAML (",
    ("a.yaml", ONE + "fp16: !!bool abc\n"): "a.yaml: it is not YAML (",
    ("a.json", "{a"): "a.json: it is not JSON (",
}


@pytest.mark.parametrize(("name", "text"), NOT_PLAIN, ids=[f"{at}" for at in range(len(NOT_PLAIN))])
def test_values_that_no_argument_can_have_are_refused_in_one_line(name: str, text: str) -> None:
    with pytest.raises(PkuslurmError) as refused:
        compose([f"from_yaml={write(text, name)}"])
    said = str(refused.value)
    assert NOT_PLAIN[name, text] in said and "\n" not in said and len(said) < 300


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_train_yaml_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(PkuslurmError) as refused:
        compose([f"from_yaml={write(text)}"])
    assert REFUSED[text] in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_not_there_or_not_utf8_is_refused() -> None:
    with pytest.raises(PkuslurmError, match=r"from_yaml=gone\.yaml: it cannot be read"):
        compose(["from_yaml=gone.yaml"])
    Path("gb.yaml").write_bytes("model_name_or_path: 模型\n".encode("gb18030"))
    with pytest.raises(PkuslurmError, match="it is not UTF-8; save it as UTF-8"):
        compose(["from_yaml=gb.yaml"])
    write({"from_yaml": "a.yaml"}, "conf/defaults.yaml")
    with pytest.raises(PkuslurmError, match="it is typed, no preset can hold it"):
        compose([])


def test_a_training_preset_beside_it_is_refused() -> None:
    with pytest.raises(PkuslurmError, match=r"my_train\.yaml says how it is trained"):
        composed({}, "train=full")


def test_a_sweep_over_a_yaml() -> None:
    name = write(BASE | {"stage": "sft", "learning_rate": 0.5})
    points = compose_sweep([f"from_yaml={name}", "train.learning_rate=1e-5,1e-4"]).points
    assert [point.composed.config.train["learning_rate"] for point in points] == [1e-5, 1e-4]
    assert all("my_train.yaml: output_dir" in " ".join(point.composed.notes) for point in points)
    kinds = compose_sweep([f"from_yaml={name}", "train.finetuning_type=lora,full"]).points
    assert [point.composed.config.pipeline.jobs for point in kinds] == [WHOLE, NOT_MERGED]
    with pytest.raises(PkuslurmError, match="all points of a sweep share it"):
        compose_sweep(["from_yaml=a.yaml,b.yaml"])


def test_an_export_yaml_is_a_run_of_one_job() -> None:
    text = {"model_name_or_path": "m", "adapter_name_or_path": "a", "template": "qwen", "export_dir": "out"}
    one = compose(["pipeline=merge", f"from_yaml={write(text | {'trust_remote_code': True}, 'my_merge.yaml')}"])
    config = one.config
    assert config.pipeline.jobs == ["merge"] and (config.model.path, config.model.adapter) == ("m", "a")
    assert config.merge["export_dir"] == "out" and config.merge["export_device"] == "cpu", "LLaMA-Factory's default"
    assert any("trust_remote_code: not taken" in note for note in one.notes)
    with pytest.raises(PkuslurmError, match="it is no export YAML, which has export_dir; it trains"):
        compose(["pipeline=merge", f"from_yaml={write(BASE)}"])


# What has a place of its own here, or is made absolute, or refused as a secret.
ELSEWHERE = {*OWNED, *CARRIED, "eval_dataset", "deepspeed", "report_to", "use_mca"}


def _values(key: Key) -> SearchStrategy[Any]:
    """What LLaMA-Factory takes for one key."""
    if key.choices:
        return st.sampled_from(key.choices)
    by_type: dict[str, SearchStrategy[Any]] = {
        "int": st.just(1),
        "float": st.sampled_from([0.5, 1e-4]),
        "bool": st.booleans(),
        "str": st.sampled_from(["a", "a,b", "我 们", "${x}", "\\${y}", "no", "x: y # z"]),
        "list": st.just(["a", "b"]),
        "dict": st.just({"a": 1, "b": {"c": "${d}"}}),
        "null": st.none(),
    }
    return st.one_of([by_type[kind] for kind in key.types or ("str", "dict")])


def _subset(keys: Keys) -> SearchStrategy[dict[str, Any]]:
    names = [
        name
        for name in keys.keys
        if name not in ELSEWHERE and not name.endswith(("_token", "_key", "_secret", "_password"))
    ]
    some = st.lists(st.sampled_from(names), min_size=1, max_size=30, unique=True)
    return some.flatmap(lambda chosen: st.fixed_dictionaries({name: _values(keys.keys[name]) for name in chosen}))


@settings(
    max_examples=15, phases=[Phase.generate], deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(snapshots()).flatmap(_subset))
def test_every_key_arrives_as_it_was_said(content: dict[str, Any]) -> None:
    train = rendered(composed(content))
    assert {key: train.get(key, "missing") for key in content} == content
