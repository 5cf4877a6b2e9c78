"""Whether the engines answer as the run's own inference did: the same token ids for its questions, the same words."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pkuslurm.rundir import RunDir, read_json, read_jsonl
from pkuslurm.serve import messages, relay, requests
from pkuslurm.serve.engines import Engine, printable
from pkuslurm.serve.errors import Failed
from pkuslurm.serve.spec import Spec
from pkuslurm.serve.upstream import Events, ask, words_of

Ask = Callable[[Engine, str, str, Mapping[str, Any] | None], tuple[int, Any]]

MOST_PROMPTS = 8
MOST_TOKENS = 64
# enough to see the shape of a stream
_STREAMED_TOKENS = 8
# so long may an engine be silent: the first question can compile kernels; one that hangs must not hold its device
SECONDS = 600.0
# the same code as infer's, so that in one dtype they must say the same
_COMPARED = ("transformers", "llamafactory")
# only in this one an answer does not depend on the batch that its question was in
_EXACT = "float32"
_GREETING = {"prompt": "你是谁？"}
_NO_ROUTE = (404, 405)
# what _difference says of an engine that tells neither token ids nor their number
_UNTOLD = ""
_REMEDY = "serve.engine=llamafactory renders by the training's template"


@dataclass
class Findings:
    """``ids``: how many of how many conversations had the same token ids; ``text``: whether the words were the same,
    None where they could not be compared."""

    ids: tuple[int, int] | None = None
    text: bool | None = None
    notes: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {
            "ids_checked": list(self.ids) if self.ids else None,
            "text_checked": self.text,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Reference:
    """What the run's infer job has left: ``ids`` of its first questions, its first answers, how they were made."""

    ids: Sequence[Sequence[int]]
    answers: Mapping[str, Any]
    dtype: str | None
    device: str | None
    max_new_tokens: int | None


def answer(
    engine: Engine, method: str, path: str, body: Mapping[str, Any] | None, seconds: float = SECONDS
) -> tuple[int, Any]:
    """``ask`` of an engine; one that breaks off or is silent for ``seconds`` is a Failed."""
    try:
        return ask(engine.address, method, path, body, seconds)
    except TimeoutError:
        raise Failed(f"the engine of {engine.name} ({engine.kind}) has not answered for {seconds:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise Failed(
            f"the engine of {engine.name} ({engine.kind}) broke off: {error or type(error).__name__}"
        ) from None


def check(spec: Spec, engines: Sequence[Engine], say: Callable[[str], None], ask: Ask = answer) -> Findings:
    """Ask every engine. Raises Failed for one that does not answer, or where tuned is not what was compared."""
    found = Findings()
    past = reference(spec)
    if past is None:
        found.notes.append("not compared: the run has no result of infer with token ids")
    elif spec.prompts:
        _compare_ids(spec, engines, past, found, ask)
    for engine in engines:
        if engine.chosen.get("note"):
            found.notes.append(f"{engine.name}: {engine.chosen['note']}")
        _compare_text(spec, engine, past, found, ask)
        if engine.name == "tuned":
            _require_stream(spec, engine, ask)
        if engine.address.socket is None and _open_to_all(engine):
            note = f"{engine.name}: its engine ({engine.kind}) answers on port {engine.address.port} without a key"
            found.notes.append(f"{note}: other users of this node can ask it")
            say(found.notes[-1])
    return found


def reference(spec: Spec) -> Reference | None:
    """What infer has found; None: nothing that could be compared."""
    value = read_json(spec.infer_result) or {}
    ids = value.get("ids")
    if not isinstance(ids, list) or not all(isinstance(row, list) for row in ids):
        return None
    first = next(iter(read_jsonl(spec.answers)), {})
    asked = spec.prompts[0]["prompt"] if spec.prompts else None
    # the run that infer belongs to; its job file may be packed away
    infer = (read_json(RunDir(spec.infer_result.parent.parent).job("infer")) or {}).get("payload")
    most = infer.get("max_new_tokens") if isinstance(infer, dict) else None
    return Reference(
        ids,
        first if asked is not None and first.get("prompt") == asked else {},
        value.get("dtype"),
        value.get("device"),
        most if isinstance(most, int) else None,
    )


