"""What -m makes of a command line is what Hydra's own sweeper makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pkuslurm.compose import composition, presets
from pkuslurm.compose.expansion import axes_of, points_of
from pkuslurm.compose.labels import labels_of
from pkuslurm.compose.quoting import quote
from pkuslurm.errors import PkuslurmError

NUMBERS = st.one_of(st.integers(-9, 99), st.sampled_from(["1e-5", "5e-05", "0.10", "1_0", "2.5", "-3"])).map(str)
TEXTS = st.one_of(
    st.from_regex(r"[a-z][a-z0-9_/.:|$@%+-]{0,6}", fullmatch=True),
    st.text("你a,' \"()\\=", min_size=1, max_size=6).map(quote),
    st.sampled_from(["null", "true", "${nodes}", "${oc.env:A,b}", "a\\,b", " a b ", "'1'", '"x, y"', "{a:1,b:[2,3]}"]),
)
ELEMENTS = NUMBERS | TEXTS | st.lists(NUMBERS | TEXTS, max_size=3).map(lambda items: f"[{','.join(items)}]")


def joined(elements: list[str]) -> str:
    return ",".join(elements)


VALUES = st.one_of(
    ELEMENTS,
    st.lists(ELEMENTS, min_size=2, max_size=4).map(joined),
    st.lists(ELEMENTS, min_size=1, max_size=3).map(lambda items: f"choice({joined(items)})"),
    st.tuples(st.integers(-3, 3), st.integers(4, 6), st.integers(1, 3)).map(lambda three: f"range{three}"),
    st.sampled_from(["range(4)", "range(0.1,0.5,0.1)", "range(3,0,-1)", "sort(3,1,2)", "sort(b,a,reverse=true)"]),
    st.sampled_from(["str(1,2)", "int(1.0,2)", "float(range(1,3))", "tag(t,choice(a,b))"]),
)
WORDS = st.one_of(
    st.tuples(st.sampled_from(["train.run_name", "++train.tags", "+merge.x", "cluster.env.A"]), VALUES),
    st.sampled_from(
        [
            ("container", "glob(*)"),
            ("pipeline", "glob([t*,inf*],exclude=train)"),
            ("pipeline", "full,train"),
            ("experiment", "tutorial10,tutorial10"),
            ("infer.expect", "range(1,3)"),
        ]
    ),
).map("=".join)


@pytest.fixture(scope="module")
def loader() -> Iterator[Any]:
    roots = (presets.CONF.resolve(),)
    with composition._hydra(roots, presets.Defaults(), {}):
        yield GlobalHydra.instance().config_loader()


def read(items: Any, loader: Any) -> list[tuple[str, str]]:
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(items))
    return [(override.get_key_element(), repr(override.value())) for override in overrides]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(WORDS, max_size=3))
def test_the_points_are_hydras_in_hydras_order(loader: Any, words: list[str]) -> None:
    parser = OverridesParser.create(config_loader=loader)
    try:
        [points] = BasicSweeper.split_arguments(parser.parse_overrides(words), None)
        hydras = [read(point, loader) for point in points]
    except HydraException:
        return  # of choice('\'') Hydra itself makes words that it cannot read
    try:
        axes = axes_of(words, (presets.CONF.resolve(),), presets.Defaults())
    except PkuslurmError as error:
        # a mistake of its own, not of the sweep's form
        assert not any(part in str(error) for part in ("needs -m", "cannot be listed", "is missing", "no value"))
        return
    ours = [[axis.items[at] for axis, at in zip(axes, point, strict=True)] for point in points_of(axes)]
    assert [read(point, loader) for point in ours] == hydras


def test_of_a_key_that_is_said_twice_the_last_word_wins_in_the_first_place() -> None:
    axes = axes_of(["train.seed=1,2", "nodes=1,2", "++train.seed=3,4"], presets.roots(), presets.Defaults())
    assert [(axis.name, axis.items) for axis in axes] == [
        ("train.seed", ("++train.seed=3", "++train.seed=4")),
        ("nodes", ("nodes=1", "nodes=2")),
    ]


def test_what_is_taken_away_and_set_again_stays_in_order() -> None:
    words = ["train.seed=1,2", "~train.seed", "train.seed=3", "train.seed=4,5"]
    axes = axes_of(words, presets.roots(), presets.Defaults())
    assert [axis.items for axis in axes] == [("~train.seed",), ("train.seed=4", "train.seed=5")]


def test_labels_are_short_and_safe() -> None:
    assert labels_of(
        [
            {"train.learning_rate": "1e-5", "dataset": "mine", "infer.expect": "'北 大|a/b'"},
            {"train.learning_rate": "5e-5", "dataset": "mine", "infer.expect": "/data/my set.json"},
        ]
    ) == ["lr=1e-5,ds=mine,expect=北_大_a_b", "lr=5e-5,ds=mine,expect=data_my_set.json"]
    assert labels_of([{"model.path": "/a/Qwen3-8B/"}, {"model.path": "Qwen/Qwen3-4B"}]) == [
        *("model=Qwen3-8B", "model=Qwen3-4B"),
    ]
    assert labels_of([{"train.x": "1", "merge.x": "2"}]) == ["train.x=1,merge.x=2"]
    assert labels_of([{}]) == ["point"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(["train.learning_rate", "dataset", "infer.prompts", "a." + "k" * 70]), unique=True
    ).flatmap(
        lambda keys: st.lists(st.fixed_dictionaries(dict.fromkeys(keys, st.text(max_size=40))), min_size=1, max_size=20)
    )
)
def test_labels_are_unique_names_of_files(points: list[dict[str, str]]) -> None:
    labels = labels_of(points)
    assert len({label.lower() for label in labels}) == len(points)
    for label in labels:
        assert 0 < len(label) <= 60
        assert label.isprintable() and not set(label) & set("/\\ \t\n'\"$*?:<>|&;(){}[]!`#")
        assert len(label.encode()) <= 240


def test_long_values_are_cut_so_that_each_is_seen() -> None:
    [first, second] = labels_of([{"infer.expect": "x" * 80, "train.seed": seed} for seed in "12"])
    assert first.endswith(",seed=1") and second.endswith(",seed=2") and len(first) == 60
