"""The questions and what is expected of their answers: from the configuration, or from a file of them. Reads only."""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

from pkuslurm.config.checks import check_pattern
from pkuslurm.config.schema import Config
from pkuslurm.errors import PkuslurmError
from pkuslurm.plan.inputs import Prompt
from pkuslurm.preflight.nearest import nearest_to

# A file's own words for its columns; the first is ours.
COLUMNS = {
    "prompt": ("prompt", "question", "instruction", "问题", "提示"),
    "expect": ("expect", "expected", "期望"),
    "system": ("system", "系统提示"),
}
ENCODINGS = ("utf-8-sig", "gb18030")


def prompts_of(config: Config) -> tuple[Prompt, ...]:
    """Each question with its own expectation, else the one for all, else none. Raises PkuslurmError."""
    if "infer" not in config.pipeline.jobs:
        return ()
    given, expect = config.infer.prompts, config.infer.expect
    rows = (
        [Prompt(text) for text in given]
        if isinstance(given, list)
        else read_prompts(Path(given).expanduser().absolute())
    )
    if isinstance(expect, list):
        if len(expect) != len(rows):
            raise PkuslurmError(f"infer.expect: {len(expect)} expectations for {len(rows)} prompts; give one for each")
        return tuple(Prompt(row.prompt, want, row.system) for row, want in zip(rows, expect, strict=True))
    return tuple(Prompt(row.prompt, row.expect or expect, row.system) for row in rows)


def read_prompts(file: Path) -> list[Prompt]:
    """txt: one a line; json, jsonl, csv: texts, or objects with prompt and, if wanted, expect and system."""
    text = _text(file)
    try:
        rows = [_prompt(item) for item in _items(file, text)]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        why = f"it has no column prompt, only {error.args[1]}" if isinstance(error, KeyError) else str(error)
        raise PkuslurmError(
            f"infer.prompts={file}: not a file of prompts ({why}); txt has one a line, json, jsonl, csv have a field "
            "prompt"
        ) from None
    for row in rows:
        if row.expect is not None:
            check_pattern(row.expect)
    if not rows:
        raise PkuslurmError(f"infer.prompts={file}: there is no prompt in it")
    return rows


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        hint = "" if file.suffix else "; questions themselves are written as a list: infer.prompts=[a,b]"
        raise PkuslurmError(
            f"infer.prompts={file}: it cannot be read ({error.strerror}){hint or nearest_to(file)}"
        ) from None
    for encoding in ENCODINGS:  # what Chinese spreadsheets save
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise PkuslurmError(f"infer.prompts={file}: it is neither UTF-8 nor GB18030; save it as UTF-8")


def _items(file: Path, text: str) -> list[Any]:
    if file.suffix == ".json":
        value = json.loads(text)
        if not isinstance(value, list):
            raise TypeError("a list is wanted")
        return value
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if file.suffix == ".csv":
        return list(csv.DictReader(StringIO(text, newline="")))
    return [line.strip() for line in text.split("\n") if line.strip()]


def _prompt(item: object) -> Prompt:
    if isinstance(item, str):
        return Prompt(item)
    if not isinstance(item, dict):
        raise TypeError("a prompt is a text or an object")
    lower = {str(name).strip().lower(): value for name, value in item.items()}
    found = {role: next((lower[name] for name in names if name in lower), None) for role, names in COLUMNS.items()}
    if found["prompt"] is None:
        raise KeyError("prompt", ", ".join(str(name) for name in item))
    values = (found["prompt"], found["expect"] or None, found["system"] or None)
    if not all(isinstance(value, str) for value in values if value is not None) or not values[0].strip():
        raise TypeError("prompt, expect and system are texts, and a prompt is not empty")
    return Prompt(*values)
