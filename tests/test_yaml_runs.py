"""from_yaml and merge --from-yaml as commands: what a dry run shows, what is refused, and a run to its end."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkuslurm import cli, screen
from pkuslurm.launch import main
from pkuslurm.rundir import RunDir, read_json, read_jsonl
from tests.conftest import environment, run
from tests.e2e import models

ROW = {"instruction": "问", "input": "", "output": "答"}
BASE = {"model_name_or_path": "m", "template": "qwen", "do_train": True, "dataset_dir": "d", "output_dir": "saves"}
INFO = {
    "one": {"file_name": "one.json"},
    "two": {"file_name": "two.json", "columns": {"prompt": "q", "response": "a"}},
    "held": {"file_name": "held.csv", "columns": {"prompt": "问", "response": "答"}},
    "seen": {"file_name": "seen.json", "formatting": "sharegpt", "columns": {"messages": "m", "images": "i"}},
    "parts": {"file_name": "parts"},
    "far": {"hf_hub_url": "somebody/data"},
}


def data(folder: Path) -> None:
    (folder / "parts").mkdir(parents=True)
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]
    rows: dict[str, Any] = {
        "one.json": [ROW] * 6,
        "two.json": [{"q": "who", "a": "PKU"}] * 4,
        "seen.json": [{"m": turns, "i": ["a.png"]}] * 2,
        "parts/a.json": [ROW],
        "parts/b.json": [ROW],
        "dataset_info.json": INFO,
    }
    for name, content in rows.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "held.csv").write_bytes("问,答\n你好,您好\n再见,慢走\n".encode("gb18030"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write(content: Mapping[str, Any], name: str = "my.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(BASE | content, allow_unicode=True), encoding="utf-8")
    return f"from_yaml={name}"


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A dry run: all of its text, train.yaml, dataset_info.json."""
    assert main([*words, "dry_run=true", "run_root=/runs"]) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    parts = {part.split("\n", 1)[0]: part.split("\n", 1)[1] for part in text.split("# file ")[1:]}
    return text, yaml.safe_load(parts["train.yaml"]), json.loads(parts["dataset_info.json"])


def test_several_sets_of_data_and_one_that_is_held_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"dataset": "one, two", "eval_dataset": "held", "eval_strategy": "epoch", "max_samples": 5}
    text, train, info = shown(capsys, write(given))
    assert (train["dataset"], train["eval_dataset"], train["max_samples"]) == ("one,two", "held", 5)
    assert list(info) == ["one", "two", "held"] and info["two"]["columns"] == {"prompt": "q", "response": "a"}
    assert info["one"]["file_name"] == str(place / "d" / "one.json")
    assert info["held"]["file_name"] == "/runs/RUN_ID/dataset-3.jsonl", "not UTF-8: from the copy that prepare makes"
    assert "9 rows" in text, "five of six and four"
    assert f"for evaluation: {place / 'd' / 'held.csv'}, alpaca, 2 rows" in text
    assert "media_dir" not in train
    mixed = {"mix_strategy": "interleave_under", "interleave_probs": "0.5,0.5"}
    assert shown(capsys, write(mixed | {"dataset": "one,two"}))[1]["interleave_probs"] == "0.5,0.5"
    assert main([write(mixed | {"dataset": "one"}), "dry_run=true"]) == 2
    assert "one number a dataset is wanted" in capsys.readouterr().err


def test_pictures_are_looked_for_beside_the_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, write({"dataset": "seen"}))[1]["media_dir"] == str(place / "d")
    assert shown(capsys, write({"dataset": "seen", "media_dir": "p"}))[1]["media_dir"] == str(place / "p")


