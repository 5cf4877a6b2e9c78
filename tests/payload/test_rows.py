"""The rows of a file: read in every form and encoding, judged, and written anew where that is needed."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkuslurm.payload import encoding, tables
from pkuslurm.payload.rows import BadData, check, look
from pkuslurm.payload.steps import step_lines, steps
from pkuslurm.payload.tables import convert, open_table

OPENAI = {
    "columns": {"messages": "messages"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}
PAIRS = {"ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}}


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(instruction: object = "你是谁", output: object = "我是北大助手") -> dict[str, object]:
    return {"instruction": instruction, "input": "", "output": output}


def talk(*roles: str) -> dict[str, object]:
    return {"conversations": [{"from": role, "value": "x"} for role in roles]}


def rows_of(path: Path) -> list[dict[str, Any]]:
    table = open_table(path)
    assert table is not None
    with closing(table):
        return list(table.rows)


def test_good_rows_and_rows_that_are_dropped(tmp_path: Path) -> None:
    found = check(jsonl(tmp_path / "a.jsonl", [row(), row(output=None), row()]), "auto", {}, "sft")
    assert (found.formatting, found.rows, dict(found.dropped)) == ("alpaca", 3, {"without an answer": 1})
    assert found.warnings == ["1 of 3 rows is dropped: 1 without an answer"]
    talks = [talk("human", "gpt"), talk("gpt", "human"), talk("human"), talk("system", "human", "gpt"), talk()]
    found = check(jsonl(tmp_path / "b.jsonl", talks), "auto", {}, "sft")
    assert found.formatting == "sharegpt"
    assert dict(found.dropped) == {
        "whose roles do not alternate": 1,
        "that end with a question": 1,
        "without a message": 1,
    }


def test_empty_answers_and_misspelt_roles_are_told_where_they_are(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [row(), row(output=""), row(), row(output=" ")])
    assert check(file, "auto", {}, "sft").warnings == [
        "2 rows are empty or have an empty answer, row 2 is the first: they teach to say nothing"
    ]
    file = jsonl(tmp_path / "a.jsonl", [row(), row(output="")])
    assert check(file, "auto", {}, "sft").warnings == [
        "row 2 is empty or has an empty answer: it teaches to say nothing"
    ]
    file = jsonl(tmp_path / "b.jsonl", [talk("human", "gpt"), talk("humann", "gpt")])
    assert dict(check(file, "auto", {}, "sft").dropped) == {"with the role 'humann' (did you mean 'human'?)": 1}


def test_the_first_usable_row_is_shown_as_it_is_trained(tmp_path: Path) -> None:
    whole = {"instruction": "a\nb", "input": "c", "output": "x" * 300, "system": "s", "history": [["q", "r"]]}
    names = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
    found = check(jsonl(tmp_path / "a.jsonl", [{**whole, "output": None}, whole]), "alpaca", {"columns": names}, "sft")
    assert found.first == f"system: s\nuser: q\nassistant: r\nuser: a\\nb\\nc\nassistant: {'x' * 199}…"
    found = check(jsonl(tmp_path / "b.jsonl", [talk("system", "human", "gpt")]), "auto", {}, "sft")
    assert found.first == "system: x\nuser: x\nassistant: x"
    found = check(
        jsonl(tmp_path / "c.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}]), "alpaca", PAIRS, "dpo"
    )
    assert found.first == "user: p\nchosen: c\nrejected: r"
    found = check(jsonl(tmp_path / "d.jsonl", [{"t": "p"}]), "alpaca", {"columns": {"prompt": "t"}}, "pt")
    assert found.first == "text: p"


@pytest.mark.parametrize(
    ("rows", "entry", "stage", "words"),
    [
        ([row(), row(output=3)], {}, "sft", "row 2: 'output' is no text but int"),
        ([row(), row(instruction=["a"])], {}, "sft", "row 2: 'instruction' is no text but list"),
        ([row(output=None)], {}, "sft", "its only row cannot be used (1 without an answer)"),
        ([{"question": "a", "answer": "b"}], {}, "sft", "no row has the column 'instruction'"),
        ([{"instruction": "a", "output": "b"}], {}, "sft", "dataset.columns={prompt: …, response: …}"),
        ([row() | {"h": [["a"]]}], {"columns": {"response": "output", "history": "h"}}, "sft", "row 1: 'h' must be"),
        ([row()], {"columns": {"prompt": "instruction"}}, "sft", "names no response"),
        ([talk("gpt", "human")], {}, "sft", "its only row cannot be used"),
        ([row(output=None)] * 2, {}, "sft", "none of 2 rows can be used (2 without an answer)"),
        ([{"conversations": "x"}], {}, "sft", "row 1: 'conversations' is no list"),
        ([{"conversations": [{"role": "user", "content": "x"}]}], {}, "sft", "see dataset.tags"),
        ([{"conversations": [{"from": ["x"], "value": "x"}]}], {}, "sft", "row 1: a message whose 'from' is no text"),
        ([talk("human", "gpt")], {"tags": {"role_tag": "from"}}, "sft", "dataset.tags must name"),
        ([3], {}, "sft", "line 1 is no object"),
        ([row()], {}, "dpo", "train.stage=dpo learns from pairs"),
        ([row()], {}, "rm", "train.stage=rm learns from pairs"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], PAIRS, "sft", "train.stage=sft does not read"),
        ([{"prompt": "a", "chosen": "b", "rejected": None}], PAIRS, "dpo", "(1 without two answers)"),
        ([{"prompt": "a", "chosen": ["b"], "rejected": "c"}], PAIRS, "dpo", "row 1: 'chosen' is no text but list"),
        ([{"prompt": " "}], {"columns": {"prompt": "prompt"}}, "pt", "its only row cannot be used"),
    ],
)
def test_what_would_fail_later_is_refused_in_one_line(
    tmp_path: Path, rows: list[Any], entry: dict[str, Any], stage: str, words: str
) -> None:
    with pytest.raises(BadData) as caught:
        check(jsonl(tmp_path / "d 数据.jsonl", rows), "auto", entry, stage)
    assert words in str(caught.value)
    assert str(tmp_path / "d 数据.jsonl") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_messages_without_text_say_what_they_have(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}
    rows = [{"messages": [{"role": "user", "content": "x"}, call]}]
    with pytest.raises(BadData, match=r"row 1: a message whose 'content' is no text .tool_calls are not read"):
        check(jsonl(tmp_path / "a.jsonl", rows), "sharegpt", OPENAI, "sft")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("d.json", b'{"a": 1}\n{"a": \n', "line 2 is not JSON .Expecting value at column"),
        ("d.json", b'[{"a": 1},\n{"a": }]', "it is not JSON .Expecting value: line 2, column 7.$"),
        ("d.csv", "问题，答案\n你好，我\n".encode(), "its header has ， .full-width. between the columns"),
        ("d.json", b"[1, 2", "not JSON"),
        ("d.json", b"[" * 100_000, "not JSON"),
        ("d.json", b'[{"a": "b"}, 7]', "row 2 is no object"),
        ("d.json", b"", "holds no row"),
        ("d.json", b"[]", "holds no row"),
        ("d.json", b'{"data": [{"instruction": "a"}]}', "inside 'data'"),
        ("d.json", b'{"version": 2,\n "rows": [{"instruction": "a"}]}', "inside 'rows'"),
        ("d.json", b"\xff\xfe\xff", "neither UTF-8 nor GB18030"),
        ("d.json", b"\x00\x01\x02", "a binary file"),
        ("d.csv", b"PK\x03\x04rest", "an Excel or zip file"),
        ("d.csv", b"a,b\n1,2,3\n", "row 1 .line 2. has more cells"),
        ("d.csv", b'a,b\n"1,2\n', "row 1 is not CSV"),
        ("d.csv", b"a,b\n", "holds no row"),
        ("d.parquet", b"PAR1", "cannot be read as parquet"),
        ("d.arrow", b"nothing", "cannot be read as arrow"),
    ],
)
def test_files_that_are_no_tables(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadData, match=words) as caught:
        check(str(tmp_path / name), "alpaca", {}, "sft")
    assert "\n" not in str(caught.value)


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=20)
# "联通" and its like are UTF-8 by accident if nothing else is there
ROWS = st.lists(
    st.fixed_dictionaries({"instruction": TEXTS, "中文": st.just("北大助手，你好！"), "output": TEXTS}), min_size=1
)


@given(rows=ROWS, lines=st.booleans(), codec=st.sampled_from(["utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-32"]))
@settings(max_examples=150, deadline=None)
def test_the_encoding_does_not_change_the_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], lines: bool, codec: str
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    dumped = [json.dumps(one, ensure_ascii=False) for one in rows]
    text = "\n".join(dumped) if lines else f"[{', '.join(dumped)}]"
    (folder / "a.json").write_bytes(text.encode(codec))
    table = open_table(folder / "a.json")
    assert table is not None
    assert list(table.rows) == rows
    assert bool(table.convert) == (codec != "utf-8")
    convert(folder / "a.json", folder / "new" / "a.jsonl", ["instruction", "output"], [])
    wanted = [{key: one[key] for key in ("instruction", "output")} for one in rows]
    assert rows_of(folder / "new" / "a.jsonl") == wanted


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "gb18030"])
def test_a_csv_keeps_its_texts(tmp_path: Path, separator: str, codec: str) -> None:
    lines = ["问题,答案,id", '"多行\r\n文字, ""引号""",007,1', "NA,None,2", ",,3"]
    text = "\r\n".join(line.replace(",", separator) for line in lines)
    (tmp_path / "a.csv").write_bytes(text.encode(codec))
    first = f'多行\r\n文字{separator} "引号"'
    assert [list(one.values())[:2] for one in rows_of(tmp_path / "a.csv")] == [
        [first, "007"],
        ["NA", "None"],
        [None, None],
    ]
    convert(tmp_path / "a.csv", tmp_path / "a.jsonl", ["问题", "答案"], ["答案"])
    assert rows_of(tmp_path / "a.jsonl") == [
        {"问题": first, "答案": "007"},
        {"问题": "NA", "答案": "None"},
        {"问题": "", "答案": None},
    ]


