from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.payload import prepare
from pkuslurm.payload.files import hash_tree, install, write_json
from pkuslurm.payload.rows import BadData, check

KEYS = frozenset({"template", "cutoff_len", "dataset", "packing", "val_size", "max_samples", "mask_history"})


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(instruction: object = "你是谁", output: object = "我是北大助手") -> dict[str, object]:
    return {"instruction": instruction, "input": "", "output": output}


def talk(*roles: str) -> dict[str, object]:
    return {"conversations": [{"from": role, "value": "x"} for role in roles]}


def test_good_rows_and_rows_that_are_dropped(tmp_path: Path) -> None:
    found = check(jsonl(tmp_path / "a.jsonl", [row(), row(output=None), row()]), "auto", {}, "sft")
    assert (found.formatting, found.rows, dict(found.dropped)) == ("alpaca", 3, {"without an answer": 1})
    assert found.warnings == ["1 of 3 rows are dropped: 1 without an answer"]
    talks = [talk("human", "gpt"), talk("gpt", "human"), talk("human"), talk("system", "human", "gpt")]
    found = check(jsonl(tmp_path / "b.jsonl", talks), "auto", {}, "sft")
    assert found.formatting == "sharegpt"
    assert dict(found.dropped) == {"whose roles do not alternate": 1, "that end with a question": 1}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(), row(output=3)], "row 2: 'output' is no text but int"),
        ([row(), row(instruction=["a"])], "row 2: 'instruction' is no text but list"),
        ([row(output=None)], "none of 1 rows"),
        ([{"question": "a", "answer": "b"}], "no row has the column 'instruction'"),
        ([{"instruction": "a", "output": "b"}], "{prompt: instruction, response: output}"),
        ([talk("gpt", "human")], "none of 1 rows"),
        ([{"conversations": "x"}], "row 1: 'conversations' is no list"),
        ([{"conversations": [{"role": "user", "content": "x"}]}], "see dataset.tags"),
        ([3], "line 1 is no object"),
    ],
)
def test_what_would_fail_later_is_refused_in_one_line(tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(BadData) as caught:
        check(jsonl(tmp_path / "d 数据.jsonl", rows), "auto", {}, "sft")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("你好".encode("gbk"), "not UTF-8"),
        (b"[1, 2", "not JSON"),
        (b"", "holds no row"),
        (b'{"data": [{"instruction": "a"}]}', "inside 'data'"),
    ],
)
def test_files_that_are_no_tables(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "d.json").write_bytes(data)
    with pytest.raises(BadData, match=words):
        check(str(tmp_path / "d.json"), "alpaca", {}, "sft")


def make_args(tmp_path: Path, **more: Any) -> dict[str, Any]:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "tokenizer.json").write_text("{}")
    jsonl(tmp_path / "a.jsonl", [row()])
    write_json(tmp_path / "dataset_info.json", {"a": {"file_name": "a.jsonl"}})
    base = {"model_name_or_path": str(model), "dataset": "a", "dataset_dir": str(tmp_path), "template": "qwen"}
    return base | {"seed": 1, "cutoff_len": 16, "learning_rate": 1e-4} | more


def test_the_key_follows_what_shapes_the_rows_and_nothing_else(tmp_path: Path) -> None:
    def key(**more: Any) -> str:
        return prepare.cache_key(make_args(tmp_path, **more), KEYS)

    first = key()
    same = ({"learning_rate": 1.0}, {"output_dir": "/x"}, {"bf16": True}, {"tokenized_path": "/y"})
    assert all(key(**more) == first for more in same)
    others = [{"seed": 2}, {"template": "llama3"}, {"cutoff_len": 17}, {"packing": True}, {"stage": "pt"}]
    keys = [key(**more) for more in [*others, {"predict_with_generate": True}]]
    args = make_args(tmp_path)
    jsonl(tmp_path / "a.jsonl", [row(), row()])
    keys.append(prepare.cache_key(args, KEYS))
    jsonl(tmp_path / "a.jsonl", [row()])
    (tmp_path / "model" / "tokenizer.json").write_text('{"other": 1}')
    keys.append(prepare.cache_key(args, KEYS))
    assert len({first, *keys}) == len(keys) + 1


@pytest.mark.parametrize(
    ("rows", "args", "ranks", "per_epoch", "total"),
    [
        (134, {"per_device_train_batch_size": 4, "num_train_epochs": 10.0}, 2, 17, 170),
        (90, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, 4, 3, 9),
        (3, {"gradient_accumulation_steps": 8}, 8, 1, 3),
        (134, {"max_steps": 5}, 1, 17, 5),
        (10, {"per_device_train_batch_size": 4, "dataloader_drop_last": True, "num_train_epochs": 1}, 2, 1, 1),
    ],
)
def test_steps(rows: int, args: dict[str, Any], ranks: int, per_epoch: int, total: int) -> None:
    steps = prepare.step_arithmetic(rows, args, ranks)
    assert (steps["per_epoch"], steps["total"]) == (per_epoch, total)


def test_published_data_replaces_what_was_there(tmp_path: Path) -> None:
    source, target = tmp_path / "cache", tmp_path / "run" / "data"
    (source / "train").mkdir(parents=True)
    (source / "train" / "x.arrow").write_text("rows")
    prepare.publish(source, target)
    (target / "leftover").write_text("old")
    prepare.publish(source, target)
    assert hash_tree(source) == hash_tree(target)
    assert (target / "train" / "x.arrow").stat().st_nlink == 2
    assert [entry.name for entry in target.parent.iterdir()] == ["data"]


def test_of_many_that_install_at_once_one_wins(tmp_path: Path) -> None:
    target = tmp_path / "key"
    won: list[bool] = []

    def one(number: int) -> None:
        new = tmp_path / f"new{number}"
        new.mkdir()
        (new / "facts.json").write_text("{}")
        won.append(install(new, target, lambda: (target / "facts.json").exists()))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won.count(True) == 1 and len(won) == 8
    assert (target / "facts.json").is_file()


@pytest.mark.real
def test_real_prepare_then_again_from_the_cache(tiny_model_dir: Path, tmp_path: Path) -> None:
    from datasets import load_from_disk

    run = tmp_path / "run"
    args = make_args(tmp_path, cutoff_len=40, use_cpu=True)
    args["model_name_or_path"] = str(tiny_model_dir)
    data = jsonl(tmp_path / "a.jsonl", [row(), row(output=None), row("Hi", "Hello! " * 40)])
    payload = {
        "make": "tiny",
        "model_path": str(tiny_model_dir),
        "cache_root": str(tmp_path / "cache"),
        "data_dir": str(run / "data"),
        "dataset_file": data,
        "formatting": "auto",
        "train_args": args,
        "ranks": 2,
        "result": str(run / "results" / "prepare.json"),
    }
    found = []
    for _ in range(2):
        prepare.main({"kind": "prepare", "payload": payload})
        found.append(json.loads((run / "results" / "prepare.json").read_text())["dataset"])
    assert [one["cached"] for one in found] == [False, True]
    assert {k: found[1][k] for k in ("rows", "kept", "dropped", "cut")} == {
        "rows": 3,
        "kept": 2,
        "dropped": 1,
        "cut": 1,
    }
    assert sum(map(len, load_from_disk(str(run / "data"))["train"]["input_ids"])) == found[0]["tokens"]
    assert [entry.name for entry in (tmp_path / "cache" / "tokenized").iterdir()] == [found[0]["key"]]
