"""A data file as it comes: what its columns mean, what will be trained, or one line that says what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.config.schema import Dataset
from pkuslurm.errors import PkuslurmError
from pkuslurm.preflight.datasets import Found, find_dataset

OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
ROW = {"instruction": "问", "input": "", "output": "答"}
Find = Callable[..., Found]


def dumped(*rows: object) -> bytes:
    return json.dumps(rows, ensure_ascii=False).encode()


def said(*pairs: tuple[str, str], role: str = "from", text: str = "value") -> list[dict[str, str]]:
    return [{role: who, text: what} for who, what in pairs]


@pytest.fixture
def find(weird: Path) -> Find:
    """find_dataset of a file with these bytes, in a hostile folder."""

    def find_it(file: str, data: bytes, stage: str = "sft", most: int | None = None, **keys: Any) -> Found:
        (weird / file).write_bytes(data)
        given = {"path": str(weird / file), "name": None, "formatting": "auto", "columns": None, "tags": None}
        return find_dataset(Dataset(**(given | keys)), stage, most)

    return find_it


def entry_of(found: Found) -> dict[str, Any]:
    entry = dict(found.info[found.name])
    assert entry.pop("file_name") == str(found.file)
    return entry


ASKED = said(("human", "q"), ("gpt", "a"))
OPENAI = said(("system", "s"), ("user", "q"), ("assistant", "a"), role="role", text="content")
TOOLS = said(("user", "q"), ("function", "f"), ("tool", "t"), ("assistant", "a"), role="role", text="content")
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "stage", "entry"),
    [
        (ROW, "sft", {"formatting": "alpaca"}),
        ({"instruction": "q", "output": "a"}, "sft", {"prompt": "instruction", "response": "output"}),
        (
            ROW | {"system": "s"},
            "sft",
            {"prompt": "instruction", "query": "input", "response": "output", "system": "system"},
        ),
        ({"prompt": "q", "response": "a"}, "sft", {"prompt": "prompt", "response": "response"}),
        ({"prompt": "q", "completion": "a", "id": 1}, "sft", {"prompt": "prompt", "response": "completion"}),
        ({"question": "q", "answer": "a"}, "sft", {"prompt": "question", "response": "answer"}),
        ({"Question ": "q", " ANSWER": "a"}, "sft", {"prompt": "Question ", "response": " ANSWER"}),
        ({"问题": "q", "答案": "a"}, "sft", {"prompt": "问题", "response": "答案"}),
        ({"问": "q", "答": "a"}, "sft", {"prompt": "问", "response": "答"}),
        ({"instruction": "q", "response": "a"}, "sft", {"prompt": "instruction", "response": "response"}),
        ({"query": "q", "response": "a"}, "sft", {"prompt": "query", "response": "response"}),
        ({"input": "q", "output": "a"}, "sft", {"prompt": "input", "response": "output"}),
        ({"text": "long"}, "pt", {"prompt": "text"}),
        ({"id": "7", "content": "long"}, "pt", {"prompt": "content"}),
        ({"whatever": "long"}, "pt", {"prompt": "whatever"}),
        (PAIR, "dpo", {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}),
        (PAIR, "rm", {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}),
        (
            {"prompt": "q", "completion": "a", "label": True},
            "kto",
            {"prompt": "prompt", "response": "completion", "kto_tag": "label"},
        ),
        ({"conversations": ASKED}, "sft", {"formatting": "sharegpt"}),
        ({"conversations": ASKED, "system": "s"}, "sft", {"messages": "conversations", "system": "system"}),
        ({"messages": ASKED}, "sft", {"messages": "messages"}),
        (
            {"conversations": ASKED[:1], "chosen": ASKED[1], "rejected": ASKED[1]},
            "dpo",
            {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        ),
        ({"conversations": OPENAI}, "sft", {"formatting": "sharegpt", "tags": OPENAI_TAGS}),
        (
            {"messages": OPENAI},
            "sft",
            {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": OPENAI_TAGS},
        ),
        (
            {"messages": TOOLS},
            "sft",
            {
                "formatting": "sharegpt",
                "columns": {"messages": "messages"},
                "tags": OPENAI_TAGS | {"observation_tag": "tool", "function_tag": "function"},
            },
        ),
    ],
)
def test_what_columns_mean_is_told(find: Find, row: dict[str, Any], stage: str, entry: dict[str, Any]) -> None:
    found = find("rows.json", dumped(row, row), stage)
    got = entry_of(found)
    if "formatting" not in entry:
        assert got.pop("formatting") == ("sharegpt" if "messages" in entry else "alpaca")
        assert got.pop("ranking", False) == (stage in ("dpo", "rm"))
        got = got["columns"]
    assert got == entry
    assert found.formatting == found.info["rows"]["formatting"]
    assert (found.rows, found.usable, found.convert) == (2, 2, False)
    assert found.notes[0].startswith("rows.json: column")
    assert found.first


def test_what_was_told_is_said_and_the_first_row_shown(find: Find) -> None:
    found = find("rows.json", dumped({"question": "问\n题", "answer": "答", "id": 1}))
    assert found.notes == ("rows.json: columns question, answer are read as prompt and response; not used: id",)
    assert found.first == "user: 问\\n题\nassistant: 答"
    found = find("rows.json", dumped({"messages": OPENAI}))
    assert found.notes == ("rows.json: column messages is read as messages of user and assistant",)
    assert found.first == "system: s\nuser: q\nassistant: a"
    assert find("rows.json", dumped(ROW), formatting="alpaca").notes == ()


def test_rows_that_will_be_dropped_are_counted(find: Find) -> None:
    wrong = {"conversations": said(("gpt", "a"), ("human", "q"))}
    right = {"conversations": ASKED}
    found = find("rows.jsonl", b"\n".join(dumped(one)[1:-1] for one in (wrong, right, wrong, {"conversations": []})))
    assert dict(found.dropped) == {"whose roles do not alternate": 2, "without a message": 1}
    assert found.usable == 1
    assert found.notes[-1] == "3 of 4 rows are dropped: 2 whose roles do not alternate, 1 without a message"
    found = find("rows.json", dumped(ROW, ROW, {"instruction": "q", "output": None}), most=2)
    assert (found.rows, found.usable, dict(found.dropped)) == (3, 3, {})


@pytest.mark.parametrize(
    ("row", "keys", "entry"),
    [
        (
            {"a": "q", "b": "r"},
            {"columns": {"prompt": "a", "response": "b"}},
            {"columns": {"prompt": "a", "response": "b"}},
        ),
        ({"a": "q", "answer": "r"}, {"columns": {"prompt": "a"}}, {"columns": {"prompt": "a", "response": "answer"}}),
        (
            PAIR,
            {"columns": {"prompt": "prompt", "response": "chosen"}},
            {"columns": {"prompt": "prompt", "response": "chosen"}},
        ),
        (
            {"a": "q", "b": "x", "c": "y"},
            {"stage": "dpo", "columns": {"prompt": "a", "chosen": "b", "rejected": "c"}},
            {"columns": {"prompt": "a", "chosen": "b", "rejected": "c"}, "ranking": True},
        ),
        ({"talk": OPENAI}, {"columns": {"messages": "talk"}}, {"columns": {"messages": "talk"}, "tags": OPENAI_TAGS}),
        (
            {"messages": said(("A", "q"), ("B", "r"), role="role", text="says")},
            {"tags": {"role_tag": "role", "content_tag": "says", "user_tag": "A", "assistant_tag": "B"}},
            {
                "columns": {"messages": "messages"},
                "tags": {"role_tag": "role", "content_tag": "says", "user_tag": "A", "assistant_tag": "B"},
            },
        ),
    ],
)
def test_the_users_own_words_win(find: Find, row: dict[str, Any], keys: dict[str, Any], entry: dict[str, Any]) -> None:
    got = entry_of(find("rows.json", dumped(row), **keys))
    got.pop("formatting")
    assert got == entry


@pytest.mark.parametrize(
    ("name", "data", "keys", "words"),
    [
        (
            "r.json",
            dumped({"a": "q", "b": "r"}),
            {},
            "no column looks like the question; the columns are a, b: name them by 'dataset.columns={prompt: …,",
        ),
        (
            "r.json",
            dumped({"question": "q", "b": "r"}),
            {},
            "no column looks like the answer; the columns are question, b",
        ),
        (
            "r.json",
            dumped({"question": "q", "prompt": "p", "answer": "r"}),
            {},
            "prompt or question could be the question",
        ),
        (
            "r.json",
            dumped({"question": "q", "answer": "p", "response": "r"}),
            {},
            "response or answer could be the answer",
        ),
        (
            "r.json",
            dumped({"messages": ASKED, "conversations": ASKED}),
            {},
            "which column holds the messages cannot be told",
        ),
        ("r.json", dumped({"messages": said(("human", "q"), ("user", "q"), ("gpt", "a"))}), {}, "of human and of user"),
        ("r.json", dumped({"messages": said(("x", "q"), ("y", "a"))}), {}, "messages are of x, y; say who asks"),
        (
            "r.json",
            dumped({"messages": said(("user", "q"), ("assistent", "a"))}),
            {},
            "assistent is none, did you mean assistant? say who asks",
        ),
        ("r.json", dumped({"messages": [{"wer": "x", "was": "y"}]}, {}), {}, "its messages have wer, was"),
        ("r.json", dumped({"text": "x"}), {}, "plain text only, and train.stage=sft"),
        ("r.txt", b"text\n", {}, "write train.stage=pt"),
        ("r.json", dumped(ROW), {"stage": "pt"}, "train.stage=pt learns plain text from one column, and it"),
        ("r.json", dumped({"messages": ASKED}), {"stage": "pt"}, "its rows are messages; use train.stage=sft"),
        ("r.json", dumped(ROW), {"stage": "dpo"}, "train.stage=dpo learns from pairs"),
        ("r.json", dumped(PAIR), {}, "use train.stage=dpo"),
        (
            "r.json",
            dumped(ROW),
            {"columns": {"promt": "a"}},
            "dataset.columns.promt: no such name; did you mean prompt?",
        ),
        ("r.json", dumped(ROW), {"columns": {"question": "prompt"}}, "it goes {prompt: question}"),
        ("r.json", dumped(ROW), {"tags": {"role": "a"}}, "dataset.tags.role: no such name; did you mean role_tag?"),
        ("r.json", dumped(ROW), {"columns": {"prompt": 3}}, "dataset.columns.prompt=3: it must be the name"),
        ("r.json", dumped(ROW), {"columns": {"prompt": "instuction"}}, "dataset.columns.prompt=instuction: "),
        ("r.json", dumped(ROW), {"columns": {"prompt": "instuction"}}, "did you mean instruction?"),
        ("r.json", dumped(ROW), {"name": "a,b"}, "dataset.name=a,b: one dataset"),
        ("r.json", dumped(ROW | {"output": 3}), {}, "row 1: 'output' is no text but int"),
        ("r.json", dumped(*[ROW | {"output": None}] * 12), {}, "none of 12 rows can be used (12 without an answer)"),
        ("r.json", b"[]", {}, "it holds no row"),
        ("r.json", b"", {}, "the file is empty"),
        ("r.json", b'[{"a": 1},\n{"b"]', {}, "it is not JSON (Expecting ':' delimiter: line 2, column"),
        ("r.jsonl", dumped(ROW)[1:-1] + b"\n{", {}, "line 2 is not JSON"),
        ("r.json", b'["a"]', {}, "row 1 is no object"),
        ("r.json", b'{"data": [{"instruction": "q"}]}', {}, "its rows are inside 'data'"),
        ("r.xlsx", b"PK", {}, "另存为 → CSV UTF-8"),
        ("r.XLS", b"x", {}, "另存为 → CSV UTF-8"),
        ("r.ods", b"x", {}, "另存为 → CSV UTF-8"),
        ("r.docx", b"x", {}, "save its text as .txt"),
        ("r.json.gz", b"x", {}, "unpack it"),
        ("r.zip", b"x", {}, "unpack it"),
        ("r.md", b"x", {}, "data comes as .json"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    find: Find, name: str, data: bytes, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(PkuslurmError) as caught:
        find(name, data, **keys)
    message = str(caught.value)
    assert words in message
    assert message.startswith("dataset.") and "\n" not in message


@pytest.mark.parametrize(
    ("name", "data", "note"),
    [
        ("r.csv", "问题,答案\n你好,007\n".encode("gb18030"), "r.csv is GB18030: converted to UTF-8"),
        (
            "r.json",
            b"\xef\xbb\xbf" + dumped({"问题": "你好", "答案": "007"}),
            "r.json is UTF-8 with a byte order mark: conv",
        ),
        ("r.jsonl", '{"问题": "你好", "答案": "007"}'.encode("utf-16"), "r.jsonl is UTF-16: converted to UTF-8"),
        ("r.csv", "问题,答案\n你好,007\n".encode(), "r.csv is written anew as lines of JSON: numbers"),
        ("r.tsv", "问题\t答案\n你好\t007\n".encode(), "r.tsv is written anew"),
        (
            "r.JSONL",
            '{"问题": "你好", "答案": "007"}'.encode(),
            "r.JSONL is written anew as lines of JSON: .JSONL is no suffix",
        ),
    ],
)
def test_what_prepare_must_write_anew_is_said(find: Find, name: str, data: bytes, note: str) -> None:
    found = find(name, data)
    assert found.convert and found.notes[1].startswith(note)
    assert entry_of(found) == {"formatting": "alpaca", "columns": {"prompt": "问题", "response": "答案"}}
    assert found.first == "user: 你好\nassistant: 007"


def test_a_parquet_file_is_looked_at_where_that_can_be(
    find: Find, weird: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"question": "q", "answer": "a"}] * 3), weird / "r.parquet")
    data = (weird / "r.parquet").read_bytes()
    found = find("r.parquet", data)
    assert (found.rows, found.first, found.convert) == (3, "user: q\nassistant: a", False)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    found = find("r.parquet", data, columns={"prompt": "question", "response": "answer"})
    assert (found.rows, found.usable) == (None, None)
    assert found.notes == ("r.parquet: it cannot be looked at here (no pyarrow); prepare does",)
    assert entry_of(found)["columns"] == {"prompt": "question", "response": "answer"}


def folder_of(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def found_in(folder: Path, name: str | None = None, **keys: Any) -> Found:
    given = {"path": str(folder), "name": name, "formatting": "auto", "columns": None, "tags": None}
    return find_dataset(Dataset(**(given | keys)))


def test_a_folder_with_one_data_file_or_a_description(weird: Path) -> None:
    folder_of(weird, a__json=[ROW], README__md=b"x")
    assert found_in(weird).file == weird / "a.json"
    (weird / "sub").mkdir()
    folder_of(weird / "sub", b__json=[{"q": "x", "a": "y"}] * 2)
    mine = {"file_name": "sub/b.json", "columns": {"prompt": "q", "response": "a"}, "num_samples": 7}
    openai = {"file_name": "c.json", "formatting": "openai"}
    folder_of(weird, dataset_info__json={"mine": mine, "talk": openai}, c__json=[{"messages": OPENAI}])
    found = found_in(weird, "mine")
    assert (found.name, found.file, found.rows) == ("mine", weird / "sub" / "b.json", 7)
    assert entry_of(found) == {"formatting": "alpaca", "columns": {"prompt": "q", "response": "a"}, "num_samples": 7}
    assert entry_of(found_in(weird / "dataset_info.json", "mine"))["columns"] == mine["columns"]
    own = found_in(weird, "mine", columns={"prompt": "a", "response": "q"})
    assert entry_of(own)["columns"] == {"prompt": "a", "response": "q"}
    talk = entry_of(found_in(weird, "talk"))
    assert (talk["formatting"], talk["tags"]) == ("sharegpt", OPENAI_TAGS)
    folder_of(weird, dataset_info__json={"talk": openai})
    assert found_in(weird).name == "talk"


@pytest.mark.parametrize(
    ("files", "name", "words"),
    [
        ({}, None, "one data file is wanted there, found none"),
        ({"a__json": [ROW], "b__csv": b"x"}, None, "found a.json, b.csv; name the file"),
        ({"a__xlsx": b"x"}, None, "另存为"),
        ({"dataset_info__json": {"a": {}, "b": {}}}, None, "describes a, b; name one by dataset.name"),
        ({"dataset_info__json": {"a": {}, "b": {}}}, "c", "dataset.name=c: "),
        (
            {"dataset_info__json": {"a": {"hf_hub_url": "x/y"}}},
            None,
            "has it at hf_hub_url=x/y, and nothing is downloaded",
        ),
        ({"dataset_info__json": {"a": {}}}, None, "has no file_name"),
        ({"dataset_info__json": {"a": {"file_name": "no.json"}}}, None, "no.json is not there"),
        ({"dataset_info__json": {"a": {"file_name": "x", "columns": []}}}, None, "columns of its entry"),
        ({"dataset_info__json": [1]}, None, "an object of objects"),
        ({"dataset_info__json": b"{"}, None, "is not JSON"),
    ],
)
def test_a_folder_that_cannot_be_told(weird: Path, files: dict[str, object], name: str | None, words: str) -> None:
    folder_of(weird, **files)
    with pytest.raises(PkuslurmError) as caught:
        found_in(weird, name)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_data_below_a_folder_is_named(weird: Path) -> None:
    (weird / "data").mkdir()
    folder_of(weird / "data", train__json=[ROW])
    with pytest.raises(PkuslurmError, match=r"found data/train\.json; name the file"):
        found_in(weird)


def test_no_file_and_no_plain_file(weird: Path) -> None:
    with pytest.raises(PkuslurmError, match="there is no such file or folder"):
        found_in(weird / "no.json")
    os.mkfifo(weird / "pipe.json")
    with pytest.raises(PkuslurmError, match="is no plain file"):
        found_in(weird / "pipe.json")


def test_a_file_that_may_not_be_read(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(PkuslurmError, match=r"it cannot be read \(Permission denied\)"):
        find("r.json", dumped(ROW))


def test_of_a_large_file_the_beginning_is_looked_at(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("encoding", "tables", "rows"):
        monkeypatch.setattr(f"pkuslurm.payload.{module}.SMALL", 100)
    monkeypatch.setattr("pkuslurm.preflight.datasets.LIMIT", 2000)
    lines = [json.dumps({"question": str(number), "answer": "a"}) for number in range(3000)]
    found = find("r.jsonl", "\n".join(lines).encode())
    assert (found.rows, found.usable) == (3000, 3000)
    assert found.notes[1] == "r.jsonl: it is large; its first 2,000 rows were looked at, prepare looks at all"


def test_a_named_column_may_begin_late(find: Find) -> None:
    late = [{"q": "a", "r": "b"}] * 1200 + [{"q": "a", "r": "b", "s": "c"}]
    columns = {"prompt": "q", "response": "r", "system": "s"}
    assert find("rows.json", dumped(*late), columns=columns).rows == 1201
    with pytest.raises(PkuslurmError, match="no row has the column 'x'"):
        find("rows.json", dumped(*late), columns=columns | {"system": "x"})


def test_the_nearest_name_or_the_first_missing_part_is_said(tmp_path: Path) -> None:
    folder_of(tmp_path, messages__jsonl=[ROW])
    with pytest.raises(PkuslurmError, match=r"no such file or folder; did you mean messages.jsonl\?$"):
        found_in(tmp_path / "mesages.json")
    with pytest.raises(PkuslurmError, match=r"no such file or folder; \S*/none is missing already$"):
        found_in(tmp_path / "none" / "below" / "a.json")