def test_other_forms_give_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet, feather = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow.ipc")
    rows = [row(), row(output=None), talk("human", "gpt") | {"instruction": None, "input": None, "output": None}]
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.Table.from_pylist(rows[::-1]).schema)
    parquet.write_table(table, tmp_path / "a.parquet")
    for name, open_it in (("a.arrow", feather.new_stream), ("b.arrow", feather.new_file)):
        with open_it(str(tmp_path / name), table.schema) as sink:
            sink.write_table(table)
    for name in ("a.parquet", "a.arrow", "b.arrow"):
        assert [one["output"] for one in rows_of(tmp_path / name)] == ["我是北大助手", None, None]
    (tmp_path / "a.txt").write_bytes("第一\u2028行\r\n\r\n  第二行\n".encode("gb18030"))
    assert rows_of(tmp_path / "a.txt") == [{"text": "第一\u2028行"}, {"text": "  第二行"}]
    (tmp_path / "one.json").write_text(json.dumps(row(), indent=2))
    assert rows_of(tmp_path / "one.json") == [row()]


def test_a_column_of_several_types_that_nobody_uses_is_left_out(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [row() | {"id": 1}, row() | {"id": "x"}])
    found = check(file, "alpaca", {}, "sft")
    assert found.convert.startswith("'id' is of several types")
    assert not check(jsonl(tmp_path / "b.jsonl", [row() | {"id": 1}, row() | {"id": 2.5}]), "alpaca", {}, "sft").convert


