"""Whether the chat template that is saved with a model asks as the training's template did, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# characters that are told of a text that one of the two adds
LONGEST = 300


def compare_ids(
    prompts: Sequence[dict[str, Any]],
    asked: Sequence[list[int]],
    saved: Sequence[list[int] | None],
    decode: Callable[[list[int]], str],
) -> dict[str, Any]:
    """The training's template against the saved chat template; ``token_ids``: true, false or null for each prompt;
    ``template_difference``: of the first prompt that they write differently, the text that each alone has."""
    same = [None if other is None else own == other for own, other in zip(asked, saved, strict=True)]
    known = [one for one in same if one is not None]
    difference = None
    if False in same:
        index = same.index(False)
        ours, theirs = (decode(part) for part in apart(asked[index], saved[index] or []))
        difference = {
            "prompt": prompts[index]["prompt"],
            "training": ours[:LONGEST],
            "saved": theirs[:LONGEST],
        }
    equal = [sum(known), len(same)] if known else None
    return {"token_ids_equal": equal, "token_ids": same, "template_difference": difference}


def apart(one: list[int], other: list[int]) -> tuple[list[int], list[int]]:
    """Both without what they end with and then begin with alike: so a text that only one has is whole."""
    end = _alike(one[::-1], other[::-1])
    one, other = one[: len(one) - end], other[: len(other) - end]
    begin = _alike(one, other)
    return one[begin:], other[begin:]


def _alike(one: list[int], other: list[int]) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
