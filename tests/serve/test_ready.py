"""Before the door opens: what of the engines is compared with the run's own inference. No process is started."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from pkuslurm.serve import ready, spec
from pkuslurm.serve.engines import Engine
from pkuslurm.serve.errors import Failed
from pkuslurm.serve.ready import Findings, same_text
from pkuslurm.serve.upstream import Address, Events
from tests.serve.doors import PROMPTS, Door, ids_of, make


@dataclass
class Fake:
    """An engine that answers from a table."""

    name: str
    kind: str = "transformers"
    dtype: str = "float32"
    version: str = "1"
    ids: int = 0
    text: str = "I am it."
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 13, "completion_tokens": 3})
    tokenizes: int = 200
    tokens: Any = None
    stream: Any = None
    status: int = 200
    note: str | None = None
    address: Address = field(default_factory=lambda: Address("key", socket="/nowhere"))
    asked: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    @property
    def chosen(self) -> dict[str, Any]:
        return {"engine": self.kind, "dtype": self.dtype, "note": self.note}


def ask(engine: Engine, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, Any]:
    fake = cast(Fake, engine)
    assert body is not None
    fake.asked.append((path, body))
    if path == "/tokenize":
        text = "\n".join(f"{message['role']}: {message['content']}" for message in body["messages"])
        ids = [ord(letter) + fake.ids for letter in text]
        return fake.tokenizes, {"tokens": ids if fake.tokens is None else fake.tokens, "count": len(ids)}
    if body["stream"] and fake.status == 200:
        event = {"choices": [{"delta": {"content": "I"}, "finish_reason": "stop"}]}
        return 200, Events(b"data: " + json.dumps(event).encode() + b"\n\n") if fake.stream is None else fake.stream
    answer = {"choices": [{"message": {"content": fake.text}, "finish_reason": "stop"}], "usage": fake.usage}
    return (fake.status, answer) if fake.status == 200 else (fake.status, {"detail": "it is broken"})


@pytest.fixture
def door(tmp_path: Path) -> Door:
    made = make(tmp_path / "run")
    made.infer({"base": "I am it.", "tuned": "I am it."})
    return made


def check(door: Door, *fakes: Fake) -> Findings:
    job = {"schema_version": 1, "run_id": "x", "kind": "serve", "run_dir": str(door.run), "command": ["x"]}
    door.job_file.parent.mkdir(exist_ok=True)
    door.job_file.write_text(json.dumps(job | {"payload": door.payload}), encoding="utf-8")
    return ready.check(spec.read(door.job_file), cast(list[Engine], list(fakes)), lambda line: None, ask)


def test_the_same_ids_and_the_same_words_are_found(door: Door) -> None:
    found = check(door, Fake("base"), Fake("tuned"))
    assert found.document() == {"ids_checked": [4, 4], "text_checked": True, "notes": []}


def test_each_question_is_asked_as_a_client_would_ask_it(door: Door) -> None:
    door.payload["default_system"] = "Be kind."
    door.infer(
        {"tuned": "I am it."}, ids=[[ord(letter) for letter in "system: Be kind.\nuser: 你是谁？"], ids_of(PROMPTS[1])]
    )
    tuned = Fake("tuned")
    assert check(door, tuned).ids == (2, 2)
    assert tuned.asked[-2] == (
        "/v1/chat/completions",
        {
            "model": "tuned",
            "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "你是谁？"}],
            "max_tokens": 64,
            "temperature": 0,
            "stream": False,
        },
    )


def test_no_more_than_eight_questions_are_compared(door: Door) -> None:
    door.payload["prompts"] = [PROMPTS[0]] * 16
    door.infer({"tuned": "I am it."}, ids=[ids_of(PROMPTS[0])] * 16)
    assert check(door, Fake("tuned")).ids == (8, 8)


def test_other_ids_for_tuned_are_refused(door: Door) -> None:
    with pytest.raises(
        Failed, match=r"question 1: token 1 as 118, the run's infer as 117 \(and 1 more\).*llamafactory"
    ):
        check(door, Fake("tuned", ids=1))
    door.infer(ids=[ids_of(PROMPTS[0]), ids_of(PROMPTS[1])[:-1]])
    with pytest.raises(Failed, match="question 2: as 36 tokens, the run's infer as 35"):
        check(door, Fake("tuned"))


def test_other_ids_for_base_are_noted(door: Door) -> None:
    found = check(door, Fake("base", ids=1), Fake("tuned"))
    assert found.ids == (2, 4)
    assert found.notes == [
        "base: the engine transformers renders question 1: token 1 as 118, the run's infer as 117",
    ]


def test_an_engine_that_cannot_render_tuneds_question_is_refused(door: Door) -> None:
    with pytest.raises(Failed, match="question 1: not at all"):
        check(door, Fake("tuned", tokenizes=500))


def test_an_engine_without_a_tokenizer_is_compared_by_the_number_of_tokens(door: Door) -> None:
    door.payload["prompts"] = [PROMPTS[0]]
    door.infer(ids=[[0] * 13])
    found = check(door, Fake("tuned", kind="vllm", tokenizes=404))
    assert found.ids == (1, 1)
    assert "tuned: the engine vllm tells no token ids; only their number was compared" in found.notes
    door.infer(ids=[[0] * 14])
    with pytest.raises(Failed, match="as 13 tokens, the run's infer as 14"):
        check(door, Fake("tuned", kind="vllm", tokenizes=404))


def test_what_tells_no_number_of_tokens_either_is_noted(door: Door) -> None:
    found = check(door, Fake("tuned", kind="command", tokenizes=405, usage=None))
    assert found.ids is None
    assert found.notes[:-1] == [
        "tuned: the engine command tells neither token ids nor their number: they were not compared"
    ]


@pytest.mark.parametrize(("status", "tokens"), [(200, []), (200, {}), (200, ["a"]), (400, None), (500, None)])
def test_another_servers_tokenize_is_no_reason_to_refuse_it(door: Door, status: int, tokens: Any) -> None:
    door.payload["prompts"] = [PROMPTS[0]]
    door.infer(ids=[[0] * 13])
    assert check(door, Fake("tuned", kind="command", tokenizes=status, tokens=tokens)).ids == (1, 1)
    if tokens is not None:
        with pytest.raises(Failed, match="question 1"):
            check(door, Fake("tuned", tokenizes=status, tokens=tokens))


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ({"choices": [{"message": {"content": "I"}}]}, "no server-sent events"),
        (Events(b'data: {"choices": [{"message": {"content": "I"}}]}\n\ndata: [DONE]\n\n'), "has a delta"),
        (Events(b'data: {"choices": [{"delta": {"content": "I"}}]}\n\n'), "broke off before its end"),
        (Events(b'data: {"error": "no memory"}\n\n'), "no memory"),
        (Events(b'data: {"choices": 3}\n\ndata: [DONE]\n\n'), "has a delta"),
    ],
)
def test_an_engine_that_does_not_stream_is_refused(door: Door, stream: Any, words: str) -> None:
    with pytest.raises(Failed, match=f"tuned: .* does not stream an answer.*{words}"):
        check(door, Fake("tuned", stream=stream))


def test_an_engine_that_is_silent_is_given_up(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        hung = Fake("tuned", address=Address("key", socket=path))
        with pytest.raises(Failed, match=r"the engine of tuned \(transformers\) has not answered for 0.1 s"):
            ready.answer(cast(Engine, hung), "POST", "/v1/chat/completions", {}, 0.1)


def test_other_words_of_tuned_are_refused_and_of_base_noted(door: Door) -> None:
    words = "answers the first question 'Nonsense', the run's infer 'I am it.'"
    with pytest.raises(Failed, match=f"tuned: the engine transformers {words}"):
        check(door, Fake("tuned", text="Nonsense"))
    found = check(door, Fake("base", text="Nonsense"), Fake("tuned"))
    assert found.text is True
    assert found.notes == [f"base: the engine transformers {words}"]


@pytest.mark.parametrize(
    ("infer", "fake", "words"),
    [
        ({"dtype": "bfloat16"}, {}, "computes in float32, the run's infer in bfloat16"),
        ({"device": "npu:0"}, {}, "computes on cpu, the run's infer on npu:0"),
        ({}, {"kind": "vllm"}, "vllm is another engine than the run's infer had"),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}, "in bfloat16 an answer depends on its batch"),
    ],
)
def test_words_that_need_not_be_the_same_refuse_nothing(
    door: Door, infer: dict[str, Any], fake: dict[str, Any], words: str
) -> None:
    door.infer({"tuned": "something else"}, **infer)
    found = check(door, Fake("tuned", **fake))
    assert found.text is None
    assert words in found.notes[-1]


@pytest.mark.parametrize("left", ["", "{", '{"ids": 3}', '{"dtype": "float32"}'])
def test_without_a_result_of_infer_a_real_answer_is_enough(door: Door, left: str) -> None:
    Path(door.payload["infer_result"]).write_text(left, encoding="utf-8")
    tuned = Fake("tuned", text="Nonsense", ids=1)
    found = check(door, tuned)
    assert found.document() == {
        "ids_checked": None,
        "text_checked": None,
        "notes": ["not compared: the run has no result of infer with token ids"],
    }
    assert [path for path, _ in tuned.asked] == ["/v1/chat/completions"] * 2


def test_answers_to_other_questions_are_not_compared(door: Door) -> None:
    line = {"prompt": "another", "tuned": "something else"}
    Path(door.payload["answers"]).write_text(json.dumps(line) + "\n", encoding="utf-8")
    assert check(door, Fake("tuned")).text is None


def test_without_questions_a_greeting_is_asked(door: Door) -> None:
    door.payload["prompts"] = []
    tuned = Fake("tuned")
    assert check(door, tuned).ids is None
    assert all(body["messages"][0]["content"] for _, body in tuned.asked)


def test_what_does_not_answer_is_refused(door: Door) -> None:
    with pytest.raises(Failed, match=r"base: .* does not answer a question \(status 500: it is broken\)"):
        check(door, Fake("base", status=500), Fake("tuned"))
    with pytest.raises(Failed, match="there is no text in its answer"):
        check(door, Fake("tuned", text=cast(str, None)))


def test_an_engines_own_note_is_kept(door: Door) -> None:
    assert check(door, Fake("tuned", note="on the CPU")).notes == ["tuned: on the CPU"]


def test_an_answer_that_infer_had_cut_is_asked_for_as_long(door: Door) -> None:
    door.infer({"tuned": "I am"})
    infer = {"payload": {"max_new_tokens": 2}}
    door.job_file.with_name("infer.json").parent.mkdir(exist_ok=True)
    door.job_file.with_name("infer.json").write_text(json.dumps(infer), encoding="utf-8")
    tuned = Fake("tuned", text="I am", usage={"prompt_tokens": 1, "completion_tokens": 2})
    assert check(door, tuned).text is True
    assert tuned.asked[-2][1]["max_tokens"] == 2


@pytest.mark.parametrize(
    ("ours", "theirs", "whole", "limit", "same"),
    [
        (" one two\n", "one two", True, 9, True),
        ("one", "one two", True, 9, False),
        ("one two", "one", True, 9, False),
        ("one two", "one", True, None, True),
        ("one two", "", True, None, False),
        ("one", "one two", False, 9, True),
        ("one two", "one", False, 9, True),
        ("北\ufffd", "北京", False, 9, True),
        ("one three", "one two", False, 9, False),
    ],
)
def test_texts_agree_as_far_as_both_go(ours: str, theirs: str, whole: bool, limit: int | None, same: bool) -> None:
    assert same_text(ours, theirs, whole, limit) is same
