"""Asking a real LLaMA-Factory, once for all rows: it takes as long as its imports."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.config.rows import FINE, ROWS

PROGRAM = Path(__file__).with_name("parser_says.py")


def ask(python: str, rows: list[dict[str, Any]]) -> list[str | None]:
    """What get_train_args of ``python`` says to each row; None where it takes it."""
    ended = subprocess.run(
        [python, str(PROGRAM)],
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        env={name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "ACCELERATE_"))},
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert len(lines) == 1, ended.stderr[-2000:]
    answers: list[str | None] = json.loads(lines[0].removeprefix("ANSWERS "))
    assert len(answers) == len(rows)
    return answers


def disagreements(python: str, version: str) -> list[str]:
    """Rows that this version takes although we refuse them, and those that it refuses although we take them."""
    rows = [row for row in ROWS if row.parser and version in row.versions]
    answers = ask(python, [*(row.train for row in rows), *FINE])
    taken = [f"taken: {row.train}" for row, answer in zip(rows, answers, strict=False) if answer is None]
    refused = [
        f"refused: {train}: {answer}" for train, answer in zip(FINE, answers[len(rows) :], strict=True) if answer
    ]
    return taken + refused
