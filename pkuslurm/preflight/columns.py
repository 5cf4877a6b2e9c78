"""What the columns of a data file mean, told by their names and by the first rows. Pure.

LLaMA-Factory reads two forms: a question and an answer in columns (alpaca), or a list of messages (sharegpt). Both are
described by an entry of dataset_info.json, in which a block of columns or tags resets those that it leaves out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pkuslurm.errors import PkuslurmError
from pkuslurm.payload.entry import COLUMNS, RANKING, TAGS

Rows = Sequence[Mapping[str, Any]]

# by the names of so many rows the columns are told
HEAD = 1000
COLUMN_ROLES = (
    "prompt", "query", "response", "history", "messages", "system", "tools", "images", "videos", "audios", "chosen",
    "rejected", "kto_tag",
)  # fmt: skip
# what people call a column, the usual name first; compared in lower case, without spaces around
_PROMPT = ("instruction", "prompt", "question", "query", "user", "问题", "提问", "问", "指令", "提示")
_RESPONSE = ("output", "response", "completion", "answer", "assistant", "答案", "回答", "答复", "答", "回复", "输出")
_INPUT = ("input", "输入")
_TEXT = ("text", "content", "document", "文本", "内容", "正文")
_MESSAGES = ("conversations", "messages", "conversation", "dialogue", "对话")
_MORE = {"system": ("system", "system_prompt", "系统提示"), "history": ("history", "历史"), "tools": ("tools",)}
_RANKING = {"chosen": ("chosen",), "rejected": ("rejected",)}
_KTO = ("kto_tag", "label")
_ROLE_OF = ("from", "role")
_TEXT_OF = ("value", "content", "text")
_SPEAKERS = {
    "user_tag": ("human", "user", "用户", "问"),
    "assistant_tag": ("gpt", "assistant", "bot", "model", "助手", "答"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function"),
    "system_tag": ("system", "系统"),
}


@dataclass(frozen=True)
class Described:
    """``entry``: formatting, columns, tags, ranking as in dataset_info.json; ``notes``: what was told, in words."""

    entry: dict[str, Any]
    notes: tuple[str, ...] = ()


def check_roles(columns: Mapping[str, Any] | None, tags: Mapping[str, Any] | None) -> None:
    """Refuse names that LLaMA-Factory does not know; it would ignore them."""
    for key, given, known in (("columns", columns, COLUMN_ROLES), ("tags", tags, tuple(TAGS))):
        for role, value in (given or {}).items():
            if role not in known:
                near = difflib.get_close_matches(str(role), known, 1)
                swapped = isinstance(value, str) and value in known
                hint = f"; did you mean {near[0]}?" if near else ""
                hint = f"; it goes {{{value}: {role}}}, our name first" if swapped else hint
                raise PkuslurmError(f"dataset.{key}.{role}: no such name{hint}; known are {', '.join(known)}")
            if value is not None and not isinstance(value, str):
                raise PkuslurmError(f"dataset.{key}.{role}={value}: it must be the name of a column, a text")


def describe(
    file: str,
    rows: Rows,
    given: Mapping[str, Any],
    columns: Mapping[str, Any] | None,
    tags: Mapping[str, Any] | None,
    stage: str,
) -> Described:
    """``given`` (formatting, columns, tags, ranking of a dataset_info.json, or the user's formatting), the user's own
    ``columns`` and ``tags`` over it, and the rest from ``rows``. ``file`` is for words only. Raises PkuslurmError.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    entry = dict(given)
    if entry.get("formatting") == "openai":
        entry["formatting"] = "sharegpt"  # openai's converter puts "detailed thinking off" before every question
        entry.setdefault("columns", {"messages": "messages"})
        entry.setdefault("tags", _message_tags(file, rows, entry["columns"].get("messages", "messages")))
    own = {role: column for role, column in (columns or entry.get("columns") or {}).items() if column is not None}
    if tags:
        entry["tags"] = dict(tags)
    if not rows:  # a form that cannot be looked at here
        return Described(_unseen(entry, columns))
    for role, column in own.items():
        if column not in names and len(rows) < HEAD:
            _refuse_column(file, f"dataset.columns.{role}={column}", column, names)
    if set(own) >= {"chosen", "rejected"}:
        entry["ranking"] = True
    formatting = entry.get("formatting") or _formatting(own, names, rows)
    entry = {"formatting": formatting} | entry
    if given.get("columns") and not columns:
        return Described(entry)
    find = _sharegpt if formatting == "sharegpt" else _alpaca
    found, note = find(file, rows, names, own, entry, stage)
    plain = given.get("formatting") and not {"columns", "tags"} & set(found)
    return Described(found, () if plain else (note,))


def _unseen(entry: dict[str, Any], columns: Mapping[str, Any] | None) -> dict[str, Any]:
    if columns:
        entry["columns"] = dict(columns)
        entry.setdefault("formatting", "sharegpt" if "messages" in columns else "alpaca")
        if set(columns) >= {"chosen", "rejected"}:
            entry["ranking"] = True
    return {"formatting": "alpaca"} | entry


def _formatting(own: Mapping[str, Any], names: Sequence[str], rows: Rows) -> str:
    messages = "messages" in own if own else _message_columns(names, rows)
    return "sharegpt" if messages else "alpaca"


def _message_columns(names: Sequence[str], rows: Rows) -> list[str]:
    lists = [name for name in names if any(isinstance(row.get(name), list) for row in rows)]
    return _named(_MESSAGES, lists)


def _sharegpt(
    file: str, rows: Rows, names: Sequence[str], own: Mapping[str, Any], entry: dict[str, Any], stage: str
) -> tuple[dict[str, Any], str]:
    if stage == "pt":
        raise PkuslurmError(
            f"dataset.path={file}: train.stage=pt learns plain text, and its rows are messages; use train.stage=sft"
        )
    found = [own["messages"]] if own.get("messages") else _message_columns(names, rows)
    if len(found) != 1:
        _refuse(file, "which column holds the messages cannot be told" if found else "no column of messages", names)
    columns = {"messages": found[0]} | _more(names, rows, "history")
    if "chosen" not in own and stage in RANKING:
        columns |= _ranking(names)
    columns |= {role: _one(file, _KTO, names) for role in ("kto_tag",) if stage == "kto" and _named(_KTO, names)}
    columns |= own
    tags = entry.get("tags") or _message_tags(file, rows, columns["messages"])
    if {"chosen", "rejected"} <= set(columns):
        entry["ranking"] = True
    if columns != {"messages": COLUMNS["messages"]}:
        entry["columns"] = columns
    if tags != TAGS:
        entry["tags"] = tags
    who = f"{tags.get('user_tag')} and {tags.get('assistant_tag')}"
    return entry, f"column {columns['messages']} is read as messages of {who}"


def _message_tags(file: str, rows: Rows, column: str) -> dict[str, Any]:
    """Which keys hold the role and the text, and which roles there are."""
    messages = [
        message
        for row in rows
        if isinstance(row.get(column), list)
        for message in row[column]
        if isinstance(message, dict)
    ]
    if not messages:
        return dict(TAGS)
    keys = {
        "role_tag": next((key for key in _ROLE_OF if key in messages[0]), None),
        "content_tag": next((key for key in _TEXT_OF if key in messages[0]), None),
    }
    if None in keys.values():
        raise PkuslurmError(
            f"dataset.path={file}: its messages have {', '.join(map(str, messages[0]))}; say which is the role and "
            "which the text: 'dataset.tags={role_tag: …, content_tag: …, user_tag: …, assistant_tag: …}'"
        )
    role_of = keys["role_tag"]
    roles = dict.fromkeys(str(message[role_of]) for message in messages if role_of in message)
    speakers: dict[str, Any] = {}
    openai = role_of == "role"
    for tag, words in _SPEAKERS.items():
        there = [word for word in words if word in roles]
        if len(there) > 1 and tag in ("user_tag", "assistant_tag"):
            raise PkuslurmError(
                f"dataset.path={file}: its messages are of {' and of '.join(there)}; LLaMA-Factory takes one name: "
                f"make them one, or name it by 'dataset.tags={{{tag}: …}}'"
            )
        speakers[tag] = there[0] if there else words[1] if openai and tag in ("user_tag", "assistant_tag") else words[0]
    unknown = [role for role in roles if role not in {word for words in _SPEAKERS.values() for word in words}]
    typos = [
        f"{role} is none, did you mean {near[0]}? "
        for role in unknown
        if (near := difflib.get_close_matches(role, [word for words in _SPEAKERS.values() for word in words], 1, 0.75))
    ]
    if unknown and not ({speakers["user_tag"], speakers["assistant_tag"]} <= set(roles)):
        raise PkuslurmError(
            f"dataset.path={file}: its messages are of {', '.join(roles)}; {''.join(typos)}say who asks and "
            f"who answers: 'dataset.tags={{role_tag: {role_of}, "
            f"content_tag: {keys['content_tag']}, user_tag: …, assistant_tag: …}}'"
        )
    return keys | speakers


def _alpaca(
    file: str, rows: Rows, names: Sequence[str], own: Mapping[str, Any], entry: dict[str, Any], stage: str
) -> tuple[dict[str, Any], str]:
    columns = dict(own)
    if stage == "pt":
        columns.setdefault("prompt", _text_column(file, names))
        entry["columns"] = columns
        return entry, f"column {columns['prompt']} is read as plain text"
    pairs = _ranking(names) if stage in RANKING or entry.get("ranking") else {}
    if pairs or entry.get("ranking"):
        columns = {**pairs, **columns}
        entry["ranking"] = True
    if "prompt" not in columns:
        free = [name for name in names if name not in columns.values()]
        if stage == "sft" and not _named((*_PROMPT, *_INPUT), free) and _named(_TEXT, free):
            raise PkuslurmError(
                f"dataset.path={file}: it holds plain text only, and train.stage=sft learns answers to questions; "
                "write train.stage=pt, or name the columns: 'dataset.columns={prompt: …, response: …}'"
            )
        columns["prompt"] = _one(file, _PROMPT if _named(_PROMPT, free) else _INPUT, free, names)
    inputs = [name for name in _named(_INPUT, names) if name not in columns.values()]
    if len(inputs) == 1 and "query" not in own and "prompt" not in own:
        columns["query"] = inputs[0]
    if "response" not in columns and not entry.get("ranking") and stage != "ppo":
        free = [name for name in names if name not in columns.values()]
        columns["response"] = _one(file, _RESPONSE, free, names, ranked=bool(_ranking(names)) and stage == "sft")
    if stage == "kto" and "kto_tag" not in columns:
        columns["kto_tag"] = _one(file, _KTO, names)
    columns = _ordered({**_more(names, rows, ""), **columns} if "prompt" not in own else columns)
    if columns != {role: COLUMNS[role] for role in ("prompt", "query", "response")}:
        entry["columns"] = columns
    left = [name for name in names if name not in columns.values()]
    notes = [f"columns {', '.join(columns.values())} are read as {_and(columns)}"]
    if left:
        notes.append(f"not used: {', '.join(left[:8])}")
    return entry, "; ".join(notes)


def _ordered(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {role: columns[role] for role in COLUMN_ROLES if role in columns}


def _and(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _text_column(file: str, names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    found = _named(_TEXT, names)
    if len(found) == 1:
        return found[0]
    raise PkuslurmError(
        f"dataset.path={file}: train.stage=pt learns plain text from one column, and it has {', '.join(names)}; "
        "name it: 'dataset.columns={prompt: …}' (for questions and answers: train.stage=sft)"
    )


def _ranking(names: Sequence[str]) -> dict[str, str]:
    found = {role: _named(words, names) for role, words in _RANKING.items()}
    return {role: there[0] for role, there in found.items()} if all(found.values()) else {}


def _more(names: Sequence[str], rows: Rows, without: str) -> dict[str, str]:
    """The system prompt, earlier turns and tools, where they are of the type that LLaMA-Factory reads."""
    columns = {}
    for role, words in _MORE.items():
        kind = list if role == "history" else str
        for name in _named(words, names)[:1]:
            values = [row[name] for row in rows if row.get(name) is not None]
            if role != without and values and all(isinstance(value, kind) for value in values):
                columns[role] = name
    return columns


def _named(words: Sequence[str], names: Iterable[str]) -> list[str]:
    """Of ``names``, those that are one of ``words``, however they are written; exact ones win over others."""
    names = list(names)
    found = {word: [name for name in names if str(name).strip().lower() == word] for word in words}
    return [name for word in words for name in ([word] if word in found[word] else found[word])]


def _one(
    file: str, words: Sequence[str], free: Sequence[str], names: Sequence[str] | None = None, ranked: bool = False
) -> str:
    found = _named(words, free)
    if len(found) == 1:
        return found[0]
    if ranked:
        raise PkuslurmError(
            f"dataset.path={file}: its rows are pairs of answers (chosen, rejected); use train.stage=dpo, or take the "
            "better answer: 'dataset.columns={prompt: …, response: chosen}'"
        )
    what = "answer" if words is _RESPONSE else "label (true or false)" if words is _KTO else "question"
    said = f"{' or '.join(found)} could be the {what}" if found else f"no column looks like the {what}"
    _refuse(file, said, names or free)


def _refuse(file: str, said: str, names: Sequence[str]) -> NoReturn:
    raise PkuslurmError(
        f"dataset.path={file}: {said}; the columns are {', '.join(map(str, names[:12]))}: "
        "name them by 'dataset.columns={prompt: …, response: …}'"
    )


def _refuse_column(file: str, setting: str, column: str, names: Sequence[str]) -> None:
    near = difflib.get_close_matches(column, names, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise PkuslurmError(f"{setting}: {file} has no such column; {hint}it has {', '.join(map(str, names[:12]))}")