def test_a_folder_of_files_is_left_to_llamafactory(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, _, info = shown(capsys, write({"dataset": "parts"}))
    assert info["parts"]["file_name"] == str(place / "d" / "parts") and "a folder of files" in text


def test_paths_begin_where_one_stands(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text("{}")
    (place / "ref").mkdir()
    given = {"dataset": "one", "stage": "dpo", "adapter_name_or_path": "adapter", "ref_model": "ref"}
    (place / "d" / "one.json").write_text(json.dumps([{"instruction": "q", "chosen": "a", "rejected": "b"}]))
    _, train, _ = shown(capsys, write(given))
    assert train["adapter_name_or_path"] == str(place / "adapter") and train["ref_model"] == str(place / "ref")
    _, train, _ = shown(capsys, write(given | {"deepspeed": "ds.json"}), "cluster=nvidia")
    assert train["deepspeed"] == str(place / "ds.json")


UNRUNNABLE: dict[str, dict[str, Any]] = {
    "do_train=false": {"do_train": False, "do_predict": True, "predict_with_generate": True},
    "launched: ray_num_workers=4": {"ray_num_workers": 4},
    "launched: use_kt=true": {"use_kt": True},
    "train.use_mca=true": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "far": {"dataset": "far"},
    "note: dataset_dir=ONLINE": {"dataset_dir": "ONLINE"},
}


@pytest.mark.parametrize("why", UNRUNNABLE)
def test_what_a_run_cannot_do_is_shown_and_not_launched(
    why: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"dataset": "one"} | UNRUNNABLE[why]
    given |= {"eval_dataset": "held"} if not given.get("do_train", True) else {}
    text, train, _ = shown(capsys, write(given))
    assert why in text and text.count("# warning: this is shown and cannot be launched") <= 1
    assert train["do_train"] is given.get("do_train", True)
    assert main([write(given), "run_root=runs"]) == 2
    assert "Traceback" not in (refused := capsys.readouterr().err) and refused.count("\n") == 1
    assert not (place / "runs").exists()


def test_what_is_taken_out_again_can_be_launched(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, train, _ = shown(capsys, write({"dataset": "one", "ray_num_workers": 4}), "~train.ray_num_workers")
    assert "cannot be launched" not in text and "ray_num_workers" not in train


def test_nothing_is_merged_into_packed_weights(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "m").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (place / "m" / name).write_text('{"model_type": "qwen2", "quantization_config": {"quant_method": "awq"}}')
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (place / "m" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert main([write({"dataset": "one"}), "dry_run=true"]) == 2
    assert "nothing can be merged into them; write pipeline=train" in capsys.readouterr().err
    shown(capsys, write({"dataset": "one", "template": "default"}), "pipeline=train")


def test_an_export_that_would_overwrite_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "out").mkdir()
    (place / "out" / "mine").write_text("")
    Path("my.yaml").write_text("model_name_or_path: m\nadapter_name_or_path: a\nexport_dir: out\n")
    assert main(["pipeline=merge", "from_yaml=my.yaml", "dry_run=true"]) == 2
    refused = capsys.readouterr().err
    assert refused.startswith("pkuslurm: export_dir=out: it is not empty, and nothing is overwritten")
    assert refused.endswith("; it stands in my.yaml\n")
    assert cli.main(["merge", "--from-yaml", "my.yaml", "export_dir=out2"]) == 2
    assert "did you mean merge.export_dir=out2?" in capsys.readouterr().err
    assert main(["pipeline=merge", "from_yaml=my.yaml", "merge.export_dir=out2", "dry_run=true"]) == 0


def test_a_merge_without_an_adapter_says_that_it_copies(place: Path) -> None:
    run = RunDir(place / "run")
    run.job("merge").parent.mkdir(parents=True)
    for adapter, says in ((None, "copy the model"), ("a", "merge the adapter into the model")):
        run.job("merge").write_text(json.dumps({"payload": {"adapter": adapter}}))
        assert screen._what(run, "merge").startswith(says)


NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "eval_dataset=hled: ": (
        {"eval_dataset": "hled"},
        "it has no such dataset; did you mean held?; it stands in my.yaml",
    ),
    "dataset=ona: ": ({"dataset": "two,ona"}, "it has no such dataset; did you mean one?; it stands in my.yaml"),
    "do_train=false: LLaMA-Factory would do nothing": (
        {"do_train": None},
        "it is LLaMA-Factory's default, as my.yaml says nothing of do_train",
    ),
    "dataset_dir=data: there is no such file or folder": (
        {"dataset_dir": None},
        "it is LLaMA-Factory's default, as my.yaml says nothing of dataset_dir, and begins at the current folder ({})",
    ),
    "model_name_or_path=d/小千: no such folder ({}/d/小千)": (
        {"model_name_or_path": "d/小千"},
        "; did you mean d/小千问?; give a model's folder, or its id, such as Qwen/Qwen3-0.6B; it stands in my.yaml",
    ),
    "lora_rank=x: ": ({"lora_rank": "x"}, "; it stands in my.yaml"),
    "dataset.path={}/d/bad.json: it is not JSON": ({"dataset": "bad"}, "; my.yaml says dataset_dir: d"),
}


@pytest.mark.parametrize("begins", NAMED)
def test_a_refusal_names_the_key_and_the_file_that_one_has_written(
    begins: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, ends = NAMED[begins]
    (place / "d" / "小千问").mkdir()
    (place / "d" / "bad.json").write_text("[{")
    (place / "d" / "dataset_info.json").write_text(json.dumps(INFO | {"bad": {"file_name": "bad.json"}}))
    model = [] if "model_name_or_path" in more else ["model.make=tiny", "model.template=default"]
    given = {key: value for key, value in (BASE | {"dataset": "one"} | more).items() if value is not None}
    Path("my.yaml").write_text(yaml.safe_dump(given, allow_unicode=True), encoding="utf-8")
    assert main(["from_yaml=my.yaml", "here=true", *model]) == 2
    refused = capsys.readouterr().err
    assert refused.startswith(f"pkuslurm: {begins.format(place)}") and refused.count("\n") == 1
    assert refused.endswith(f"{ends.format(place)}\n")
    if "dataset" in more:  # of a sweep's point, too
        assert main(["-m", "from_yaml=my.yaml", "train.seed=1,2", "here=true", *model]) == 2
        assert begins.format(place) in (refused := capsys.readouterr().err) and "my.yaml" in refused


def test_what_was_put_aside_is_said_where_it_is_missed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = write({"dataset": "one", "eval_dataset": "held", "eval_strategy": "steps", "eval_steps": 1})
    assert main([given, "dataset.path=d/two.json", "dry_run=true"]) == 2
    assert capsys.readouterr().err.endswith(
        "nothing to evaluate on; set train.val_size=0.1 or train.eval_dataset; it stands in my.yaml; "
        "my.yaml: eval_dataset: not taken; dataset.path=d/two.json is typed\n"
    )
    assert main(["from_yaml=my.yml", "dry_run=true"]) == 2
    assert "did you mean my.yaml?" in capsys.readouterr().err


@pytest.mark.parametrize("sweep", [False, True])
def test_the_last_screen_of_a_dry_run_has_its_notes(
    sweep: bool, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    words = ["-m", "train.seed=1,2"] if sweep else []
    assert main([write({"dataset": "one"}), "model.path=none", "dry_run=true", *words]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("this dry run has ") and any(
        "note: model.path=none: no such" in line for line in said[1:]
    )


@pytest.mark.real
def test_a_full_fine_tune_of_a_yaml_is_asked_where_it_lies(weird: Path) -> None:
    models.llama(weird / "m")
    data(weird / "d")
    given = {
        "template": "default",
        "finetuning_type": "full",
        "dataset": "one,two",
        "max_steps": 2,
        "learning_rate": 1e-3,
    }
    given |= {"eval_dataset": "held", "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1, "seed": 7}
    (weird / "我的.yaml").write_text(yaml.safe_dump(BASE | given, allow_unicode=True), encoding="utf-8")
    ended = run(["from_yaml=我的.yaml", "infer.max_new_tokens=4"], weird, environment(weird))
    assert ended.code == 0, ended.err
    one = RunDir(Path(ended.last))
    assert not one.merged.exists() and one.whole_model == one.adapter and f"model    {one.adapter}" in ended.err
    assert [answer["tuned"] is not None for answer in read_jsonl(one.answers)] == [True]
    facts = (read_json(one.result("prepare")) or {})["dataset"]
    assert (facts["rows"], facts["train_rows"], facts["eval_rows"]) == (10, 10, 2)
    assert [(one["name"], Path(one["file"]).name, one["rows"], one["train"], one["eval"]) for one in facts["sets"]] == [
        ("one", "one.json", 6, True, False),
        ("two", "two.json", 4, True, False),
        ("held", "held.csv", 2, False, True),
    ]
    assert "2 steps are few" in ended.err and ended.err.count(" are few to learn") == 1, "at launch, and not again"
    log = (read_json(one.adapter / "trainer_state.json") or {})["log_history"]
    assert len([entry for entry in log if "eval_loss" in entry]) >= 2
    settings = (read_json(one.run_json) or {})["settings"]
    assert {"key": "train.seed", "value": 7, "default": None, "origin": "我的.yaml"} in settings
