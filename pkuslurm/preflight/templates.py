"""Which of LLaMA-Factory's chat templates a model wants, and whether its tokenizer has that template's tokens.

Evidence, strongest first: the model's own chat template and model_type; the name, where LLaMA-Factory lists the model.
templates.json holds LLaMA-Factory's side (tests/tools/snapshot_templates.py writes it). Reads only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.preflight.modelfiles import read_object

TABLE = Path(__file__).with_name("templates.json")


@dataclass(frozen=True)
class Choice:
    """LLaMA-Factory's ``template``, and in some words ``why``."""

    template: str
    why: str


@dataclass(frozen=True)
class _Rule:
    """A model of one of ``types`` (of any, if empty) whose chat template has ``mark`` and all of ``has``, and none of
    ``lacks``, wants one of ``templates``."""

    mark: str
    templates: tuple[str, ...]
    types: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()

    def fits(self, model_type: str, chat: str) -> bool:
        texts = all(word in chat for word in (self.mark, *self.has)) and not any(word in chat for word in self.lacks)
        return texts and (not self.types or model_type in self.types)


_QWEN2 = ("qwen2", "qwen2_moe", "qwen")
_QWEN3 = ("qwen3", "qwen3_moe")
# The first that fits. A mark alone, at the end of its group: a family that only the name or the user can tell.
_RULES = (
    _Rule("<|im_sep|>", ("phi4",)),
    _Rule("<|im_start|>", ("qwen",), _QWEN2, lacks=("<think>",)),
    _Rule("<|im_start|>", ("qwen", "qwen3"), _QWEN2),
    _Rule("<|im_start|>", ("qwen3",), _QWEN3, has=("enable_thinking",)),
    _Rule("<|im_start|>", ("qwen3_nothink",), _QWEN3, lacks=("think>",)),
    _Rule("<|im_start|>", ("qwen3", "qwen3_nothink"), _QWEN3),
    _Rule("<|im_start|>", ("qwen2_vl",), ("qwen2_vl", "qwen2_5_vl")),
    _Rule("<|im_start|>", ("qwen3_vl",), ("qwen3_vl", "qwen3_vl_moe"), has=("<think>",)),
    _Rule("<|im_start|>", ("qwen3_vl_nothink",), ("qwen3_vl", "qwen3_vl_moe")),
    _Rule("<|im_start|>", ("qwen3_5", "qwen3_5_nothink", "qwen3_6"), ("qwen3_5", "qwen3_5_moe")),
    _Rule("<|im_start|>", ("intern2",), ("internlm2", "internlm3")),
    _Rule("<|im_start|>", ("yi", "chatml", "smollm", "smollm2", "opencoder"), ("llama",)),
    _Rule("<|im_start|>", ("chatml",)),
    _Rule("<|start_header_id|>", ("mllama",), ("mllama",)),
    _Rule("<|start_header_id|>", ("llama3",)),
    _Rule("<|header_start|>", ("llama4",)),
    _Rule("<｜Assistant｜>", ("deepseekr1",), ("qwen2", "qwen3", "llama"), has=("think>",)),
    _Rule("<｜Assistant｜>", ("deepseekr1", "deepseek3"), has=("think>",)),
    _Rule("<｜Assistant｜>", ("deepseek3",)),
    _Rule("<start_of_turn>", ("gemma",), ("gemma",)),
    _Rule("<start_of_turn>", ("gemma2",), ("gemma2", "gemma3_text")),
    _Rule("<start_of_turn>", ("gemma3",), ("gemma3",)),
    _Rule("<start_of_turn>", ("gemma3n",), ("gemma3n",)),
    _Rule("<start_of_turn>", ("gemma", "gemma2", "gemma3")),
    _Rule("[gMASK]<sop>", ("glm4",), ("chatglm", "glm", "glm4"), lacks=("<think>",)),
    _Rule("[gMASK]<sop>", ("glmz1",), ("chatglm", "glm", "glm4")),
    _Rule("[gMASK]<sop>", ("glm4_moe", "glm4_7", "glm4v", "glm4_5v")),
    _Rule("[SYSTEM_PROMPT]", ("mistral_small", "ministral3")),
    _Rule("[INST]", ("llama2",), ("llama",), has=("<<SYS>>",)),
    _Rule("[INST] ", ("mistral",), ("mistral", "mixtral")),
    _Rule("[INST]", ("ministral",), ("mistral", "mixtral")),
    _Rule("[INST]", ("llama2", "mistral", "ministral")),
    _Rule("<|end|>", ("phi_small",), ("phi3small",)),
    # Phi-4-mini puts the role into the marker, so the text has no <|user|> of its own
    _Rule("<|end|>", ("phi",), ("phi3",), has=("<|user|>",)),
    _Rule("<|end|>", ("phi4_mini",), ("phi3",)),
    _Rule("<|START_OF_TURN_TOKEN|>", ("cohere",)),
    _Rule("<|start_of_role|>", ("granite3",), ("granite",)),
    _Rule("<|start_of_role|>", ("granite4",), ("granitemoehybrid",)),
    _Rule("<|start_of_role|>", ("granite3", "granite4")),
    _Rule("<|start|>", ("gpt_oss",), ("gpt_oss",)),
    _Rule("<reserved_106>", ("baichuan2",)),
    _Rule("### Instruction:", ("deepseekcoder", "alpaca")),
    _Rule("<|assistant|>", ("zephyr", "olmo", "starchat", "glm4"), has=("<|user|>",)),
    _Rule("ASSISTANT:", ("vicuna",)),
)
# Where there is no chat template at all: a base model, or one whose files lost it.
_BARE = {
    "qwen2": ("qwen",),
    "qwen2_moe": ("qwen",),
    "qwen": ("qwen",),
    "qwen3": ("qwen3", "qwen3_nothink"),
    "baichuan": ("baichuan2", "baichuan"),
    "llama": ("default", "llama3", "llama2"),
    "mistral": ("default", "mistral"),
    "gemma": ("default", "gemma"),
    "gemma2": ("default", "gemma2"),
    "chatglm": ("glm4", "chatglm3"),
    "internlm2": ("intern2",),
}


