"""A client's request, made the engine's: whatever it is, it is understood or refused in words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkuslurm.serve.refusal import BadRequest
from pkuslurm.serve.requests import ENGINES, Training, convert

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
OURS = ("transformers", "llamafactory")
BOTH = {"base": "transformers", "tuned": "llamafactory"}


def of(engine: str, training: Training = Training(), **body: Any) -> dict[str, Any]:  # noqa: B008
    return convert({"messages": HELLO} | body, {"tuned": engine}, training).body


def talk(*turns: str) -> list[dict[str, str]]:
    """``u:hello`` is what the user says."""
    roles = {"u": "user", "a": "assistant", "s": "system", "d": "developer"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def fits(engine: str, body: dict[str, Any]) -> None:
    """What the engine is known to take."""
    json.dumps(body, allow_nan=False).encode()
    extra = set(body) - {"model", "messages", "stream"} - set(ENGINES[engine].fields)
    assert not extra - {"chat_template_kwargs"}
    assert isinstance(body["stream"], bool)
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "min_p"):
        assert name not in body or isinstance(body[name], int | float)
    assert "max_tokens" not in body or body["max_tokens"] >= 1
    assert body.get("stop", "x") and body.get("logit_bias", "x")
    assert all(isinstance(message["content"], str) for message in body["messages"])
    for message in body["messages"]:
        message["content"].encode()
    if engine in OURS:
        assert not {"presence_penalty", "frequency_penalty", "tools"} & set(body)
        roles = [message["role"] for message in body["messages"]]
        roles = roles[roles[0] == "system" :]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
# surrogate halves are JSON, too
texts = st.text(st.characters(codec=None, categories=["L", "Cs", "P"]), max_size=8)
contents = texts | st.none() | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=3)
roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "odd"])
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": contents | json_values}), max_size=6)
turns = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}))
names = st.sampled_from(
    [
        *(
            "model",
            "temperature",
            "top_p",
            "max_tokens",
            "max_completion_tokens",
            "n",
            "stream",
            "stop",
            "seed",
            "user",
        ),
        *(
            "presence_penalty",
            "frequency_penalty",
            "logit_bias",
            "tools",
            "response_format",
            "chat_template_kwargs",
            "foo",
        ),
    ]
)
values = json_values | st.sampled_from([0, 1, 0.5, True, "base", "tuned", [], {}, [""], {"1": 2}])


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=80, deadline=None)
@given(
    value=json_values
    | st.builds(lambda talk, more: {"messages": talk} | more, messages | turns, st.dictionaries(names, values))
)
def test_any_json_is_a_request_or_is_refused(engine: str, value: Any) -> None:
    try:
        asked = convert(value, {"base": engine, "tuned": engine}, Training("Be kind."))
    except BadRequest as refused:
        assert 400 <= refused.status < 500
        assert "\n" not in refused.message
        json.dumps(refused.document()).encode()
        return
    assert asked.model in ("base", "tuned")
    fits(engine, asked.body)


@pytest.mark.parametrize("engine", OURS)
@pytest.mark.parametrize("number", [0, 0.0, -2, 2, 0.5])
def test_penalties_are_not_for_our_engines(engine: str, number: float) -> None:
    assert of(engine, presence_penalty=number, frequency_penalty=number) == of(engine)
    assert of("vllm", presence_penalty=number)["presence_penalty"] == number


@pytest.mark.parametrize("engine", OURS)
def test_unknown_and_empty_fields_are_left_out(engine: str) -> None:
    empty = {
        "stop": [],
        "logit_bias": {},
        "tools": [],
        "temperature": None,
        "n": 1,
        "response_format": {"type": "text"},
    }
    assert of(engine, foo=1, top_k=3, stream_options={"include_usage": True}, user="me", **empty) == of(engine)
    assert of(engine, stop=["", "x"], temperature=0) == of(engine, stop="x", temperature=0) | (
        {"stop": ["x"]} if engine == "transformers" else {}
    )


def test_biases_are_broken_numbers_for_transformers() -> None:
    told = of("transformers", logit_bias={"5": 1})["logit_bias"]
    assert [(token, type(number)) for token, number in told.items()] == [("5", float)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("given", "told"), [(1e-3, 1e-3), (9e-4, 0), (5e-324, 0), (0, 0), (0.7, 0.7)])
def test_a_temperature_that_breaks_sampling_is_none(engine: str, given: float, told: float) -> None:
    assert of(engine, temperature=given)["temperature"] == told


@pytest.mark.parametrize("engine", ENGINES)
def test_an_assistant_that_says_nothing_is_left_out(engine: str) -> None:
    empty: dict[str, Any] = {"role": "assistant", "content": None}
    said = [*talk("u:1"), empty, *talk("a:2", "u:3")]
    assert of(engine, messages=said)["messages"] == talk("u:1", "a:2", "u:3")
    with pytest.raises(BadRequest, match="at least one"):
        of(engine, messages=[empty])


def test_tools_that_are_not_to_be_called_are_dropped_where_none_can_be() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for engine in OURS:
        assert of(engine, tools=tools, tool_choice="none") == of(engine)
        with pytest.raises(BadRequest, match="calls no tools"):
            of(engine, tools=tools, tool_choice="auto")
    assert of("vllm", tools=tools, tool_choice="none")["tools"] == tools


def test_the_new_name_for_the_most_tokens_is_the_old_one() -> None:
    assert of("transformers", max_completion_tokens=7)["max_tokens"] == 7


@pytest.mark.parametrize("engine", OURS)
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (talk("u:1", "u:2"), talk("u:1\n\n2")),
        (talk("s:1", "u:2", "a:3", "u:4"), talk("s:1", "u:2", "a:3", "u:4")),
        (talk("u:1", "s:2", "d:3", "u:4"), talk("s:2\n\n3", "u:1\n\n4")),
        (talk("a:0", "u:1"), talk("u:1")),
        (talk("u:1", "a:2", "a:3", "u:4"), talk("u:1", "a:2\n\n3", "u:4")),
    ],
)
def test_odd_orders_of_roles_are_mended(engine: str, given: list[Any], told: list[Any]) -> None:
    assert of(engine, messages=given)["messages"] == told


@pytest.mark.parametrize("engine", OURS)
@pytest.mark.parametrize("given", [talk("u:1", "a:2"), talk("a:1"), talk("s:1")])
def test_what_gives_the_engine_nothing_to_answer_is_refused(engine: str, given: list[Any]) -> None:
    with pytest.raises(BadRequest, match="the last one must be the user's"):
        of(engine, messages=given)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_trainings_system_prompt_is_put_before_a_conversation_that_has_none(engine: str) -> None:
    training = Training("Be kind.")
    assert of(engine, training)["messages"] == talk("s:Be kind.", "u:hello")
    assert of(engine, training, messages=talk("s:No.", "u:hello"))["messages"] == talk("s:No.", "u:hello")


def test_vllm_is_told_whether_to_think_unless_the_client_says_so() -> None:
    training = Training(enable_thinking=False)
    assert of("vllm", training)["chat_template_kwargs"] == {"enable_thinking": False}
    assert of("vllm", training, chat_template_kwargs={"x": 1})["chat_template_kwargs"] == {"x": 1}
    assert "chat_template_kwargs" not in of("transformers", training)


@pytest.mark.parametrize("engine", ENGINES)
def test_parts_of_text_are_one_text_and_pictures_are_refused(engine: str) -> None:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert of(engine, messages=[{"role": "user", "content": parts}])["messages"] == talk("u:ab")
    with pytest.raises(BadRequest, match="read text only"):
        of(engine, messages=[{"role": "user", "content": [*parts, {"type": "image_url", "image_url": {"url": "x"}}]}])


def test_calls_of_tools_go_to_engines_that_know_them() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    given: list[dict[str, Any]] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    assert of("vllm", messages=given)["messages"][1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        given[2],
    ]
    with pytest.raises(BadRequest, match="calls no tools"):
        of("llamafactory", messages=given)
    with pytest.raises(BadRequest, match="calls no tools"):
        of("transformers", tools=[{"type": "function", "function": {"name": "f"}}])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "a"),
        ("temperature", True),
        ("temperature", 3),
        ("top_p", -0.1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", 10**30),
        ("max_completion_tokens", -1),
        ("n", 2),
        ("n", "1"),
        ("stream", 1),
        ("stream", "true"),
        ("stop", [1]),
        ("seed", 2**70),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": True}),
        ("presence_penalty", 3),
        ("frequency_penalty", "0"),
        ("response_format", {"type": "json_object"}),
        ("messages", None),
        ("messages", [3]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": 3}]),
        ("messages", [{"role": "user", "content": [{"type": "text", "text": 3}]}]),
        ("messages", [{"role": ["user"], "content": "x"}]),
        ("model", 3),
        ("model", "gpt-4"),
    ],
)
def test_values_of_wrong_types_are_refused_by_their_field(field: str, value: Any) -> None:
    with pytest.raises(BadRequest) as refused:
        of("transformers", **{field: value})
    assert refused.value.message.startswith(field)
    assert str(refused.value.param).startswith(field)


def test_the_model_is_tuned_where_none_is_named() -> None:
    assert convert({"messages": HELLO}, BOTH).model == "tuned"
    assert convert({"messages": HELLO, "model": "base"}, BOTH).body["model"] == "base"
