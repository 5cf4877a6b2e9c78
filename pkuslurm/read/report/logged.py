"""The last numbers that a training has logged, read from the ends of its files: a sweep has a thousand of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pkuslurm.rundir import RunDir, read_json

BLOCK = 64 * 1024
# how far back a number is looked for: five thousand rows and more
FARTHEST = 1024 * 1024
# by LLaMA-Factory at the end of a training: of the model as it was saved (the best one, where it loads that)
RESULTS = ("eval_results.json", "all_results.json", "train_results.json")
# of trainer_log.jsonl; other metrics of a stage are in trainer_state.json alone
COLUMNS = ("loss", "eval_loss", "lr", "epoch", "accuracy")


def last(run: RunDir, names: Collection[str], complete: bool) -> dict[str, Any]:
    """name → the value that was logged last, as it stands there; a name that was never logged is left out.

    ``complete``: the training is, and so its results are of it, not of one before.
    """
    found: dict[str, Any] = {}
    for file in RESULTS if complete else ():
        found = _of(read_json(run.adapter / file), names) | found
    log = run.adapter / "trainer_log.jsonl"
    found = _of_rows(_backwards(log), names) | found
    missing = set(names) - found.keys()
    # megabytes, to be read as a whole: only for what the log has no column for
    if missing := missing - set(COLUMNS if log.is_file() else ()):
        history = (read_json(run.adapter / "trainer_state.json") or {}).get("log_history")
        for row in reversed(history if isinstance(history, list) else []):
            found = _of(row, missing) | found
    return found


def names(run: RunDir) -> list[str]:
    """What a complete training has logged, by name."""
    found: dict[str, Any] = {}
    for file in RESULTS:
        found |= read_json(run.adapter / file) or {}
    for line in _backwards(run.adapter / "trainer_log.jsonl", BLOCK):
        with suppress(ValueError):
            found |= {name: value for name, value in json.loads(line).items() if isinstance(value, int | float)}
    return sorted(found)


def _of(row: object, names: Collection[str]) -> dict[str, Any]:
    return {name: row[name] for name in names if row.get(name) is not None} if isinstance(row, dict) else {}


def _of_rows(lines: Iterator[bytes], names: Collection[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    missing = {f'"{name}"'.encode() for name in names}
    for line in lines:
        if not any(name in line for name in missing):
            continue
        with suppress(ValueError, AttributeError):
            found = _of(json.loads(line), names) | found
            missing = {f'"{name}"'.encode() for name in names if name not in found}
        if not missing:
            break
    return found


def _backwards(path: Path, farthest: int = FARTHEST) -> Iterator[bytes]:
    """The lines of ``path``, the last one first, not farther back than so many bytes; none where it cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        end = file.seek(0, 2)
        stop = max(0, end - farthest)
        rest = b""
        while end > stop:
            begin = max(stop, end - BLOCK)
            file.seek(begin)
            first, *lines = (file.read(end - begin) + rest).split(b"\n")
            yield from reversed(lines)
            rest, end = first, begin
        if stop == 0:
            yield rest
