"""A client's conversation, made one that the engines' chat templates can render. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pkuslurm.serve.refusal import BadRequest

Message = dict[str, Any]

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEXTS = ("text", "input_text", "output_text")
# between what several messages of one role say
_GAP = "\n\n"


def read(value: object) -> list[Message]:
    """The messages, each with a role and a text; what else they have is kept only for calls of tools.

    Where the assistant says nothing at all, as clients echo it, it is left out.
    """
    rows = value if isinstance(value, list) else []
    messages = [_message(one, f"messages.{place}") for place, one in enumerate(rows) if not _says_nothing(one)]
    if not messages:
        raise BadRequest("messages: must be a list with at least one message", "messages")
    return messages


def _says_nothing(value: object) -> bool:
    if not isinstance(value, dict) or value.get("role") != "assistant":
        return False
    return value.get("content") is None and not value.get("tool_calls")


def with_system(messages: Sequence[Message], default: str | None) -> list[Message]:
    """``messages``; where they have none, with the system prompt of the training before them."""
    if default is None or any(message["role"] in ("system", "developer") for message in messages):
        return list(messages)
    return [{"role": "system", "content": default}, *messages]


def alternating(messages: Sequence[Message], engine: str) -> list[Message]:
    """One system message at most, at the front; then user and assistant in turn, the user first and last.

    What the assistant says before any question (a client's greeting) is left out.
    """
    system, turns = [], list[Message]()
    for place, message in enumerate(messages):
        if message["role"] in ("tool", "function") or message.get("tool_calls"):
            raise BadRequest(f"messages.{place}: the engine {engine} calls no tools", "messages")
        if message["role"] in ("system", "developer"):
            system.append(message["content"])
        elif turns and turns[-1]["role"] == message["role"]:
            turns[-1] = {"role": message["role"], "content": f"{turns[-1]['content']}{_GAP}{message['content']}"}
        else:
            turns.append({"role": message["role"], "content": message["content"]})
    if not turns or turns[-1]["role"] != "user":
        raise BadRequest(f"messages: the last one must be the user's, for the engine {engine} to answer it", "messages")
    turns = turns[turns[0]["role"] == "assistant" :]
    return [*([{"role": "system", "content": _GAP.join(system)}] if system else []), *turns]


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise BadRequest(f"{where}: must be an object with role and content", where)
    if (role := value.get("role")) not in _ROLES:
        raise BadRequest(f"{where}.role: is {_short(role)}, must be one of {', '.join(_ROLES)}", f"{where}.role")
    message: Message = {"role": role}
    calls = value.get("tool_calls") if role == "assistant" else None
    if calls:
        message["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    if role == "tool":
        message["tool_call_id"] = _text(value.get("tool_call_id"), f"{where}.tool_call_id")
    if role == "function":
        message["name"] = _text(value.get("name"), f"{where}.name")
    return message | {"content": _content(value.get("content"), f"{where}.content", empty=bool(calls))}


def _content(value: object, where: str, empty: bool) -> str:
    if value is None and empty:
        return ""
    if isinstance(value, str):
        return whole(value)
    if not isinstance(value, list):
        raise BadRequest(f"{where}: must be a text, or a list of parts", where)
    return "".join(_part(part, f"{where}.{place}") for place, part in enumerate(value))


def _part(value: object, where: str) -> str:
    if not isinstance(value, dict):
        raise BadRequest(f"{where}: must be an object with type and text", where)
    if value.get("type") not in _TEXTS:
        raise BadRequest(f"{where}: is of type {_short(value.get('type'))}; these models read text only", where)
    return _text(value.get("text"), f"{where}.text")


def _calls(value: object, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise BadRequest(f"{where}: must be a list", where)
    calls = []
    for place, one in enumerate(value):
        function = one.get("function") if isinstance(one, dict) else None
        if not isinstance(function, dict):
            raise BadRequest(f"{where}.{place}: must be an object with id and function", where)
        named = {name: _text(function.get(name), f"{where}.{place}.function.{name}") for name in ("name", "arguments")}
        calls.append({"id": _text(one.get("id"), f"{where}.{place}.id"), "type": "function", "function": named})
    return calls


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{where}: must be a text", where)
    return whole(value)


def whole(text: str) -> str:
    """``text`` without halves of surrogate pairs, which JSON can say and no tokenizer can take."""
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def _short(value: object) -> str:
    return repr(value)[:40]


def asked(prompt: Mapping[str, Any]) -> list[Message]:
    """The conversation that the run's own questions are."""
    system = [{"role": "system", "content": prompt["system"]}] if prompt.get("system") else []
    return [*system, {"role": "user", "content": prompt["prompt"]}]
