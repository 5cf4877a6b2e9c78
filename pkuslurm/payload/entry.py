"""An entry of LLaMA-Factory's dataset_info.json: what its columns and tags mean, and what a row is by it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Entry = Mapping[str, Any]

# LLaMA-Factory's names of columns and of roles where dataset_info.json says nothing
COLUMNS: dict[str, Any] = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
TAGS: dict[str, Any] = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
# stages whose rows are pairs of answers, told apart by ``ranking`` in dataset_info.json
RANKING = ("dpo", "rm")
MEDIA = ("images", "videos", "audios")
_ROLES = {
    "alpaca": ("prompt", "query", "response", "history", "system", "tools", "chosen", "rejected", "kto_tag", *MEDIA),
    "sharegpt": ("messages", "system", "tools", "chosen", "rejected", "kto_tag", *MEDIA),
}
_SHOWN = 200


def used_columns(formatting: str, entry: Entry) -> dict[str, str]:
    """Role -> column: those that LLaMA-Factory will look up in every row."""
    columns = columns_of(entry)
    return {role: str(columns[role]) for role in _ROLES.get(formatting, _ROLES["sharegpt"]) if columns.get(role)}


def columns_of(entry: Entry) -> Entry:
    # a block of columns or tags resets those that it leaves out
    found: Entry = entry.get("columns", COLUMNS)
    return found


def tags_of(entry: Entry) -> Entry:
    found: Entry = entry.get("tags", TAGS)
    return found


def show(row: Entry, formatting: str, entry: Entry, stage: str) -> str:
    """A row as it will be trained: a line for each message."""
    columns, tags = columns_of(entry), tags_of(entry)
    lines: list[tuple[str, object]] = []
    if columns.get("system") and row.get(columns["system"]):
        lines.append(("system", row[columns["system"]]))
    if formatting == "alpaca":
        for pair in row.get(columns.get("history") or "") or []:
            lines += [("user", pair[0]), ("assistant", pair[1])]
        lines.append(("text" if stage == "pt" else "user", asked(row, columns)))
        if columns.get("response") and stage not in ("pt", "ppo"):
            lines.append(("assistant", row.get(columns["response"])))
    elif formatting == "sharegpt":
        words = {tags.get(f"{word}_tag"): word for word in ("function", "observation", "system", "assistant", "user")}
        for message in row[columns.get("messages") or "conversations"]:
            role = message[tags["role_tag"]]
            lines.append((words.get(role, str(role)), message[tags["content_tag"]]))
    for role in ("chosen", "rejected") if entry.get("ranking") else ():
        answer = row[columns[role]]
        lines.append((role, answer[tags["content_tag"]] if isinstance(answer, dict) else answer))
    return "\n".join(f"{who}: {_cut(str(text))}" for who, text in lines)


def _cut(text: str) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def asked(row: Entry, columns: Entry) -> str:
    return "\n".join(row[name] for role in ("prompt", "query") if (name := columns.get(role)) and row.get(name))
