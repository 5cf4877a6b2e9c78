"""What a run reads from the machine, found before anything is written: a model, data, prompts, an interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A question, and what the tuned answer must match (None: no expectation, no verdict)."""

    prompt: str
    expect: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class Inputs:
    """Resolved, absolute. ``dataset_info`` is LLaMA-Factory's description of the one dataset: {name: entry}."""

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