@pytest.mark.parametrize("form", ["lines", "list", "pretty", "csv", "txt", "gb18030"])
def test_a_large_file_streams_and_its_beginning_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    many = [row(f"问 {number} ]}},", "答") for number in range(500)]
    texts = {
        "lines": "\n".join(json.dumps(one, ensure_ascii=False) for one in many),
        "gb18030": "\n".join(json.dumps(one, ensure_ascii=False) for one in many),
        "list": json.dumps(many, ensure_ascii=False),
        "pretty": json.dumps(many, ensure_ascii=False, indent=1),
        "csv": "instruction,input,output\n" + '"问",,答\n' * 500,
        "txt": "文字\n" * 500,
    }
    path = tmp_path / f"a.{form if form in ('csv', 'txt') else 'json'}"
    path.write_text(texts[form], encoding="gb18030" if form == "gb18030" else "utf-8")
    small = rows_of(path)
    for module in (encoding, tables):
        monkeypatch.setattr(module, "SMALL", 100)
    monkeypatch.setattr("pkuslurm.payload.rows.SMALL", 100)
    assert rows_of(path) == small and len(small) == 500
    table = open_table(path)
    assert table is not None
    entry = {"columns": {"prompt": "text"}} if form == "txt" else {}
    with closing(table):
        found = look(path, table, "alpaca", entry, "pt" if form == "txt" else "sft", None, 100)
    assert (found.looked_at, found.rows) == (100, 500 if form == "lines" else None)


