"""All of a run's data: what is trained on, what is held out, and the steps that come of it. Reads only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pkuslurm.config.schema import Config, Dataset
from pkuslurm.paths import absolute
from pkuslurm.payload.steps import count, step_lines
from pkuslurm.plan.resources import cluster_for
from pkuslurm.preflight.datasets import Found, entry, find_dataset, is_remote, names_of
from pkuslurm.preflight.notes import Notes


def find_data(config: Config, said: Notes) -> list[Found]:
    """The data to train on, then what is held out, each once, with what was found out and the steps that come of it."""
    name, path = config.dataset.name or "custom", config.dataset.path
    if path is None or "train" not in config.pipeline.jobs:
        return [Found(name, Path(), "alpaca", {})]
    evaluated = names_of(config.train.get("eval_dataset"))
    names = names_of(config.dataset.name)
    trained = [entry(config.dataset, one, "dataset.name") for one in names] if len(names) > 1 else [config.dataset]
    if not names and evaluated and config.train.get("do_train") is False:
        trained = []
    found = [_dataset(config, one, said) for one in trained]
    usable = [_most(one, config.train, len(found)) for one in found]
    if all(rows is not None for rows in usable) and found and config.train.get("mix_strategy", "concat") == "concat":
        ranks = cluster_for(config, "train").nproc_per_node or 1
        several = {key: value for key, value in config.train.items() if len(found) == 1 or key != "max_samples"}
        lines, warnings = step_lines(sum(filter(None, usable)), several, config.nodes, ranks)
        said.facts.extend(("steps", line) for line in lines)
        said.notes.extend(f"warning: {line}" for line in warnings)
    known = {one.name for one in found}
    found += [
        _dataset(config, entry(config.dataset, one, "train.eval_dataset"), said, "train.eval_dataset")
        for one in evaluated
        if one not in known
    ]
    return list({one.name: one for one in found}.values())


def _dataset(config: Config, dataset: Dataset, said: Notes, key: str = "dataset.name") -> Found:
    """One set of data, which ``key`` names, told; where it is not here what a dry run shows of it."""
    path, name = str(dataset.path), dataset.name or "custom"
    place = path if is_remote(path) else absolute(path)
    missing = Found(name, Path(place), "alpaca", {name: {"file_name": place, "formatting": "alpaca"}})
    stage, most = str(config.train.get("stage", "sft")), config.train.get("max_samples")
    found = said.unless_missing(lambda: said.seen.once(find_dataset, dataset, stage, most, key), missing, path)
    rows = "" if found.rows is None else f", {count(found.rows, 'row')}"
    use = "for evaluation: " if key == "train.eval_dataset" else ""
    said.facts.append(("data", f"{use}{os.path.normpath(found.file)}, {found.formatting}{rows}"))
    said.facts.extend(("", line) for line in found.first.split("\n") if line)
    said.notes.extend(found.notes)
    return found


def _most(found: Found, train: Mapping[str, Any], sets: int) -> int | None:
    """Of several sets max_samples is each one's; of one, the line of the steps says it."""
    if found.usable is None or sets == 1:
        return found.usable
    return min(found.usable, int(train.get("max_samples") or found.usable))


def trained_on(config: Config, first: Found) -> str:
    names = names_of(config.dataset.name)
    if not names and config.train.get("do_train") is False and config.train.get("eval_dataset"):
        return ""
    return ",".join(names) or first.name


def media_dir(config: Config, data: Sequence[Found]) -> str | None:
    """LLaMA-Factory's own default is the folder of dataset_info.json, which here is the run's."""
    if config.dataset.media_dir is not None:
        return absolute(config.dataset.media_dir)
    path = Path(absolute(str(config.dataset.path)))
    return str(path if path.is_dir() else path.parent) if any(found.media for found in data) else None
