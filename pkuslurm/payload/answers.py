"""What was answered: the lines of answers.jsonl, whether they are what was expected, adapter against merged."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import refuse, write_text

MOST_DIFFERENCES = 5


@dataclass
class Answers:
    """One model's answers in the prompts' order, and its first-token logits: index of the prompt → float32 row."""

    texts: list[str]
    logits: dict[int, Any] = field(default_factory=dict)


def check_patterns(prompts: Sequence[dict[str, Any]]) -> None:
    """Refuse an expectation that is no regular expression, before anything is loaded."""
    for number, prompt in enumerate(prompts):
        if prompt.get("expect") is not None:
            try:
                re.compile(prompt["expect"])
            except re.error as error:
                refuse(f"infer.expect {prompt['expect']!r} of prompt {number + 1}: {error}; mend the expression")


def passes(expect: str | None, answer: str) -> bool | None:
    """Whether ``expect`` is found in ``answer``; None if nothing is expected."""
    return None if expect is None else re.search(expect, answer) is not None


def answer_lines(
    prompts: Sequence[dict[str, Any]], base: Sequence[str] | None, tuned: Sequence[str]
) -> list[dict[str, Any]]:
    """The lines of answers.jsonl, in the prompts' order."""
    lines = []
    for index, (prompt, answer) in enumerate(zip(prompts, tuned, strict=True)):
        line: dict[str, Any] = {"prompt": prompt["prompt"]}
        if prompt.get("system"):
            line["system"] = prompt["system"]
        line |= {"base": base[index] if base is not None else None, "tuned": answer}
        lines.append(line | {"passed": passes(prompt.get("expect"), answer)})
    return lines


def count_passed(lines: Sequence[dict[str, Any]]) -> int | None:
    """How many passed; None if nothing was expected of any."""
    asked = [line["passed"] for line in lines if line["passed"] is not None]
    return sum(asked) if asked else None


def compare(prompts: Sequence[dict[str, Any]], adapter: Answers | None, merged: Answers) -> dict[str, Any]:
    """Adapter against merged: information only. A bf16 merge is rounded, the adapter is not: texts may part."""
    if adapter is None:
        return {"adapter_merged_equal": None, "max_logit_diff": None, "differences": []}
    pairs = list(zip(prompts, adapter.texts, merged.texts, strict=True))
    different = [
        {"prompt": prompt["prompt"], "adapter": one, "merged": other} for prompt, one, other in pairs if one != other
    ]
    distances = [
        float((row - merged.logits[index]).abs().max())
        for index, row in adapter.logits.items()
        if index in merged.logits and row.shape == merged.logits[index].shape
    ]
    return {
        "adapter_merged_equal": [len(pairs) - len(different), len(pairs)],
        "max_logit_diff": max(distances, default=None),
        "differences": different[:MOST_DIFFERENCES],
    }


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines so that a reader sees the old file or the new one. Raises OSError."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    # JSON allows them inside a string, and many readers take them for the end of a line
    for character in "\u2028\u2029\x85":
        text = text.replace(character, f"\\u{ord(character):04x}")
    write_text(path, text)
