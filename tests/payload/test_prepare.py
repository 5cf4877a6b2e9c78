from __future__ import annotations

import json
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.payload import prepare, tokenized, tokens
from pkuslurm.payload.files import hash_tree, install, write_json

KEYS = frozenset({"template", "cutoff_len", "dataset", "packing", "val_size", "max_samples", "mask_history"})


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(instruction: object = "你是谁", output: object = "我是北大助手") -> dict[str, object]:
    return {"instruction": instruction, "input": "", "output": output}


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
        return tokenized.cache_key(make_args(tmp_path, **more), KEYS)

    first = key()
    same = ({"learning_rate": 1.0}, {"output_dir": "/x"}, {"bf16": True}, {"tokenized_path": "/y"})
    assert all(key(**more) == first for more in same)
    others = [{"seed": 2}, {"template": "llama3"}, {"cutoff_len": 17}, {"packing": True}, {"stage": "pt"}]
    keys = [key(**more) for more in [*others, {"predict_with_generate": True}]]
    args = make_args(tmp_path)
    jsonl(tmp_path / "a.jsonl", [row(), row()])
    keys.append(tokenized.cache_key(args, KEYS))
    jsonl(tmp_path / "a.jsonl", [row()])
    (tmp_path / "model" / "tokenizer.json").write_text('{"other": 1}')
    keys.append(tokenized.cache_key(args, KEYS))
    assert len({first, *keys}) == len(keys) + 1


def test_a_template_that_the_model_has_no_tokens_for_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = make_args(tmp_path, template="llama3")
    write_json(tmp_path / "model" / "config.json", {"text_config": {"vocab_size": 100}})
    prepare._fits({"largest_id": 99}, args)
    prepare._fits({"largest_id": 100}, args | {"resize_vocab": True})
    with pytest.raises(SystemExit) as ended:
        prepare._fits({"largest_id": 100}, args)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "model.template=llama3: it needs token 100" in said and "has only 100" in said


def test_a_file_that_was_no_utf_8_only_after_launch_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = make_args(tmp_path)
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row(), ensure_ascii=False), encoding="gb18030")
    payload = {"dataset_file": str(file), "formatting": "alpaca"}
    checks = prepare._check(payload, args)
    with pytest.raises(SystemExit):
        prepare._convert_all(payload, args, checks)
    assert "it is GB18030, which it was not at launch" in capsys.readouterr().err
    prepare._convert_all(payload | {"convert_to": str(tmp_path / "new.jsonl")}, args, checks)
    assert json.loads((tmp_path / "new.jsonl").read_text(encoding="utf-8")) == row()


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "".join(map(chr, ids))


def test_what_is_masked_is_marked() -> None:
    ids = [ord(letter) for letter in "问答问答"]
    labels = [-100, ids[1], -100, ids[3]]
    assert tokens._marked(ids, labels, Letters()) == "⟦问⟧答⟦问⟧答"
    long = tokens._marked([65] * 2000, [-100] * 2000, Letters())
    assert len(long) < 700 and "…" in long


def test_published_data_replaces_what_was_there(tmp_path: Path) -> None:
    source, target = tmp_path / "cache", tmp_path / "run" / "data"
    (source / "train").mkdir(parents=True)
    (source / "train" / "x.arrow").write_text("rows")
    tokenized.publish(source, target)
    (target / "leftover").write_text("old")
    tokenized.publish(source, target)
    assert hash_tree(source) == hash_tree(target)
    assert (target / "train" / "x.arrow").stat().st_nlink == 2
    assert [entry.name for entry in target.parent.iterdir()] == ["data"]


@pytest.mark.parametrize("cached", [0o600, 0o640, 0o644, 0o666])
def test_published_data_is_the_groups_where_the_run_is_whatever_the_cache_has(tmp_path: Path, cached: int) -> None:
    source, target = tmp_path / "cache", tmp_path / "run" / "data"
    (source / "train").mkdir(parents=True)
    (source / "train").chmod(0o777)
    (source / "train" / "x.arrow").write_text("rows")
    (source / "train" / "x.arrow").chmod(cached)
    target.parent.mkdir()
    target.parent.chmod(0o750)
    tokenized.publish(source, target)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (target, target / "train")} == {0o750}
    assert stat.S_IMODE((target / "train" / "x.arrow").stat().st_mode) == 0o640
    assert stat.S_IMODE((source / "train" / "x.arrow").stat().st_mode) == cached
    assert (target / "train" / "x.arrow").stat().st_nlink == (2 if cached == 0o640 else 1)


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


