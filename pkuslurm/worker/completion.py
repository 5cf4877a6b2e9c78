"""Whether a job is complete, judged from what it made.

An exit code of 0, all_results.json or a stopped trainer can each mean "half trained".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.worker.job import Job

# a safetensors header of more than this is refused by the library too
_LARGEST_HEADER = 100_000_000


class Incomplete(Exception):
    """What is missing or half written, in one line."""


def judge(job: Job) -> list[Path]:
    """The files that prove that ``job`` is complete, for its marker.

    Raises Incomplete, or PkuslurmError for an ``expect`` that lacks a field.
    """
    match job.kind:
        case "prepare":
            return _prepare(_path(job, "dir"), job.expect.get("model"))
        case "train":
            return _train(_path(job, "dir"), str(job.expect.get("weights") or "adapter_model.safetensors"))
        case "merge":
            return _merge(_path(job, "dir"))
        case "infer":
            return [_answers(_path(job, "file"), job.expect.get("lines"))]
        case "report" | "serve":
            return [_not_empty(_path(job, "file"))]
    raise PkuslurmError(f"job kind {job.kind}: nothing is known about when it is complete")


def _path(job: Job, name: str) -> Path:
    value = job.expect.get(name)
    if not isinstance(value, str) or not value:
        raise PkuslurmError(f"job {job.kind}: expect.{name} is {value!r}, must be a path")
    path = Path(value)
    # a marker names its artifacts relative to the run
    if not path.is_relative_to(job.run.path):
        raise PkuslurmError(f"job {job.kind}: expect.{name} {value} is outside of the run {job.run.path}")
    return path


def _prepare(folder: Path, model: object) -> list[Path]:
    files = list(_files(folder))
    arrows = [path for path in files if path.suffix == ".arrow"]
    if not arrows:
        raise Incomplete(f"{folder}: no tokenized data (no .arrow file)")
    for path in arrows:
        _not_empty(path)
        for name in ("dataset_info.json", "state.json"):
            _object(path.parent / name)
        named = _object(path.parent / "state.json").get("_data_files") or []
        for entry in named:
            _not_empty(path.parent / str(entry.get("filename") if isinstance(entry, dict) else entry))
    if isinstance(model, str) and model:
        _object(Path(model) / "config.json")
    return files


def _train(folder: Path, weights: str) -> list[Path]:
    # LLaMA-Factory writes it into the root only after the last step, never when the trainer was stopped
    state_file = folder / "trainer_state.json"
    state = _object(state_file)
    step, last = state.get("global_step"), state.get("max_steps")
    if not isinstance(step, int) or not isinstance(last, int) or step < 1:
        raise Incomplete(f"{state_file}: no global_step and max_steps")
    if step < last and not _stopped_early(state):
        raise Incomplete(f"{state_file}: stopped at step {step} of {last}")
    if weights == "model":
        return [state_file, *model_weights(folder)]
    spans(folder / weights)
    _object(folder / "adapter_config.json")
    return [state_file, folder / weights, folder / "adapter_config.json"]


def _stopped_early(state: dict[str, Any]) -> bool:
    """Whether it was early stopping, which the user asked for, that ended the training."""
    callbacks = state.get("stateful_callbacks")
    callback = callbacks.get("EarlyStoppingCallback") if isinstance(callbacks, dict) else None
    if not isinstance(callback, dict):
        return False
    try:
        counter = callback["attributes"]["early_stopping_patience_counter"]
        return bool(counter >= callback["args"]["early_stopping_patience"])
    except (KeyError, TypeError):
        return False


def _merge(folder: Path) -> list[Path]:
    model_weights(folder)
    return list(_files(folder))


def model_weights(folder: Path) -> list[Path]:
    """config.json and the weights of a model's folder: one file, or all that the index names."""
    _object(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        spans(folder / "model.safetensors")
        return [folder / "config.json", folder / "model.safetensors"]
    parts = _object(index).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise Incomplete(f"{index}: names no weights")
    shards = [folder / name for name in sorted({str(name) for name in parts.values()})]
    for shard in shards:
        spans(shard)
    return [folder / "config.json", index, *shards]


def spans(path: Path) -> None:
    """Check that the tensors a safetensors header promises end exactly where the file does."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise Incomplete(f"{path}: truncated, {size} bytes")
            header = json.loads(file.read(length))
        end = max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
    except OSError as error:
        raise Incomplete(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise Incomplete(f"{path}: no readable safetensors header, or no tensors") from None
    if 8 + length + end != size:
        raise Incomplete(f"{path}: truncated, {size} bytes of {8 + length + end}")


def _answers(path: Path, lines: object) -> Path:
    _not_empty(path)
    good = 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            whole = isinstance(json.loads(line), dict)
        except ValueError:
            whole = False
        if not whole:
            raise Incomplete(f"{path}: line {number} is no JSON object")
        good += 1
    if isinstance(lines, int) and good != lines:
        raise Incomplete(f"{path}: {good} answers of {lines}")
    return path


def _not_empty(path: Path) -> Path:
    try:
        if path.stat().st_size > 0:
            return path
    except OSError as error:
        raise Incomplete(f"{path}: {error.strerror or error}") from None
    raise Incomplete(f"{path}: empty")


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise Incomplete(f"{path}: {error.strerror or error}") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Incomplete(f"{path}: no whole JSON object")
    return value


def _files(folder: Path) -> Iterator[Path]:
    """All files below ``folder``, which may itself be a link into the cache."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in names)