def _compare_ids(spec: Spec, engines: Sequence[Engine], past: Reference, found: Findings, ask: Ask) -> None:
    same = total = 0
    for engine in engines:
        differences = []
        for place, (prompt, ids) in enumerate(zip(spec.prompts[:MOST_PROMPTS], past.ids, strict=False)):
            words = _difference(spec, engine, prompt, ids, found, ask)
            if words == _UNTOLD:
                continue
            total, same = total + 1, same + (words is None)
            if words is not None:
                differences.append(f"question {place + 1}: {words}")
        if not differences:
            continue
        line = f"{engine.name}: the engine {engine.kind} renders {differences[0]}"
        if engine.name == "tuned":
            raise Failed(
                f"{line} (and {len(differences) - 1} more): the model would be asked in other words than it was "
                f"trained with, and answer worse; {_REMEDY}"
            )
        found.notes.append(line)
    found.ids = (same, total) if total else None


def _difference(
    spec: Spec, engine: Engine, prompt: Mapping[str, Any], ids: Sequence[int], found: Findings, ask: Ask
) -> str | None:
    """In words how the question's token ids are not ``ids``; None: they are; _UNTOLD: nothing could be compared."""
    talk = requests.chat(messages.asked(prompt), engine.kind, spec.training)
    status, value = ask(engine, "POST", "/tokenize", {"model": engine.name, **talk, "add_generation_prompt": True})
    tokens = value.get("tokens") if isinstance(value, dict) else None
    # another server may have the route for something else
    other = engine.kind == "command" and not (status == 200 and _are_ids(tokens))
    if status in _NO_ROUTE or other:
        return _count_difference(engine, talk, len(ids), found, ask)
    if status != 200 or not isinstance(tokens, list):
        return f"not at all (status {status}: {printable(words_of(value))})"
    if tokens == list(ids):
        return None
    place = next((place for place, pair in enumerate(zip(tokens, ids, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return f"as {len(tokens)} tokens, the run's infer as {len(ids)}"
    return f"token {place + 1} as {tokens[place]}, the run's infer as {ids[place]}"


def _are_ids(tokens: object) -> bool:
    return isinstance(tokens, list) and bool(tokens) and all(type(one) is int for one in tokens)


def _count_difference(engine: Engine, talk: requests.Body, count: int, found: Findings, ask: Ask) -> str | None:
    """For an engine that does not tell token ids: how many they were."""
    tells = f"{engine.name}: the engine {engine.kind} tells"
    status, value = ask(engine, "POST", "/v1/chat/completions", _greedy(engine, 1) | talk)
    if status != 200:
        return f"not at all (status {status}: {printable(words_of(value))})"
    usage = value.get("usage") if isinstance(value, dict) else None
    told = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if told is None:
        _note(found, f"{tells} neither token ids nor their number: they were not compared")
        return _UNTOLD
    _note(found, f"{tells} no token ids; only their number was compared")
    return None if told == count else f"as {told} tokens, the run's infer as {count}"


def _note(found: Findings, line: str) -> None:
    if line not in found.notes:
        found.notes.append(line)


def _require_stream(spec: Spec, engine: Engine, ask: Ask) -> None:
    """The page and most clients want their answer as it is made. Raises Failed."""
    prompt = spec.prompts[0] if spec.prompts else _GREETING
    talk = requests.chat(messages.asked(prompt), engine.kind, spec.training)
    body = _greedy(engine, _STREAMED_TOKENS) | talk | {"stream": True}
    status, value = ask(engine, "POST", "/v1/chat/completions", body)
    if status == 200 and isinstance(value, Events):
        events = [part[6:] for part in relay.stream(value.data.splitlines(), engine.name) if part != relay.DONE]
        words = _no_stream([json.loads(event) for event in events if event.startswith(b"{")])
    else:
        told = "no server-sent events" if isinstance(value, Mapping) else printable(words_of(value))
        words = told if status == 200 else f"status {status}: {printable(words_of(value))}"
    if words is not None:
        raise Failed(f"{engine.name}: the engine {engine.kind} does not stream an answer as OpenAI's do ({words})")


def _no_stream(events: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with a stream; None: it has an answer's parts, and an end."""
    failed = next((event for event in events if event.get("error")), None)
    if failed is not None:
        return printable(words_of(failed))
    rows = [event["choices"] for event in events if isinstance(event.get("choices"), list)]
    parts = [one.get("delta") for row in rows for one in row if isinstance(one, Mapping)]
    return None if any(isinstance(part, Mapping) for part in parts) else "no event of it has a delta"


def _compare_text(spec: Spec, engine: Engine, past: Reference | None, found: Findings, ask: Ask) -> None:
    """One real question, greedily; its answer against infer's where they must be the same."""
    prompt = spec.prompts[0] if spec.prompts else _GREETING
    limit = min(MOST_TOKENS, (past.max_new_tokens if past else None) or MOST_TOKENS)
    talk = requests.chat(messages.asked(prompt), engine.kind, spec.training)
    status, value = ask(engine, "POST", "/v1/chat/completions", _greedy(engine, limit) | talk)
    text, whole = _answer(value, limit) if status == 200 else (None, True)
    if text is None:
        words = f"status {status}: {printable(words_of(value))}" if status != 200 else "there is no text in its answer"
        raise Failed(f"{engine.name}: the engine {engine.kind} does not answer a question ({words})")
    if past is None:
        return
    told = past.answers.get(engine.name)
    why = _not_comparable(spec, engine, past, told)
    if why is None and not same_text(text, str(told), whole, past.max_new_tokens):
        line = f"{engine.name}: the engine {engine.kind} answers the first question {_short(text)}, "
        line += f"the run's infer {_short(str(told))}"
        if engine.name == "tuned" and past.dtype == _EXACT:
            raise Failed(f"{line}: other words for the same token ids; serve.engine=llamafactory computes as infer did")
        why = line if past.dtype == _EXACT else f"{line}: in {past.dtype} an answer depends on its batch"
        found.notes.append(why)
    elif why is not None:
        found.notes.append(f"{engine.name}: its answer was not compared: {why}")
    elif engine.name == "tuned":
        found.text = True


def _not_comparable(spec: Spec, engine: Engine, past: Reference, told: object) -> str | None:
    if not isinstance(told, str):
        return "the run has no answer of infer for the first question"
    if engine.kind not in _COMPARED:
        return f"{engine.kind} is another engine than the run's infer had"
    if engine.chosen.get("dtype") != past.dtype:
        return f"it computes in {engine.chosen.get('dtype')}, the run's infer in {past.dtype}"
    if past.device is not None and str(past.device).partition(":")[0] != spec.device:
        return f"it computes on {spec.device}, the run's infer on {past.device}"
    return None


def same_text(ours: str, theirs: str, whole: bool, their_limit: int | None) -> bool:
    """Whether two answers agree; ``whole``: ours ended by itself, else it was cut, as theirs may have been."""
    # a cut may go through a character of several tokens
    ours, theirs = ours.strip().rstrip("\ufffd").rstrip(), theirs.strip().rstrip("\ufffd").rstrip()
    if not whole:
        return ours.startswith(theirs) or theirs.startswith(ours)
    return ours == theirs or (their_limit is None and bool(theirs) and ours.startswith(theirs))


def _answer(value: Any, limit: int) -> tuple[str | None, bool]:
    """The text of an answer, and whether it certainly ended by itself: a finish_reason is not always true."""
    try:
        text = value["choices"][0]["message"].get("content")
    except (AttributeError, KeyError, IndexError, TypeError):
        return None, True
    usage = value.get("usage")
    made = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return (text if isinstance(text, str) else None), isinstance(made, int) and made < limit


def _greedy(engine: Engine, tokens: int) -> requests.Body:
    return {"model": engine.name, "max_tokens": tokens, "temperature": 0, "stream": False}


def _open_to_all(engine: Engine) -> bool:
    try:
        return ask(replace(engine.address, key=""), "GET", "/v1/models", timeout=10.0)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")
