"""What a model cannot take is refused in words, by what its config.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.serve.limits import Limits, read, require
from pkuslurm.serve.refusal import BadRequest


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} | more


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        ({"vocab_size": 9, "max_position_embeddings": 512}, Limits(9, 512)),
        ({"text_config": {"vocab_size": 9, "max_position_embeddings": 512}}, Limits(9, 512)),
        ({"max_position_embeddings": 512, "rope_scaling": {"factor": 4.0}}, Limits(None, 2048)),
        ({"vocab_size": "9", "max_position_embeddings": -1, "rope_scaling": 3}, Limits()),
        ({}, Limits()),
    ],
)
def test_limits_are_the_configs(tmp_path: Path, config: dict[str, Any], limits: Limits) -> None:
    assert read(str(tmp_path)) == Limits()
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert read(str(tmp_path)) == limits


def test_a_bias_for_no_token_of_the_model_is_refused() -> None:
    require(Limits(9), body("x", logit_bias={"0": 1.0, "8": 1.0}), True)
    require(Limits(), body("x", logit_bias={"9": 1.0}), True)
    with pytest.raises(BadRequest, match="logit_bias: the model has no token 9, only 0 to 8") as refused:
        require(Limits(9), body("x", logit_bias={"9": 1.0}), True)
    assert refused.value.status == 400


def test_a_conversation_that_no_tokenizer_makes_short_enough_is_refused() -> None:
    limits = Limits(None, 512)
    with pytest.raises(BadRequest, match="48000 characters the conversation is longer than the 512 tokens"):
        require(limits, body("北京大学" * 12000), False)
    for text, bounded in (("北京大学" * 12000, True), ("北京大学" * 500, False), (" " * 100_000, False)):
        require(limits, body(text), bounded)
    require(Limits(), body("北京大学" * 12000), False)
