"""From what is typed to a Config: choices that go together, Hydra's grammar, one clear line for every mistake."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pkuslurm.compose import choosing, compose, composition, groups, presets, reload
from pkuslurm.compose.quoting import quote
from pkuslurm.compose.typed import as_typed
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
        (["experiment=tutorial10", "experiment=null"], {"cluster": "local", "container": "none"}),
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


def test_the_last_word_wins() -> None:
    assert compose(["nodes=2", "nodes=3"]).config.nodes == 3
    assert compose(["cluster=ascend", "nodes=2", "cluster=local"]).choices["cluster"] == "local"
    assert compose(["train.max_steps=1", "++train.max_steps=2"]).config.train["max_steps"] == 2
    assert compose(["cluster.env={A: x}", "cluster.env={B: y}"]).config.cluster.env == {"B": "y"}
    assert compose(["model=tiny", "train.learning_rate=1e-5"]).config.train["learning_rate"] == 1e-5


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
    assert reload(before.yaml, ["infer.prompts=['a,b',问]"]).config.infer.prompts == ["a,b", "问"]
    for wrong, message in {
        "infer.promts=[a]": "no such key; did you mean infer.prompts",
        "prompts=[a]": "did you mean infer.prompts",
        "--infer.prompts=[a]": "without dashes",
        "infer.expect=(": "not a regular expression",
        "dataset=custom": "the groups of this run are chosen",
        "infer.batch_size=1,2": "needs -m",
        "~train.seed": "one value is wanted",
    }.items():
        with pytest.raises(PkuslurmError, match=message):
            reload(before.yaml, [wrong])


def test_a_torn_config_yaml_is_refused_in_words() -> None:
    with pytest.raises(PkuslurmError, match=r"config\.yaml:[23]: not YAML"):
        reload("a: 1\nb: [", [])
    with pytest.raises(PkuslurmError, match="no configuration"):
        reload("[a]", [])
    with pytest.raises(PkuslurmError, match="it is missing"):
        reload("nodes: 1", [])


def test_a_key_can_be_taken_away() -> None:
    assert "learning_rate" not in compose(["~train.learning_rate"]).config.train
    assert compose(["train.warmup_steps=1", "~train.warmup_steps"]).config.train.get("warmup_steps") is None
    assert compose(["train.seed=1", "~train.seed", "train.seed=2"]).config.train["seed"] == 2


@pytest.mark.parametrize(
    "typed",
    [
        [],
        ["cluster=ascend"],
        ["cluster.executor=slurm"],
        ["cluster=slurm", "model=tiny", "dataset.path=/d"],
        ["model.path=/m", "train.finetuning_type=full"],
        ["train.finetuning_type='freeze'", "model.path=null"],
        ["train=full", "dataset.path='/家'"],
    ],
)
def test_what_is_foreseen_is_what_two_passes_choose(typed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    roots = presets.roots()
    typed = as_typed(typed, roots)
    once = composition.compose(typed, roots, presets.Defaults())
    assert choosing.foreseen(typed, roots, presets.Defaults()) is not None
    monkeypatch.setattr(composition, "foreseen", lambda *_: None)
    twice = composition.compose(typed, roots, presets.Defaults())
    assert (once.choices, once.yaml) == (twice.choices, twice.yaml)


def test_what_is_shipped_is_what_hydra_composes() -> None:
    """The defaults that settings are compared with are put together without Hydra."""
    roots = presets.roots()
    named = [f"{group}={choice}" for group, choice in choosing.SHIPPED.items()]
    point = composition.compose(named, roots, presets.defaults(roots))
    assert composition.shipped() == presets.flatten(point.resolved())


def test_help_names_every_choice() -> None:
    found = groups()
    assert {"local", "slurm", "ascend", "nvidia"} <= set(found["cluster"])
    assert "auto" not in found["model"]


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "nodes": st.integers(1, 1000),
    "dry_run": st.booleans(),
    "train.learning_rate": st.floats(1e-8, 1, allow_nan=False),
    "train.max_steps": st.integers(1, 10**6),
    "cluster.nproc_per_node": st.integers(1, 64),
    "cluster.partition": st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True),
    "cluster.time": st.from_regex(r"[1-9]{1,2}(:[0-5][0-9]){1,2}", fullmatch=True),
    "cluster.jobs.merge.mem": st.from_regex(r"[1-9][0-9]?[MG]", fullmatch=True),
    "infer.prompts": st.lists(st.text("你是谁？，abc (){}#%='\"", min_size=1).filter(str.strip), min_size=1),
}


# no shrinking: a composition takes a tenth of a second
@settings(max_examples=15, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(sorted(VALUES)).flatmap(lambda key: st.tuples(st.just(key), VALUES[key])), max_size=6))
def test_what_was_typed_is_what_is_composed(typed: list[tuple[str, Any]]) -> None:
    """Any settings in any order, some twice: each has the value that was typed last."""
    config = compose([f"{key}={_as_one_types(value)}" for key, value in typed]).config
    for key, value in dict(typed).items():
        node: Any = config
        for part in key.split("."):
            node = node[part] if isinstance(node, dict) else getattr(node, part)
        assert node == value


def _as_one_types(value: Any) -> str:
    return "[" + ",".join(quote(item) for item in value) + "]" if isinstance(value, list) else str(value)
