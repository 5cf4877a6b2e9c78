"""Is the data what LLaMA-Factory wants? It drops bad rows with a warning that nobody reads, or dies in a worker.

Here every row is looked at first: what would crash is refused by its number, what would be dropped is counted.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# LLaMA-Factory's names of columns and of roles where dataset_info.json says nothing
_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


class BadData(Exception):
    """What is wrong with the file, in one line that names the row and what to do."""


@dataclass
class Checked:
    """``rows`` in the file (None where only LLaMA-Factory can read it); ``dropped``: reason -> number of rows."""

    formatting: str
    rows: int | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)


def check(file: str, formatting: str, entry: dict[str, Any], stage: str, most: int | None = None) -> Checked:
    """Read ``file`` and look at its rows (the first ``most``, if given) as ``entry`` of dataset_info.json describes
    them. Only the answers' side of stage ``sft`` is judged; other stages are left to LLaMA-Factory.

    Raises BadData where the training would fail, or where no row would be left.
    """
    path = Path(file)
    if not path.is_file():
        raise BadData(f"{file}: there is no such file")
    rows = read(path)
    if rows is None:
        return Checked("alpaca" if formatting == "auto" else formatting)
    if not rows:
        raise BadData(f"{file}: it holds no row")
    if formatting == "auto":
        formatting = "sharegpt" if "conversations" in rows[0] else "alpaca"
    checked = Checked(formatting, len(rows))
    if stage != "sft" or entry.get("ranking") or formatting not in ("alpaca", "sharegpt"):
        return checked
    # a block of columns or tags resets those that it leaves out
    columns = entry.get("columns") or _COLUMNS
    rows = rows[:most] if most else rows
    try:
        if formatting == "alpaca":
            _alpaca(rows, columns, checked)
        else:
            _sharegpt(rows, columns, entry.get("tags") or _TAGS, checked)
    except BadData as error:
        raise BadData(f"{file}: {error}") from None
    dropped = sum(checked.dropped.values())
    reasons = ", ".join(f"{number} {reason}" for reason, number in checked.dropped.most_common())
    if dropped >= len(rows):
        raise BadData(f"{file}: none of {len(rows)} rows can be used ({reasons})")
    if dropped:
        checked.warnings.append(f"{dropped} of {len(rows)} rows are dropped: {reasons}")
    return checked


def read(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a json, jsonl or csv file; None for a form that needs a library. Raises BadData."""
    if path.suffix not in (".json", ".jsonl", ".csv"):
        return None
    try:
        data = path.read_bytes()
        if data.startswith(b"\xef\xbb\xbf") and path.suffix != ".csv":
            raise BadData(f"{path}: it begins with a byte order mark; save it as UTF-8 without one")
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadData(f"{path}: it is not UTF-8 (GBK?); save it as UTF-8") from None
    except OSError as error:
        raise BadData(f"{path}: it cannot be read ({error.strerror})") from None
    if path.suffix == ".csv":
        return list(csv.DictReader(text.removeprefix("\ufeff").splitlines(keepends=True)))
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise BadData(f"{path}: it is not JSON ({error})") from None
        where = "row"
    else:
        rows, where = _lines(path, text), "line"
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BadData(f"{path}: {where} {number} is no object {{…}}")
    if len(rows) == 1 and any(isinstance(v, list) and v and isinstance(v[0], dict) for v in rows[0].values()):
        inner = [key for key, value in rows[0].items() if isinstance(value, list)]
        if len(rows[0]) == 1 and inner != ["conversations"] and inner != ["messages"]:
            raise BadData(f"{path}: its rows are inside {inner[0]!r}; the file must be the list itself")
    return list(rows)


def _lines(path: Path, text: str) -> list[Any]:
    rows = []
    # not splitlines(): U+2028 inside a text ends no line of JSON
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == 1:
                # one object over many lines
                try:
                    return [json.loads(text)]
                except ValueError:
                    pass
            raise BadData(f"{path}: line {number} is not JSON ({error})") from None
    return rows


def _alpaca(rows: list[dict[str, Any]], columns: dict[str, Any], checked: Checked) -> None:
    names = {name for row in rows for name in row}
    for role in ("prompt", "query", "response", "system", "history"):
        column = columns.get(role)
        if column and column not in names:
            found = ", ".join(sorted(names)[:8])
            hint = f"name the columns by dataset.columns={{{', '.join(_guess(columns, names))}}}"
            raise BadData(f"no row has the column {column!r} (found: {found}); {hint}")
    for role in ("prompt", "query", "system"):
        _texts(rows, columns.get(role))
    response = columns.get("response")
    if not response:
        raise BadData("dataset.columns names no response: there is nothing to learn")
    _texts(rows, response)
    empty = 0
    for row in rows:
        if row.get(response) is None:
            checked.dropped["without an answer"] += 1
        elif not row[response].strip():
            empty += 1
    if empty:
        checked.warnings.append(f"{empty} rows have an empty answer: they teach to say nothing")


def _guess(columns: dict[str, Any], names: set[str]) -> list[str]:
    """``role: column`` for those that are there, with the usual other names."""
    usual = {
        "prompt": ("instruction", "prompt", "question", "query", "input", "text"),
        "response": ("output", "response", "answer", "completion", "target"),
    }
    found = []
    for role, words in usual.items():
        known = next((word for word in (columns.get(role), *words) if word in names), f"<{role}>")
        found.append(f"{role}: {known}")
    return found


def _texts(rows: list[dict[str, Any]], column: str | None) -> None:
    """A column holds text or nothing: numbers among texts break the table, and numbers alone are no answers."""
    for number, row in enumerate(rows, 1):
        if column and not isinstance(row.get(column), str | None):
            kind = type(row[column]).__name__
            raise BadData(f"row {number}: {column!r} is no text but {kind}; write it as a text")


def _sharegpt(rows: list[dict[str, Any]], columns: dict[str, Any], tags: dict[str, Any], checked: Checked) -> None:
    messages_of = columns.get("messages") or "conversations"
    role_of, text_of = tags.get("role_tag"), tags.get("content_tag")
    asks = {tags.get("user_tag"), tags.get("observation_tag")} - {None}
    answers = {tags.get("assistant_tag"), tags.get("function_tag")} - {None}
    if not role_of or not text_of or not asks or not answers:
        raise BadData("dataset.tags must name role_tag, content_tag, user_tag and assistant_tag")
    for number, row in enumerate(rows, 1):
        messages = row.get(messages_of)
        if not isinstance(messages, list):
            raise BadData(f"row {number}: {messages_of!r} is no list of messages")
        roles = []
        for message in messages:
            if not isinstance(message, dict) or role_of not in message:
                raise BadData(f"row {number}: a message without {role_of!r}; is it another form? see dataset.tags")
            if not isinstance(message.get(text_of), str):
                raise BadData(f"row {number}: a message whose {text_of!r} is no text")
            roles.append(message[role_of])
        if roles and tags.get("system_tag") and roles[0] == tags["system_tag"]:
            roles = roles[1:]
        if not roles:
            checked.dropped["without a message"] += 1
        elif any(role not in (answers if turn % 2 else asks) for turn, role in enumerate(roles)):
            checked.dropped["whose roles do not alternate"] += 1
        elif len(roles) % 2:
            checked.dropped["that end with a question"] += 1
