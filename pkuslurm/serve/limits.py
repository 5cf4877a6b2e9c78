"""What a model can take, as its config.json says: for engines that would fail or compute nonsense over the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkuslurm.rundir import read_json
from pkuslurm.serve.refusal import BadRequest

# no text has so many characters to a token, rows of one character apart, which are counted as one
_MOST_CHARACTERS = 16
_ROW = re.compile(r"(.)\1+", re.DOTALL)


@dataclass(frozen=True)
class Limits:
    """``tokens``: how many there are to choose from; ``context``: how many it was made to read; None: unknown."""

    tokens: int | None = None
    context: int | None = None


def read(folder: str) -> Limits:
    """Of the model in ``folder``."""
    value = read_json(Path(folder) / "config.json") or {}
    inner = value.get("text_config")
    config = value | inner if isinstance(inner, dict) else value
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    context = _count(config.get("max_position_embeddings"))
    if context is not None and isinstance(factor, int | float) and factor > 1:
        context = int(context * factor)
    return Limits(_count(config.get("vocab_size")), context)


def require(limits: Limits, body: Mapping[str, Any], bounded: bool) -> None:
    """Raise BadRequest for what the model cannot take. ``bounded``: the engine itself refuses what is too long."""
    most = limits.tokens
    if most is not None and (odd := next((one for one in body.get("logit_bias", ()) if int(one) >= most), None)):
        raise BadRequest(f"logit_bias: the model has no token {odd}, only 0 to {most - 1}", "logit_bias")
    if bounded or limits.context is None:
        return
    length = sum(len(_ROW.sub(r"\1", message["content"])) for message in body["messages"])
    if length > limits.context * _MOST_CHARACTERS:
        words = f"with {length} characters the conversation is longer than the {limits.context} tokens"
        raise BadRequest(f"messages: {words} that the model can read", "messages", code="context_length_exceeded")


def _count(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None
