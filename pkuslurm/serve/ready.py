"""Whether the engines answer as the run's own inference did: the same token ids for its questions, the same words."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pkuslurm.rundir import RunDir, read_json, read_jsonl
from pkuslurm.serve import messages, requests
from pkuslurm.serve.engines import Engine, printable
from pkuslurm.serve.errors import Failed
from pkuslurm.serve.spec import Spec
from pkuslurm.serve.upstream import ask, words_of

Ask = Callable[[Engine, str, str, Mapping[str, Any] | None], tuple[int, Any]]

MOST_PROMPTS = 8
MOST_TOKENS = 64
# the same code as infer's, so that in one dtype they must say the same
_COMPARED = ("transformers", "llamafactory")
# only in this one an answer does not depend on the batch that its question was in
_EXACT = "float32"
_GREETING = {"prompt": "你是谁？"}
_NO_ROUTE = (404, 405)
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


def answer(engine: Engine, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, Any]:
    """``ask`` of an engine; one that breaks off is a Failed."""
    try:
        return ask(engine.address, method, path, body)
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
    """In words how the question's token ids are not ``ids``; None: they are."""
    talk = requests.chat(messages.asked(prompt), engine.kind, spec.training)
    status, value = ask(engine, "POST", "/tokenize", {"model": engine.name, **talk, "add_generation_prompt": True})
    if status in _NO_ROUTE:
        return _count_difference(engine, talk, len(ids), found, ask)
    tokens = value.get("tokens") if isinstance(value, dict) else None
    if status != 200 or not isinstance(tokens, list):
        return f"not at all (status {status}: {printable(words_of(value))})"
    if tokens == list(ids):
        return None
    place = next((place for place, pair in enumerate(zip(tokens, ids, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return f"as {len(tokens)} tokens, the run's infer as {len(ids)}"
    return f"token {place + 1} as {tokens[place]}, the run's infer as {ids[place]}"


def _count_difference(engine: Engine, talk: requests.Body, count: int, found: Findings, ask: Ask) -> str | None:
    """For an engine that does not tell token ids: how many they were."""
    note = f"{engine.name}: the engine {engine.kind} tells no token ids; only their number was compared"
    if note not in found.notes:
        found.notes.append(note)
    status, value = ask(engine, "POST", "/v1/chat/completions", _greedy(engine, 1) | talk)
    if status != 200:
        return f"not at all (status {status}: {printable(words_of(value))})"
    usage = value.get("usage") if isinstance(value, dict) else None
    told = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if told is None:
        found.notes.append(f"{engine.name}: nor does it tell their number")
        return None
    return None if told == count else f"as {told} tokens, the run's infer as {count}"


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
