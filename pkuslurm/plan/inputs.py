"""What a run reads from the machine, found before anything is written: a model, data, prompts, an interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A question, and what the tuned answer must match (None: no expectation, no verdict)."""

    prompt: str
    expect: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class Source:
    """A further file of data, to train or to evaluate on; ``convert``: it is not UTF-8, prepare writes a copy."""

    name: str
    file: str
    formatting: str
    convert: bool


@dataclass(frozen=True)
class Inputs:
    """Resolved, absolute. ``dataset_info`` is LLaMA-Factory's description of the data, {name: entry}; ``dataset_name``
    names those that are trained on, with commas; the first one's file is ``dataset_file``, the others' are ``more``.
    """

    model_path: str
    template: str
    dataset_name: str
    dataset_info: dict[str, Any]
    dataset_file: str
    formatting: str
    prompts: tuple[Prompt, ...]
    adapter: str | None
    base: str | None
    python: str
    notes: tuple[str, ...] = ()  # what is not here (a dry run says it and goes on), what was guessed
    facts: tuple[tuple[str, str], ...] = ()  # what is shown before anything starts: (model, …), (data, …), (steps, …)
    convert: bool = False  # the data is not UTF-8: prepare writes a copy that is
    disk_bytes: int = 0  # what the run will write, about
    more: tuple[Source, ...] = ()
    media_dir: str | None = None  # where relative names of pictures begin; None: there are none
    start: str | None = None  # adapters that training goes on from, with commas; of pipeline=merge: what is merged
    paths: Mapping[str, str] = field(default_factory=dict)  # train's keys that name files and models, as found here