def choose_template(folder: Path, name: str) -> Choice:
    """The template of the model in ``folder``, which the user calls ``name``. Raises PkuslurmError where several fit
    or none does."""
    config = read_object(folder / "config.json")
    model_type = str(config.get("model_type") or "")
    chat = chat_template(folder)
    listed, as_name = _by_name(folder, name, config)
    fitting = _by_content(model_type, chat, folder)
    what = f"model_type {model_type or 'unknown'}, {_marks(chat)}"
    if listed and (not fitting or listed in fitting):
        return Choice(listed, f"LLaMA-Factory's for {as_name}")
    if len(fitting) == 1:
        return Choice(fitting[0], what)
    if not fitting:
        raise PkuslurmError(
            f"model.template=auto: which chat template {folder} wants cannot be told ({what}); "
            "write model.template=… (qwen, llama3, chatml, default, … as in LLaMA-Factory's list)"
        )
    raise PkuslurmError(
        f"model.template=auto: several fit {folder} ({what}); candidates are {', '.join(fitting)}; "
        f"write model.template={fitting[0]}, or another of them"
    )


def check_template(folder: Path, template: str) -> list[str]:
    """Warnings about ``template`` on the model in ``folder``.

    LLaMA-Factory adds a token that the tokenizer lacks: its id lies beyond the embeddings, where training dies, or on a
    row that nobody trained and that the merged model's tokenizer does not know. Raises PkuslurmError for those.
    """
    facts = _table()["templates"].get(template)
    if facts is None or not (facts["needs"] or facts["marker"]):
        return []
    wanted = [*facts["needs"], *facts["marker"]]
    known = _tokens(folder, wanted)
    if known is None:
        return []
    missing = [token for token in facts["needs"] if token not in known]
    if missing:
        raise PkuslurmError(
            f"model.template={template}: the tokenizer of {folder} has no {' '.join(missing)}; {_instead(folder)}"
        )
    plain = [token for token in facts["marker"] if token not in known]
    if plain:
        return [
            f"model.template={template}: {' '.join(plain)} is no token of this model and is written out as plain text"
        ]
    return []


def chat_template(folder: Path) -> str:
    """The text of the model's own chat template, empty where it has none."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        pass
    for file in ("tokenizer_config.json", "chat_template.json"):
        found = read_object(folder / file).get("chat_template")
        if isinstance(found, list):  # several, each with a name
            by_name = {part.get("name"): part.get("template") for part in found if isinstance(part, dict)}
            found = by_name.get("default") or next(iter(by_name.values()), "")
        if isinstance(found, str) and found:
            return found
    return ""


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def _by_name(folder: Path, name: str, config: dict[str, Any]) -> tuple[str | None, str]:
    for candidate in _names(folder, name, config):
        # ModelScope writes dots as three underscores
        plain = candidate.replace("___", ".")
        if (template := _table()["models"].get(plain.lower())) is not None:
            return template, plain
    return None, ""


def _names(folder: Path, name: str, config: dict[str, Any]) -> Iterator[str]:
    yield name.rstrip("/").rpartition("/")[2]
    yield folder.name
    # Hugging Face's cache: models--owner--name/snapshots/<hash>
    yield from (part.rpartition("--")[2] for part in folder.parts if part.startswith("models--"))
    original = config.get("_name_or_path")
    if isinstance(original, str):
        yield original.rstrip("/").rpartition("/")[2]


def _by_content(model_type: str, chat: str, folder: Path) -> tuple[str, ...]:
    if chat:
        return next((rule.templates for rule in _RULES if rule.fits(model_type, chat)), ())
    fitting = _BARE.get(model_type, ())
    needs = {token for template in fitting for token in _table()["templates"][template]["needs"]}
    known = _tokens(folder, sorted(needs))
    if known is None:
        return fitting
    return tuple(name for name in fitting if set(_table()["templates"][name]["needs"]) <= known)


def _marks(chat: str) -> str:
    if not chat:
        return "no chat template"
    found = dict.fromkeys(rule.mark.strip() for rule in _RULES if rule.mark in chat)
    return f"chat template with {' '.join(list(found)[:3])}" if found else "a chat template of no known family"


def _instead(folder: Path) -> str:
    try:
        choice = choose_template(folder, folder.name)
    except PkuslurmError:
        return "choose a template whose special tokens the model has"
    return f"model.template={choice.template} fits ({choice.why})"


def _tokens(folder: Path, wanted: list[str]) -> set[str] | None:
    """Those of ``wanted`` that the tokenizer has; None where that cannot be told without a library."""
    listed = read_object(folder / "tokenizer_config.json").get("added_tokens_decoder")
    known = _contents(listed.values() if isinstance(listed, dict) else ())
    if set(wanted) <= known:
        return set(wanted)
    whole = read_object(folder / "tokenizer.json")  # some megabytes: only where the short list does not do
    if not whole:
        return None
    known |= _contents(whole.get("added_tokens") or ())
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # unigram: [token, score]
        vocabulary = {entry[0] for entry in vocabulary if isinstance(entry, list) and entry}
    return {token for token in wanted if token in known or token in (vocabulary or ())}


def _contents(entries: Iterable[object]) -> set[str]:
    return {str(entry["content"]) for entry in entries if isinstance(entry, dict) and "content" in entry}
