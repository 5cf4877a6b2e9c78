"""What points share, and what of a point is kept until it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkuslurm.compose import compose
from pkuslurm.launch import main
from pkuslurm.payload import shaping
from pkuslurm.plan.plan import plan
from pkuslurm.preflight.resolve import resolve
from pkuslurm.render import points
from pkuslurm.render.points import difference, share_key
from pkuslurm.render.render import render
from pkuslurm.rundir import ANY_POINT, RunDir
from pkuslurm.worker.unpack import changed

KEYS = Path(points.__file__).parents[1] / "config" / "llamafactory_keys.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"instruction": "你是谁", "other": "who", "output": "我是小明"}] * 3
    for name in ("one", "two"):
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def key_of(folder: Path, *overrides: str) -> str:
    composed = compose([f"run_root={folder}", f"cache_root={folder}/cache", *overrides])
    inputs = resolve(composed.config, {}, lenient=True)
    run = RunDir(folder / "sweep" / ANY_POINT)
    return share_key(render(plan(composed.config), inputs, run, composed.yaml, "python").jobs["prepare"])


@pytest.mark.parametrize(
    "other",
    [
        "train.learning_rate=0.5",
        "train.num_train_epochs=7",
        "train.lora_rank=64",
        "+train.lora_alpha=3",
        "train.per_device_train_batch_size=1",
        "train.gradient_accumulation_steps=9",
        "nodes=3",
        "+train.eval_steps=3",
        "train.save_steps=3",
        "infer.max_new_tokens=3",
        "resume.hang_minutes=3",
    ],
)
def test_what_does_not_shape_the_rows_is_prepared_once(tmp_path: Path, other: str) -> None:
    assert key_of(tmp_path, other) == key_of(tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        "train.cutoff_len=77",
        "model.template=llama3",
        "+train.val_size=0.2",
        "+train.max_samples=9",
        "+train.packing=true",
        "+train.train_on_prompt=true",
        "+train.mask_history=true",
        "+train.default_system=你好",
        "+train.enable_thinking=false",
        "+train.neat_packing=true",
        "model.path=/models/other",
        "+train.resize_vocab=true",
        "+train.new_special_tokens_config=/x.yaml",
    ],
)
def test_what_shapes_the_rows_is_not_shared(tmp_path: Path, other: str) -> None:
    assert key_of(tmp_path, other) != key_of(tmp_path)


def test_the_seed_counts_where_rows_are_held_out_or_drawn(tmp_path: Path) -> None:
    assert key_of(tmp_path, "train.seed=1") == key_of(tmp_path, "train.seed=2")
    held_out = "+train.val_size=0.2"
    assert key_of(tmp_path, held_out, "train.seed=1") != key_of(tmp_path, held_out, "train.seed=2")
    jobs = [{"payload": {"train_args": {"seed": seed}, "ranks": 1}} for seed in (1, 2)]
    infos = [json.dumps({"mine": {"file_name": "x"} | more}) for more in ({}, {"num_samples": 5})]
    assert [share_key(jobs[0], info) == share_key(jobs[1], info) for info in infos] == [True, False]
    for job in jobs:
        job["payload"]["train_args"]["mix_strategy"] = "interleave_under"  # type: ignore[index]
    assert share_key(jobs[0]) != share_key(jobs[1])


@pytest.mark.parametrize(
    "swept",
    [
        "dataset.path={0}/one.json,{0}/two.json",
        "dataset.columns.prompt=instruction,other",  # the same file
        "dataset.name=one,two",
    ],
)
def test_other_rows_are_not_shared(data: Path, capsys: pytest.CaptureFixture[str], swept: str) -> None:
    named = [f"dataset.path={data}/one.json", "dataset.columns={prompt: instruction, response: output}"]
    points_ = ["-m", *named, swept.format(data), "train.learning_rate=1e-5,1e-4"]
    assert main([*points_, "dry_run=true", f"run_root={data}", f"cache_root={data}/cache"]) == 0
    assert "# sweep: 4 points, 2 to prepare\n" in capsys.readouterr().out


def with_argument(name: str, value: object) -> str:
    args = {"cutoff_len": 64, "val_size": 0.1} | {name: value}
    payload: dict[str, Any] = {"train_args": args, "ranks": 1, "model_path": "m"}
    return share_key({"payload": payload})


def test_no_argument_that_shapes_rows_is_left_out_in_any_version() -> None:
    """Each argument of each LLaMA-Factory that is known: whatever prepare looks at must part points."""
    installed = shaping.data_keys()
    snapshot = json.loads(KEYS.read_text(encoding="utf-8"))
    known = {name for version in snapshot.values() for name in version["train"]} | installed
    assert len(known) > 200
    shaped = set(shaping.shaping_args(dict.fromkeys(known), installed))
    assert {"cutoff_len", "template", "packing", "seed", "image_max_pixels"} <= shaped and len(shaped) > 30
    lost = {name for name in shaped if with_argument(name, 1) == with_argument(name, 2)}
    assert lost == set()


def test_the_list_of_what_does_not_count_is_of_real_arguments() -> None:
    snapshot = json.loads(KEYS.read_text(encoding="utf-8"))
    known = {name for version in snapshot.values() for name in version["train"]}
    idle = [prefix for prefix in points._NOT_DATA if not any(name.startswith(prefix) for name in known)]
    assert idle == []


lines = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=6).map("\n".join)


@given(lines, lines)
def test_what_differs_and_what_is_common_give_the_text(common: str, own: str) -> None:
    change = difference({"a": common}, {"a": own})
    assert changed(common, json.loads(json.dumps(change)).get("a", {})) == own
    assert (change == {}) == (common == own)


def test_of_long_texts_only_the_lines_that_differ_are_kept() -> None:
    common = "".join(f"line {n}\n" for n in range(100))
    own = common.replace("line 7\n", "学习率 7\n")
    assert difference({"a": common, "b": "x"}, {"a": own, "b": "x"}) == {"a": {"7": "学习率 7"}}


def test_an_emptied_file_is_a_difference() -> None:
    change = difference({"a": "one\ntwo"}, {"a": ""})
    assert changed("one\ntwo", change.get("a", {})) == ""
