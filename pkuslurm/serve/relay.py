"""An engine's answer, on its way to the client: the model's name as the client knows it, the end as OpenAI has it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from pkuslurm.serve.refusal import BadRequest
from pkuslurm.serve.upstream import value_of, words_of

DONE = b"data: [DONE]\n\n"
# an engine that does not know its key or its own routes is our trouble, not the client's
_OURS = (401, 403, 404, 405, 407)


def refusal(status: int, data: bytes, model: str) -> BadRequest:
    """The engine's error ``status`` with body ``data``, as the client is told of it."""
    words = words_of(value_of(data)) or "it gives no reason"
    if status >= 500 or status < 400 or status in _OURS:
        return BadRequest(f"the engine of {model} failed (status {status}): {words}", status=502, code="engine_failed")
    return BadRequest(words, status=status)


def whole(data: bytes, model: str) -> bytes:
    """An answer that is not streamed. Raises BadRequest where it is none."""
    value = value_of(data)
    if not isinstance(value, dict):
        raise BadRequest(f"the engine of {model} gave no JSON object", status=502, code="engine_failed")
    return _bytes(value | {"model": model})


def stream(lines: Iterable[bytes], model: str) -> Iterator[bytes]:
    """Server-sent events as they come, comments too (they keep a connection open); always ended by [DONE].

    Not every engine sends that; but one that stops without a finish_reason has broken off, which is said.
    """
    finished = False
    for line in lines:
        line = line.rstrip(b"\r\n")
        if line.startswith(b":"):
            yield line + b"\n\n"
        elif line.startswith(b"data:") and (data := line[5:].strip()):
            if data == b"[DONE]":
                finished = True
                break
            value = _event(value_of(data), model)
            finished = finished or _finishes(value)
            yield _sent(value)
    if not finished:
        broken = BadRequest(f"the engine of {model} broke off before its end", status=502, code="engine_failed")
        yield _sent(broken.document())
    yield DONE


def _event(value: Any, model: str) -> Any:
    if not isinstance(value, dict):
        return value
    if value.get("error"):
        return BadRequest(words_of(value), status=502, code="engine_failed").document()
    return value | {"model": model}


def _finishes(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    choices = value.get("choices")
    rows = choices if isinstance(choices, list) else []
    return "error" in value or any(isinstance(one, dict) and one.get("finish_reason") for one in rows)


def _sent(value: Any) -> bytes:
    return b"data: " + _bytes(value) + b"\n\n"


def _bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace")