@pytest.mark.parametrize("end", ["", "]x", ",", ",]", "}", "] 1"])
def test_a_large_list_that_ends_badly_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(encoding, "SMALL", 10)
    (tmp_path / "a.json").write_text(json.dumps([row(), row()])[:-1] + end)
    with pytest.raises(BadData, match=r"row [23] is not JSON|after row 2 it is not JSON"):
        rows_of(tmp_path / "a.json")


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
    found = steps(rows, args, ranks)
    assert (found["per_epoch"], found["total"]) == (per_epoch, total)


TUTORIAL = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 20,
    "logging_steps": 1,
}
FEW = "9 steps are few to learn anything (under 30): raise train.num_train_epochs, or lower"


@pytest.mark.parametrize(
    ("rows", "more", "line", "warnings"),
    [
        (91, {}, "91 rows, 2 × 2 × 8 = 32 rows a step, 20 epochs = 60 steps", []),
        (91, {"num_train_epochs": 3}, "91 rows, 2 × 2 × 8 = 32 rows a step, 3 epochs = 9 steps", [FEW]),
        (91, {"max_steps": 100}, "91 rows, 2 × 2 × 8 = 32 rows a step, max_steps = 100 steps (33.3 epochs)", []),
        (
            100,
            {"max_samples": 91, "val_size": 0.1},
            "81 rows (max_samples of 100, 10 of 91 are held out by val_size=0.1), "
            "2 × 2 × 8 = 32 rows a step, 20 epochs = 60 steps",
            [],
        ),
        (
            12,
            {"val_size": 2, "num_train_epochs": 40, "per_device_train_batch_size": 2},
            "10 rows (2 of 12 are held out by val_size=2), 2 × 2 × 2 × 8 = 64 rows a step, 40 epochs = 40 steps",
            ["one step takes 64 rows and there are 10: lower"],
        ),
        (91, {"stage": "pt"}, "91 rows, packed to blocks of 2048 tokens: prepare counts the steps", []),
        (
            1,
            {"num_train_epochs": 1, "gradient_accumulation_steps": 1},
            "1 row, 2 × 2 × 1 = 4 rows a step, 1 epoch = 1 step",
            ["one step takes 4 rows and there is 1: lower", "1 step is few to learn anything"],
        ),
        (91, {"gradient_accumulation_steps": 1}, "91 rows, 2 × 2 × 1 = 4 rows a step, 20 epochs = 460 steps", []),
    ],
)
def test_the_arithmetic_in_words(rows: int, more: dict[str, Any], line: str, warnings: list[str]) -> None:
    lines, warned = step_lines(rows, TUTORIAL | more, 2, 2)
    assert lines == [line]
    assert len(warned) == len(warnings)
    assert all(one.startswith(start) for one, start in zip(warned, warnings, strict=True))


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ({}, False),
        ({"logging_steps": 60}, False),
        ({"logging_steps": 61}, True),
        ({"logging_steps": None}, True),
        ({"logging_steps": None, "max_steps": 500}, False),
        ({"logging_steps": 0.1}, False),
        ({"logging_steps": 100, "logging_first_step": True}, False),
        ({"logging_steps": 100, "logging_strategy": "epoch"}, False),
    ],
)
def test_a_training_that_logs_no_loss_is_said(more: dict[str, Any], warned: bool) -> None:
    args = {key: value for key, value in (TUTORIAL | more).items() if value is not None}
    _, warnings = step_lines(91, args, 2, 2)
    words = f"train.logging_steps is {args.get('logging_steps', 500)} and the run has 60 steps: no loss is logged"
    assert [one.startswith(words) for one in warnings] == [True] * warned


def test_held_out_rows_are_those_that_datasets_holds_out() -> None:
    from pkuslurm.payload.steps import train_rows

    assert train_rows(10, {"val_size": 20})[0] == 0
    assert step_lines(10, {"val_size": 20}, 1, 1)[0] == []