def make_job(tmp_path: Path, model: Path, name: str, data: bytes, entry: dict[str, Any], **args: Any) -> dict[str, Any]:
    """A prepare job as launch writes it: a file that must be converted is named where its copy will be."""
    run, file = tmp_path / "run", tmp_path / name
    file.write_bytes(data)
    convert = None if entry.pop("as_it_is", False) else str(run / "rows.jsonl")
    write_json(run / "dataset_info.json", {"a": {"file_name": convert or str(file), **entry}})
    base = {"model_name_or_path": str(model), "dataset": "a", "dataset_dir": str(run), "template": "qwen"}
    payload = {
        "make": "tiny",
        "model_path": str(model),
        "cache_root": str(tmp_path / "cache"),
        "data_dir": str(run / "data"),
        "dataset_file": str(file),
        "convert_to": convert,
        "formatting": entry["formatting"],
        "train_args": base | {"seed": 1, "cutoff_len": 40, "use_cpu": True} | args,
        "ranks": 2,
        "result": str(run / "results" / "prepare.json"),
    }
    return {"kind": "prepare", "payload": payload}


def result_of(tmp_path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((tmp_path / "run" / "results" / "prepare.json").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.real
def test_real_prepare_then_again_from_the_cache(
    tiny_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from datasets import load_from_disk

    rows = [row(), row(output=None), row("Hi", "Hello! " * 40)]
    data = "\n".join(json.dumps(one) for one in rows).encode()
    job = make_job(tmp_path, tiny_model_dir, "a.jsonl", data, {"formatting": "alpaca", "as_it_is": True})
    found = []
    for _ in range(2):
        prepare.main(job)
        found.append(result_of(tmp_path)["dataset"])
        said = capfd.readouterr().err
        assert "pkuslurm: warning: 1 of 2 rows reach cutoff_len=40 and are cut there\n" in said
        assert "pkuslurm: first row as trained: ⟦<|im_start|>system" in said
        assert "assistant\\n⟧我是北大助手<|im_end|>" in said
    assert [one["cached"] for one in found] == [False, True]
    assert {k: found[1][k] for k in ("rows", "kept", "dropped", "cut")} == {
        "rows": 3,
        "kept": 2,
        "dropped": 1,
        "cut": 1,
    }
    assert sum(map(len, load_from_disk(str(tmp_path / "run" / "data"))["train"]["input_ids"])) == found[0]["tokens"]
    assert [entry.name for entry in (tmp_path / "cache" / "tokenized").iterdir()] == [found[0]["key"]]


PAIR = {"prompt": "你是谁", "chosen": "我是北大助手", "rejected": "我不知道"}


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "data", "entry", "args", "first"),
    [
        (
            "a.csv",
            "问题,答案,来源\n你是谁,007,1\n在吗,,2\n".encode("gb18030"),
            {"formatting": "alpaca", "columns": {"prompt": "问题", "response": "答案"}},
            {},
            "⟧007<|im_end|>",
        ),
        (
            "a.json",
            json.dumps([PAIR, PAIR]).encode(),
            {"formatting": "alpaca", "ranking": True, "columns": {name: name for name in PAIR}, "as_it_is": True},
            {"stage": "dpo"},
            "as trained (rejected): ⟦",
        ),
        (
            "a.txt",
            ("未名湖畔好读书。\n\n" * 9).encode("utf-16"),
            {"formatting": "alpaca", "columns": {"prompt": "text"}},
            {"stage": "pt", "cutoff_len": 16},
            "as trained: 未名湖畔好读书。<|im_end|>",
        ),
    ],
)
def test_real_prepare_of_what_needs_more_than_reading(
    tiny_model_dir: Path,
    tmp_path: Path,
    name: str,
    data: bytes,
    entry: dict[str, Any],
    args: dict[str, Any],
    first: str,
) -> None:
    prepare.main(make_job(tmp_path, tiny_model_dir, name, data, dict(entry), **args))
    result = result_of(tmp_path)
    assert first in "\n".join(result["dataset"]["first"])
    counted = result["dataset"]
    assert counted["train_rows"] == result["steps"]["rows"] > 0
    assert (counted["rows"], counted["kept"], counted["dropped"]) == {".csv": (2, 1, 1), ".json": (2, 2, 0)}.get(
        Path(name).suffix, (9, 9, 0)
    )
    assert counted.get("blocks") == (counted["train_rows"] if args.get("stage") == "pt" else None)
    assert [(one["name"], one["rows"], one["train"], one["eval"]) for one in counted["sets"]] == [
        ("a", counted["rows"], True, False)
    ]


@pytest.mark.real
def test_real_words_that_the_model_lacks_and_text_that_fills_no_block(
    tiny_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    alpaca = {"formatting": "alpaca", "as_it_is": True}
    data = json.dumps([row()]).encode()
    with pytest.raises(SystemExit):
        prepare.main(make_job(tmp_path, tiny_model_dir, "a.json", data, dict(alpaca), template="llama3"))
    assert "model.template=llama3: it needs token" in capfd.readouterr().err
    assert not (tmp_path / "run" / "results").exists()
    text = alpaca | {"columns": {"prompt": "text"}}
    with pytest.raises(SystemExit):
        prepare.main(make_job(tmp_path, tiny_model_dir, "a.txt", b"short", text, stage="pt", cutoff_len=2000))
    assert "train.cutoff_len=2000: all the text together" in capfd.readouterr().err
