"""From what is typed to a Config: choices that go together, Hydra's grammar, one clear line for every mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st

from pkuslurm.compose import compose, reload
from pkuslurm.errors import PkuslurmError


def test_defaults_are_the_demo() -> None:
    composed = compose([])
    assert composed.choices["model"] == "tiny"
    assert composed.choices["dataset"] == "identity"
    assert composed.config.nodes == 1
    assert composed.config.pipeline.jobs == ["prepare", "train", "merge", "infer", "report"]
    assert composed.settings == ()


@pytest.mark.parametrize(
    ("overrides", "choices"),
    [
        (["cluster=ascend", "nodes=2"], {"model": "qwen2.5-1.5b-instruct", "dataset": "identity"}),
        (["cluster=ascend", "model=tiny"], {"model": "tiny"}),
        (["model.path=/m", "dataset.path=/d.json"], {"model": "custom", "dataset": "custom", "train": "lora"}),
        (["model.path=/m", "train.finetuning_type=full"], {"model": "custom", "train": "full"}),
        (["experiment=tutorial10"], {"cluster": "ascend", "container": "apptainer"}),
    ],
)
def test_what_belongs_together_goes_together(overrides: list[str], choices: dict[str, str]) -> None:
    composed = compose([*overrides, "infer.prompts=[你是谁]"])
    assert {group: composed.choices[group] for group in choices} == choices


def test_the_learning_rate_goes_with_the_way_of_tuning() -> None:
    assert compose(["model.path=/m"]).config.train["learning_rate"] == 1e-4
    assert compose(["model.path=/m", "train.finetuning_type=full"]).config.train["learning_rate"] == 1e-5


def test_custom_data_has_no_expectation() -> None:
    config = compose(["dataset.path=/d.json", "infer.prompts=[hello]"]).config
    assert config.infer.expect is None


def test_as_typed() -> None:
    config = compose(
        [
            "infer.expect=(北大|PKU)",
            "infer.prompts=[你是谁,Who are you?]",
            "dataset.path=/家/my data(1).json",
            "train.max_steps=4",
            "cluster.jobs.merge.partition=cpu",
            "cluster.nodelist=node[01-04]",
            "cluster.env={A: 1}",
        ]
    ).config
    assert config.infer.expect == "(北大|PKU)"
    assert config.infer.prompts == ["你是谁", "Who are you?"]
    assert config.dataset.path == "/家/my data(1).json"
    assert config.train["max_steps"] == 4
    assert config.cluster.jobs == {"merge": {"partition": "cpu"}}
    assert config.cluster.nodelist == "node[01-04]"
    assert config.cluster.env == {"A": 1}


def test_the_last_word_wins() -> None:
    assert compose(["nodes=2", "nodes=3"]).config.nodes == 3
    assert compose(["model=tiny", "train.learning_rate=1e-5"]).config.train["learning_rate"] == 1e-5


def test_settings_name_their_origin() -> None:
    origins = {item.key: item.origin for item in compose(["experiment=tutorial10", "train.max_samples=5"]).settings}
    assert origins["cluster.gres"] == "cluster=ascend"
    assert origins["train.max_samples"] == "command line"
    assert origins["nodes"] == "experiment=tutorial10"
    assert "train.cutoff_len" in origins and "train.save_steps" not in origins


def test_a_default_of_another_model_is_no_change() -> None:
    keys = {item.key for item in compose(["model.path=/m", "dataset.path=/d.json"]).settings}
    assert "model.path" in keys and not any(key.startswith("train.") for key in keys)


REFUSED = {
    "nodez=2": r"nodez: no such key; did you mean nodes",
    "node=2": r"node: no such key; did you mean nodes=2\?",
    "lr=1e-4": r"lr: no such key; did you mean train\.learning_rate=1e-4\?",
    "epochs=3": r"did you mean train\.num_train_epochs=3\?",
    "--nodes=2": r"typed without dashes: nodes=2",
    "nodes": r"typed as key=value",
    "nodes=abc": r"nodes=abc: it must be a whole number",
    "nodes=1.5": r"nodes=1\.5: it must be a whole number",
    "nodes=0": r"nodes=0: it must be 1 or more",
    "nodes=-1": r"nodes=-1: it must be 1 or more",
    "nodes=true": r"nodes=True: it must be a whole number",
    "nodes=1,2": r"nodes=1,2: several values make a sweep",
    "cluster=Ascend": r"cluster=Ascend: no such choice; did you mean ascend\?; there are: ascend, local",
    "model=qwen": r"model=qwen: no such choice",
    "experiment=nope": r"experiment=nope: no such choice; there are: tutorial10",
    "cluster.nproc_per_node=0": r"cluster\.nproc_per_node=0: it must be 1 or more",
    "cluster.accelerator=gpu": r"cluster\.accelerator=gpu: it must be npu or cuda or cpu",
    "train.lerning_rate=1": r"train\.lerning_rate: LLaMA-Factory has no such key; did you mean train\.learning_rate",
    "train.output_dir=x": r"train\.output_dir: a run sets this itself; say it with run_root",
    "merge.max_steps=3": r"merge\.max_steps: LLaMA-Factory has no such key",
    "train.learning_rate=fast": r"train\.learning_rate=fast: it must be a number",
    "train.learning_rate=0": r"train\.learning_rate=0: it must be more than 0",
    "train.finetuning_type=lorra": r"train\.finetuning_type=lorra: it must be lora, full, freeze or oft",
    "infer.expect=[": r"not a regular expression",
    "infer.expect=[a,b]": r"2 expectations for 5 prompts",
    "model.template=qwenn": r"model\.template=qwenn: LLaMA-Factory has no such template; did you mean qwen",
    "train.learning_rate=nan": r"it must be more than 0",
    "pipeline.jobs=[merge]": r"pipeline\.jobs=\['merge'\]: a beginning of",
    "merge.export_hub_model_id=a/b": r"merge\.export_hub_model_id: not yet built",
    "cluster.env.DB_PASSWORD=12345": r"a secret does not belong",
    "infer.prompts=[]": r"infer\.prompts: nothing to ask",
    "model=custom": r"model\.path: no model is given",
    "dataset=custom": r"dataset\.path: no data is given",
    "cluster.env.API_KEY=abc": r"cluster\.env\.API_KEY: a secret",
    "cluster.jobs.trian={partition: a}": r"cluster\.jobs\.trian: kinds of jobs are",
    "cluster.jobs.train.partitoin=a": r"cluster\.jobs\.train\.partitoin: no such key; did you mean partition",
    "cluster=3": r"cluster=3: no such choice",
    "run_root=${nope}": r"nope",
}


@pytest.mark.parametrize(("override", "message"), REFUSED.items())
def test_mistakes_are_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(PkuslurmError) as refusal:
        compose([override])
    text = str(refusal.value)
    assert re.search(message, text), text
    assert "\n" not in text
    assert "Traceback" not in text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1, max_size=20))
def test_quoting_gives_back_what_was_typed(value: str) -> None:
    """What Hydra refuses arrives as typed; what it accepts keeps Hydra's meaning."""
    from pkuslurm.compose import _quoted_where_needed

    typed = f"name={value}"
    quoted = OverridesParser.create().parse_override("name=" + _quoted_where_needed("name", value))
    try:
        by_hydra = OverridesParser.create().parse_override(typed)
    except HydraException:
        if not value.startswith("["):
            assert quoted.value() == value
    else:
        assert quoted.value() == by_hydra.value() or quoted.value() != quoted.value()  # nan


def test_the_kept_yaml_holds_names_not_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PKUSLURM_RUN_ROOT", "/somewhere/private")
    composed = compose([])
    assert composed.config.run_root == "/somewhere/private"
    assert "/somewhere/private" not in composed.yaml
    assert "oc.env:PKUSLURM_RUN_ROOT" in composed.yaml


def test_a_run_is_composed_again_from_its_yaml() -> None:
    before = compose(["nodes=2"])
    after = reload(before.yaml, ["infer.prompts=[问题一,Q2]", "infer.expect=null"])
    assert after.config.infer.prompts == ["问题一", "Q2"]
    assert after.config.nodes == 2
    with pytest.raises(PkuslurmError, match="no such key"):
        reload(before.yaml, ["infer.promts=[a]"])


def test_presets_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = tmp_path / "conf 我的" / "cluster"
    preset.mkdir(parents=True)
    (preset / "mine.yaml").write_text("executor: slurm\npartition: gpu\n", encoding="utf-8")
    monkeypatch.setenv("PKUSLURM_CONF", str(preset.parent))
    composed = compose(["cluster=mine"])
    assert composed.config.cluster.partition == "gpu"
    assert compose(["cluster=mine"], [preset.parent]).choices["cluster"] == "mine"
