"""Is the data what LLaMA-Factory wants? It drops bad rows with a warning that nobody reads, or dies in a worker.

Here every row is looked at first, by launch and again by prepare: what would crash is refused by its number, what would
be dropped is counted, and the first row that is trained on is shown.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from .entry import RANKING, asked, columns_of, show, tags_of, used_columns
from .tables import SMALL, BadData, Row, Table, open_table

__all__ = ["BadData", "Checked", "check", "look"]


@dataclass
class Checked:
    """``rows`` in the file (None where that cannot be told), of which ``looked_at`` were judged; ``dropped``: reason ->
    number of rows; ``first_empty``: the number of the first empty one; ``convert``: why LLaMA-Factory cannot be given
    the file itself; ``first``: the first usable row.
    """

    formatting: str
    rows: int | None = None
    looked_at: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    first_empty: int = 0
    warnings: list[str] = field(default_factory=list)
    convert: str = ""
    first: str = ""


def check(file: str, formatting: str, entry: Mapping[str, Any], stage: str, most: int | None = None) -> Checked:
    """Read ``file``; look at its rows (the first ``most``, if given) as ``entry`` of dataset_info.json describes them.

    Raises BadData where the training would fail, or where no row would be left.
    """
    path = Path(file)
    if path.is_dir():  # of several files: LLaMA-Factory reads them
        return Checked("alpaca" if formatting == "auto" else formatting)
    if not path.is_file():
        raise BadData(f"{file}: there is no such file")
    table = open_table(path)
    if table is None:
        return Checked("alpaca" if formatting == "auto" else formatting)
    with closing(table):
        head = list(islice(table.rows, 1))
        if formatting == "auto":
            formatting = "sharegpt" if head and "conversations" in head[0] else "alpaca"
        table.rows = chain(head, table.rows)
        return look(path, table, formatting, entry, stage, most)


def look(
    path: Path,
    table: Table,
    formatting: str,
    entry: Mapping[str, Any],
    stage: str,
    most: int | None = None,
    limit: int | None = None,
) -> Checked:
    """Walk ``table`` once. ``limit``: of a large file only so many rows. Raises BadData."""
    checked = Checked(formatting, convert=table.convert)
    judge = _judge(path, formatting, entry, stage, checked)
    if table.size <= SMALL:
        limit = None
    kinds: dict[str, set[type]] = {}
    number = 0
    for row in islice(table.rows, limit):
        number += 1
        for name, value in row.items():
            kinds.setdefault(name, set()).add(type(value))
        if most is not None and number > most:
            continue
        try:
            reason = judge(row)
        except BadData as error:
            raise BadData(f"{path}: row {number}: {error}") from None
        checked.looked_at += 1
        if checked.empty and not checked.first_empty:
            checked.first_empty = number
        if reason:
            checked.dropped[reason] += 1
        elif not checked.first:
            checked.first = show(row, formatting, entry, stage)
    if not number:
        raise BadData(f"{path}: it holds no row")
    checked.rows = table.total(number) if number == limit else number
    _judge_whole(path, checked, kinds, entry, stage)
    return checked


def _judge_whole(
    path: Path, checked: Checked, kinds: Mapping[str, set[type]], entry: Mapping[str, Any], stage: str
) -> None:
    used = used_columns(checked.formatting, entry)
    for column in used.values():
        if column not in kinds:
            found = ", ".join(list(kinds)[:8])
            raise BadData(
                f"{path}: no row has the column {column!r} (found: {found}); "
                "name the columns by 'dataset.columns={prompt: …, response: …}'"
            )
    dropped = checked.dropped.total()
    reasons = ", ".join(f"{number} {reason}" for reason, number in checked.dropped.most_common())
    if dropped + checked.empty >= checked.looked_at:  # nothing but silence is learnt from empty ones
        empty = f"{checked.empty} {'without a text' if stage == 'pt' else 'with an empty answer'}"
        reasons = ", ".join(filter(None, (reasons, empty if checked.empty else "")))
        rows = f"none of {checked.looked_at} rows" if checked.looked_at > 1 else "its only row cannot be used"
        raise BadData(f"{path}: {rows}{' can be used' if checked.looked_at > 1 else ''} ({reasons})")
    if dropped:
        are = "is" if dropped == 1 else "are"
        checked.warnings.append(f"{dropped} of {checked.looked_at} rows {are} dropped: {reasons}")
    if checked.empty == 1:
        checked.warnings.append(f"row {checked.first_empty} is empty or has an empty answer: it teaches to say nothing")
    elif checked.empty:
        checked.warnings.append(
            f"{checked.empty} rows are empty or have an empty answer, row {checked.first_empty} is the first: "
            "they teach to say nothing"
        )
    mixed = [name for name, types in kinds.items() if name not in used.values() and _mixed(types)]
    if mixed and not checked.convert:
        checked.convert = f"{mixed[0]!r} is of several types, which no table can hold; it is left out"


def _mixed(types: set[type]) -> bool:
    return len({float if kind is int else kind for kind in types if kind is not type(None)}) > 1


def _judge(
    path: Path, formatting: str, entry: Mapping[str, Any], stage: str, checked: Checked
) -> Callable[[Row], str | None]:
    """What tells of a row why it will be dropped (None: it is used), and raises BadData where it would crash."""
    columns, tags = columns_of(entry), tags_of(entry)
    pairs = bool(entry.get("ranking"))
    if stage in RANKING and not pairs:
        raise BadData(
            f"{path}: train.stage={stage} learns from pairs of answers (columns prompt, chosen, rejected); "
            "name them by 'dataset.columns={prompt: …, chosen: …, rejected: …}', or use train.stage=sft"
        )
    if pairs and stage not in RANKING:
        raise BadData(
            f"{path}: its rows are pairs of answers (chosen, rejected), which train.stage={stage} does not read; use "
            "train.stage=dpo, or take the better answer: 'dataset.columns={prompt: …, response: …}'"
        )
    answer = _Answer(columns, stage, pairs, checked)
    if formatting == "alpaca":
        if stage in ("sft", "kto") and not columns.get("response"):
            raise BadData(f"{path}: dataset.columns names no response: there is nothing to learn")
        return lambda row: _alpaca(row, columns, answer)
    if formatting == "sharegpt":
        asks = {tags.get("user_tag"), tags.get("observation_tag")} - {None}
        answers = {tags.get("assistant_tag"), tags.get("function_tag")} - {None}
        if not tags.get("role_tag") or not tags.get("content_tag") or not asks or not answers:
            raise BadData(f"{path}: dataset.tags must name role_tag, content_tag, user_tag and assistant_tag")
        return lambda row: _sharegpt(row, columns, tags, asks, answers, answer)
    return lambda row: None


@dataclass(frozen=True)
class _Answer:
    """How a stage finds the answer of a row."""

    columns: Mapping[str, Any]
    stage: str
    pairs: bool
    checked: Checked

    def alpaca(self, row: Row) -> str | None:
        if self.pairs:
            chosen, rejected = (_text(row, self.columns.get(role)) for role in ("chosen", "rejected"))
            return None if chosen is not None and rejected is not None else "without two answers"
        response = _text(row, self.columns.get("response"))
        if self.stage in ("pt", "ppo"):
            return None
        if response is None:
            return "without an answer"
        return self.told(row, response)

    def told(self, row: Row, text: str) -> str | None:
        reason = self.tagged(row)
        if reason is None and not text.strip():
            self.checked.empty += 1
        return reason

    def tagged(self, row: Row) -> str | None:
        tag = self.columns.get("kto_tag")
        return None if not tag or isinstance(row.get(tag), bool) else f"whose {tag!r} is neither true nor false"


def _alpaca(row: Row, columns: Mapping[str, Any], answer: _Answer) -> str | None:
    for role in ("prompt", "query", "system", "tools"):
        _text(row, columns.get(role))
    history = row.get(columns.get("history") or "")
    if isinstance(history, list):
        for pair in history:
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise BadData(f"{columns['history']!r} must be a list of pairs [question, answer]")
    if answer.stage == "pt" and not asked(row, columns).strip():
        answer.checked.empty += 1
    return answer.alpaca(row)


def _text(row: Row, column: str | None) -> str | None:
    """A column holds text or nothing: numbers among texts break the table, and numbers alone are no answers."""
    value = row.get(column) if column else None
    if value is not None and not isinstance(value, str):
        raise BadData(f"{column!r} is no text but {type(value).__name__}; write it as a text")
    return value


def _sharegpt(
    row: Row, columns: Mapping[str, Any], tags: Mapping[str, Any], asks: set[Any], answers: set[Any], answer: _Answer
) -> str | None:
    messages_of = columns.get("messages") or "conversations"
    messages = row.get(messages_of)
    if not isinstance(messages, list):
        raise BadData(f"{messages_of!r} is no list of messages")
    _text(row, columns.get("system"))
    _text(row, columns.get("tools"))
    roles = [_role(message, tags) for message in messages]
    if roles and tags.get("system_tag") and roles[0] == tags["system_tag"]:
        roles = roles[1:]
    if not roles:
        return "without a message"
    known = [str(role) for role in (*asks, *answers)]
    for role in roles:
        if role not in known and (near := difflib.get_close_matches(role, known, 1, 0.75)):
            return f"with the role {role!r} (did you mean {near[0]!r}?)"
    if any(role not in (answers if turn % 2 else asks) for turn, role in enumerate(roles)):
        return "whose roles do not alternate"
    if answer.pairs:
        if len(roles) % 2 == 0:
            return "that end with an answer before the two to choose from"
        pair = [row.get(columns.get(role) or "") for role in ("chosen", "rejected")]
        if any(one is None for one in pair):
            return "without two answers"
        if any(_role(one, tags) not in answers for one in pair):
            raise BadData(f"{columns['chosen']!r} and {columns['rejected']!r} must be answers")
        return None
    if len(roles) % 2:
        return "that end with a question"
    return answer.told(row, messages[-1][tags["content_tag"]])


def _role(message: object, tags: Mapping[str, Any]) -> str:
    role_of, text_of = tags["role_tag"], tags["content_tag"]
    if not isinstance(message, dict) or role_of not in message:
        raise BadData(f"a message without {role_of!r}; is it another form? see dataset.tags")
    if not isinstance(message.get(text_of), str):
        calls = " (tool_calls are not read: write them as text)" if message.get("tool_calls") else ""
        raise BadData(f"a message whose {text_of!r} is no text{calls}")
    role = message[role_of]
    if not isinstance(role, str):
        raise BadData(f"a message whose {role_of!r} is no text")
    return role
