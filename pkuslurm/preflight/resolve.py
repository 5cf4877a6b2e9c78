"""What a run needs from this machine, found or refused before anything is written. Reads; starts and writes nothing."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from pkuslurm.config.checks import check_pattern
from pkuslurm.config.schema import Config
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import absolute
from pkuslurm.plan.inputs import Inputs, Prompt
from pkuslurm.preflight.datasets import find_dataset
from pkuslurm.preflight.models import check_model, find_model, guess_template, where_looked
from pkuslurm.render.render import TINY_MODEL

T = TypeVar("T")
# What a run writes beside the weights: tokenized data, logs, answers, the report.
SMALL_BYTES = 200_000_000


def resolve(config: Config, environ: Mapping[str, str], lenient: bool) -> Inputs:
    """The run's inputs, absolute. ``lenient`` (a dry run): what is not here becomes a note instead of a refusal."""
    notes = list(config.notes)

    def here(find: Callable[[], T], otherwise: T) -> T:
        try:
            return find()
        except PkuslurmError as problem:
            if not lenient:
                raise
            notes.append(str(problem))
            return otherwise

    model = here(lambda: _model(config, environ), str(config.model.path))
    template = here(lambda: _template(config, model), config.model.template)
    nothing: tuple[Prompt, ...] = ()
    prompts = here(lambda: _prompts(config), nothing)
    name, file, formatting, info = config.dataset.name or "custom", config.dataset.path or "", "alpaca", {}
    if config.dataset.path is not None and "train" in config.pipeline.jobs:
        found = here(lambda: find_dataset(config.dataset), None)
        if found is not None:
            name, file, formatting, info = found.name, str(found.file), found.formatting, found.info
        else:
            info = {name: {"file_name": str(Path(file).expanduser().absolute()), "formatting": formatting}}
    adapter = here(lambda: _folder("infer.adapter", config.infer.adapter), config.infer.adapter)
    base = here(lambda: _known_model(config.infer.base, environ), config.infer.base)
    python = _python(config.cluster.python)
    return Inputs(model, template, name, info, file, formatting, prompts, adapter, base, python, tuple(notes))


def check_machine(config: Config, inputs: Inputs) -> None:
    """What would fail later on this machine: LLaMA-Factory not installed, no room, a folder that cannot be written."""
    if config.cluster.python is None and importlib.util.find_spec("llamafactory") is None:
        raise PkuslurmError(
            f"cluster.python: {sys.executable} has no LLaMA-Factory; run `make setup` and use .venv/bin/python, "
            "or name an interpreter that has it"
        )
    if config.cluster.python is not None and shutil.which(config.cluster.python) is None:
        raise PkuslurmError(f"cluster.python={config.cluster.python}: there is no such program")
    for key, folder in (("run_root", config.run_root), ("cache_root", config.cache_root)):
        if "," in folder:
            raise PkuslurmError(f"{key}={folder}: LLaMA-Factory splits paths at commas; give a folder without one")
    need = SMALL_BYTES + _weights(Path(inputs.model_path)) * 2  # the merged model, and as much again while it is made
    for key, folder in (("run_root", config.run_root), ("cache_root", config.cache_root)):
        there = _nearest_existing(Path(folder).expanduser().absolute())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise PkuslurmError(f"{key}={folder}: {there} cannot be written by you; give a folder of your own")
        free = shutil.disk_usage(there).free
        wanted = need if key == "run_root" else SMALL_BYTES
        if free < wanted:
            raise PkuslurmError(f"{key}={folder}: {free / 1e9:.1f} GB are free, {wanted / 1e9:.1f} GB are needed")


def _python(name: str | None) -> str:
    """Absolute, since jobs start in the run's directory; not resolved: a link leads out of a virtual environment."""
    if name is None:
        return sys.executable
    found = shutil.which(os.path.expanduser(name))
    return os.path.abspath(found) if found else name


