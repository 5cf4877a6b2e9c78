"""A client's request, made the engine's: the fields that it knows, of the types that it can take. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pkuslurm.serve import messages
from pkuslurm.serve.refusal import BadRequest

Body = dict[str, Any]
Check = Callable[[object], str | None]


@dataclass(frozen=True)
class Engine:
    """``fields``: handed on as they are; ``alternates``: user and assistant must take turns, and there are no tools;
    ``thinks``: it is told with each request whether the training's template thinks."""

    fields: tuple[str, ...]
    alternates: bool = True
    thinks: bool = False


@dataclass(frozen=True)
class Training:
    """What the model was trained with, and the saved chat template does not know."""

    default_system: str | None = None
    enable_thinking: bool | None = None


@dataclass(frozen=True)
class Asked:
    """``model``: one of those that are served; ``body``: for its engine."""

    model: str
    body: Body
    stream: bool


_COMMON = ("temperature", "top_p", "max_tokens")
_OPENAI = (
    *(*_COMMON, "stop", "seed", "logit_bias", "presence_penalty", "frequency_penalty", "logprobs", "top_logprobs"),
    *("tools", "tool_choice", "response_format", "stream_options", "user", "reasoning_effort"),
)
_VLLM = ("top_k", "min_p", "repetition_penalty", "ignore_eos", "skip_special_tokens", "chat_template_kwargs")

# OpenAI's penalties are none of what our own two have: zero, which many clients send, breaks them, and any other number
# is one for repetition, in another scale in each release
ENGINES: Mapping[str, Engine] = {
    "transformers": Engine((*_COMMON, "stop", "seed", "logit_bias")),  # any field that it does not know is a 422
    "llamafactory": Engine(_COMMON),
    "vllm": Engine((*_OPENAI, *_VLLM), alternates=False, thinks=True),
    "command": Engine(_OPENAI, alternates=False),
}
_UNKNOWN = Training()


def convert(value: object, engines: Mapping[str, str], training: Training = _UNKNOWN) -> Asked:
    """What the client's JSON ``value`` asks of which model; ``engines``: the engine of each. Raises BadRequest."""
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    model = _model(value.get("model"), engines)
    given = {name: one for name, one in value.items() if one is not None}
    for name, check in _CHECKS.items():
        if name in given and (want := check(given[name])) is not None:
            raise BadRequest(f"{name}: must be {want}", name)
    if given.get("n", 1) > 1:
        raise BadRequest("n: must be 1: one answer to a question; ask again for another one", "n")
    if "max_completion_tokens" in given:
        given["max_tokens"] = given["max_completion_tokens"]
    engine, name = ENGINES[engines[model]], engines[model]
    if engine.alternates:
        if given.get("tool_choice") == "none":  # none is to be called: they are dropped below
            given = {field: one for field, one in given.items() if field not in _TOOLS}
        _refuse_tools(given, name)
    body = chat(messages.read(given.get("messages")), name, training)
    fields = {field: _field(field, given[field]) for field in engine.fields if field in given}
    body |= {field: one for field, one in fields.items() if one not in _NOTHING}
    stream = given.get("stream", False)
    return Asked(model, {"model": model} | body | {"stream": stream}, stream)


def chat(talk: Sequence[messages.Message], name: str, training: Training) -> Body:
    """The conversation as engine ``name`` gets it. Raises BadRequest."""
    engine = ENGINES[name]
    talk = messages.with_system(talk, training.default_system)
    body: Body = {"messages": messages.alternating(talk, name) if engine.alternates else talk}
    if engine.thinks and training.enable_thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": training.enable_thinking}
    return body


def _model(value: object, engines: Mapping[str, str]) -> str:
    if value is None:
        return "tuned" if "tuned" in engines else next(iter(engines))
    if not isinstance(value, str):
        raise BadRequest("model: must be a text", "model")
    if value not in engines:
        raise BadRequest(
            f"model: there is no {value[:80]!r} here, only {' and '.join(engines)}", "model", 404, "model_not_found"
        )
    return value


def _refuse_tools(given: Body, name: str) -> None:
    for field in _TOOLS:
        if given.get(field):
            raise BadRequest(f"{field}: the engine {name} calls no tools; leave it out", field)
    if given.get("response_format", {}).get("type", "text") != "text":
        raise BadRequest(f"response_format: the engine {name} writes text only; leave it out", "response_format")


_TOOLS = ("tools", "functions")
_NOTHING: tuple[object, ...] = ("", [], {})
# below it logits that are divided by it overflow, and sampling fails; what it means is: always the likeliest
_COLDEST = 1e-3


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return messages.whole(value)
    if isinstance(value, list):
        return [_clean(one) for one in value if one != ""]
    if isinstance(value, dict):
        return {messages.whole(name): _clean(one) for name, one in value.items()}
    return value


def _field(name: str, value: Any) -> Any:
    if name == "temperature" and value < _COLDEST:
        return 0
    # transformers takes no whole numbers here
    return {token: float(one) for token, one in value.items()} if name == "logit_bias" else _clean(value)


def _number(low: float, high: float) -> Check:
    def check(value: object) -> str | None:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return None if fits else f"a number from {low:g} to {high:g}"

    return check


def _whole(low: int, high: int) -> Check:
    def check(value: object) -> str | None:
        fits = type(value) is int and low <= value <= high
        return None if fits else f"a whole number from {low} to {high}"

    return check


def _is(kind: type, words: str) -> Check:
    return lambda value: None if isinstance(value, kind) else words


def _stop(value: object) -> str | None:
    words = [value] if isinstance(value, str) else value
    fits = isinstance(words, list) and len(words) <= 16 and all(isinstance(word, str) for word in words)
    return None if fits else "a text, or a list of at most 16"


def _bias(value: object) -> str | None:
    number = _number(-100, 100)
    fits = isinstance(value, dict) and all(
        name.isascii() and name.isdecimal() and len(name) < 10 and number(one) is None for name, one in value.items()
    )
    return None if fits else "an object of token numbers, each with a number from -100 to 100"


def _objects(value: object) -> str | None:
    return None if isinstance(value, list) and all(isinstance(one, dict) for one in value) else "a list of objects"


def _choice(value: object) -> str | None:
    return None if isinstance(value, str | dict) else "a text or an object"


_MOST = 2**31 - 1
_CHECKS: Mapping[str, Check] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "max_tokens": _whole(1, _MOST),
    "max_completion_tokens": _whole(1, _MOST),
    "n": _whole(1, 128),
    "stream": _is(bool, "true or false"),
    "stop": _stop,
    "seed": _whole(-(2**63), 2**63 - 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _bias,
    "logprobs": _is(bool, "true or false"),
    "top_logprobs": _whole(0, 20),
    "tools": _objects,
    "functions": _objects,
    "tool_choice": _choice,
    "response_format": _is(dict, "an object"),
    "stream_options": _is(dict, "an object"),
    "user": _is(str, "a text"),
    "reasoning_effort": _is(str, "a text"),
    "top_k": _whole(-1, _MOST),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 10),
    "ignore_eos": _is(bool, "true or false"),
    "skip_special_tokens": _is(bool, "true or false"),
    "chat_template_kwargs": _is(dict, "an object"),
}