def _model(config: Config, environ: Mapping[str, str]) -> str:
    if config.model.make is not None:
        made = Path(absolute(config.cache_root)) / "models" / TINY_MODEL
        if "prepare" not in config.pipeline.jobs and not made.is_dir():
            raise PkuslurmError(
                f"model.make={config.model.make}: pipeline={config.pipeline.name} makes no model; give model.path"
            )
        return str(made)
    found = _known_model(config.model.path, environ, "model.path")
    assert found is not None
    return found


def _known_model(name: str | None, environ: Mapping[str, str], key: str = "infer.base") -> str | None:
    if name is None:
        return None
    found = find_model(name, environ)
    if found is None:
        looked = where_looked(name, environ)
        places = f"; looked in {', '.join(looked[:4])}" if looked else ""
        fetch = f"; get it with: modelscope download --model {name}" if looked else ""
        raise PkuslurmError(f"{key}={name}: no such folder or downloaded model{places}{fetch}")
    check_model(found)
    return str(found)


def _template(config: Config, model: str) -> str:
    if config.model.template != "auto":
        return config.model.template
    guessed = guess_template(Path(model))
    if guessed is None:
        raise PkuslurmError(
            f"model.template=auto: which chat template {model} wants cannot be told; "
            "write model.template=qwen, llama3, … as in LLaMA-Factory's list"
        )
    return guessed


def _folder(key: str, path: str | None) -> str | None:
    if path is None:
        return None
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise PkuslurmError(f"{key}={path}: there is no such folder")
    return str(folder)


def _prompts(config: Config) -> tuple[Prompt, ...]:
    if isinstance(config.infer.prompts, list):
        rows = [Prompt(text) for text in config.infer.prompts]
    elif "infer" in config.pipeline.jobs:
        rows = _prompts_file(Path(config.infer.prompts).expanduser().absolute())
    else:
        rows = []
    expect = config.infer.expect
    if isinstance(expect, list):
        if len(expect) != len(rows):
            raise PkuslurmError(f"infer.expect: {len(expect)} expectations for {len(rows)} prompts; give one for each")
        return tuple(Prompt(row.prompt, want, row.system) for row, want in zip(rows, expect, strict=True))
    return tuple(Prompt(row.prompt, row.expect or expect, row.system) for row in rows)


def _prompts_file(file: Path) -> list[Prompt]:
    """txt: one a line; json, jsonl, csv: objects with prompt and, if wanted, expect and system."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PkuslurmError(f"infer.prompts={file}: it cannot be read ({error})") from None
    try:
        objects: list[Any]
        if file.suffix == ".json":
            objects = json.loads(text)
        elif file.suffix == ".jsonl":
            objects = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif file.suffix == ".csv":
            objects = list(csv.DictReader(StringIO(text, newline="")))
        else:
            objects = [line.strip() for line in text.split("\n") if line.strip()]
        if not isinstance(objects, list):
            raise TypeError("a list is wanted")
        rows = [_prompt(item) for item in objects]
    except (ValueError, KeyError, TypeError, csv.Error):
        raise PkuslurmError(
            f"infer.prompts={file}: not a file of prompts; txt has one a line, json, jsonl and csv have a field prompt"
        ) from None
    for row in rows:
        if row.expect is not None:
            check_pattern(row.expect)
    if not rows:
        raise PkuslurmError(f"infer.prompts={file}: there is no prompt in it")
    return rows


def _prompt(item: object) -> Prompt:
    if isinstance(item, str):
        return Prompt(item)
    if not isinstance(item, dict):
        raise TypeError("a prompt is a text or an object")
    values = (item["prompt"], item.get("expect") or None, item.get("system") or None)
    if not all(isinstance(value, str) for value in values if value is not None) or not values[0]:
        raise TypeError("prompt, expect and system are texts")
    return Prompt(*values)


def _nearest_existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _weights(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors")) if model.is_dir() else 0
