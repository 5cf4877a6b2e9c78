"""What a run needs from this machine, found or refused before anything is written. Reads; starts and writes nothing."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from pkuslurm.config.llamafactory import check_keys
from pkuslurm.config.llamafactory import check_template as known_template
from pkuslurm.config.pairs import check_pairs
from pkuslurm.config.schema import Config
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import absolute
from pkuslurm.payload.steps import count, step_lines
from pkuslurm.plan.inputs import Inputs, Prompt
from pkuslurm.plan.resources import cluster_for
from pkuslurm.preflight.containers import check_image, check_places, check_runtime
from pkuslurm.preflight.datasets import Found, find_dataset
from pkuslurm.preflight.estimate import estimate, saving
from pkuslurm.preflight.llamafactory import check_deepspeed, look
from pkuslurm.preflight.models import check_model, find_model, where_looked
from pkuslurm.preflight.nearest import nearest_to
from pkuslurm.preflight.prompts import prompts_of
from pkuslurm.preflight.slurm import site_notes
from pkuslurm.preflight.templates import check_template, choose_template
from pkuslurm.render.containers import PYTHON
from pkuslurm.render.render import TINY_MODEL

T = TypeVar("T")
# What a run writes beside the weights: tokenized data, logs, answers, the report.
SMALL_BYTES = 200_000_000


class Template(NamedTuple):
    """LLaMA-Factory's name, and how it was told; "": it was given."""

    name: str
    why: str


class Seen:
    """What has been looked at already: the points of a sweep read the same model and the same data."""

    def __init__(self) -> None:
        self._answers: dict[str, object] = {}

    def once(self, look: Callable[..., T], *about: object) -> T:
        """``look(*about)``, or what it gave or refused before."""
        key = f"{look.__qualname__}{about!r}"
        if key not in self._answers:
            try:
                self._answers[key] = look(*about)
            except PkuslurmError as problem:
                self._answers[key] = problem
        answer = self._answers[key]
        if isinstance(answer, PkuslurmError):
            raise answer
        return answer  # type: ignore[return-value]  # what look returned under this key


@dataclass
class _Notes:
    """What is said before anything starts. ``lenient`` (a dry run): what is not on this machine becomes a note."""

    lenient: bool
    notes: list[str]
    facts: list[tuple[str, str]]
    seen: Seen

    def unless_missing(self, find: Callable[[], T], otherwise: T, path: str | None) -> T:
        """``find()``; what is here and is wrong is refused in a dry run, too."""
        try:
            return find()
        except PkuslurmError as problem:
            if not self.lenient or (path and Path(absolute(path)).exists()):
                raise
            self.notes.append(str(problem))
            return otherwise


def resolve(config: Config, environ: Mapping[str, str], lenient: bool, seen: Seen | None = None) -> Inputs:
    """The run's inputs, absolute. ``lenient`` (a dry run): what is not here becomes a note instead of a refusal.

    ``seen``: the same for all points of a sweep.
    """
    said = _Notes(lenient, [*config.notes, *site_notes(config)], [], seen or Seen())
    image = config.container.image
    said.unless_missing(lambda: check_image(config), None, image)
    if note := said.unless_missing(lambda: check_runtime(config, environ), None, None):
        said.notes.append(note)
    context = look(config)
    if "train" in config.pipeline.jobs:
        check_keys("train", config.train, context.keys)
        check_pairs(config.train, context)
        deepspeed = config.train.get("deepspeed")
        said.unless_missing(lambda: check_deepspeed(deepspeed), None, str(deepspeed))
    check_keys("merge", config.merge, context.keys)
    if config.model.template != "auto":
        known_template(config.model.template, context.keys)
    model = said.unless_missing(lambda: _model(config, environ, said.seen), str(config.model.path), config.model.path)
    template = _template(config, model, said)
    needed = _model_facts(config, model, template, said)
    nothing: tuple[Prompt, ...] = ()
    prompts = said.unless_missing(lambda: prompts_of(config), nothing, _file(config.infer.prompts))
    data = _dataset(config, said)
    adapter = said.unless_missing(
        lambda: _folder("infer.adapter", config.infer.adapter), config.infer.adapter, config.infer.adapter
    )
    base = said.unless_missing(
        lambda: _known_model(config.infer.base, environ, said.seen), config.infer.base, config.infer.base
    )
    inputs = Inputs(
        model_path=model,
        template=template.name,
        dataset_name=data.name,
        dataset_info=data.info,
        dataset_file=str(data.file),
        formatting=data.formatting,
        prompts=prompts,
        adapter=adapter,
        base=base,
        python=interpreter(config),
        notes=tuple(said.notes),
        facts=tuple(said.facts),
        convert=data.convert,
        disk_bytes=needed,
    )
    check_places(config, inputs)
    return inputs


def _file(prompts: list[str] | str) -> str | None:
    return prompts if isinstance(prompts, str) else None


def _template(config: Config, model: str, said: _Notes) -> Template:
    """LLaMA-Factory's template and how it was told; warnings where the model's tokens do not fit."""
    given = config.model.template
    chosen = Template(given, "")
    if given == "auto":
        found = said.unless_missing(
            lambda: said.seen.once(choose_template, Path(model), str(config.model.path)), None, model
        )
        chosen = Template(found.template, found.why) if found else Template("auto", "")
    if Path(model).is_dir() and not config.train.get("resize_vocab"):
        said.notes.extend(said.seen.once(check_template, Path(model), chosen.name))
    return chosen


def _model_facts(config: Config, model: str, template: Template, said: _Notes) -> int:
    """Say what the model is and what it needs; the bytes that the run will write, 0 where it is not known."""
    told = f" ({template.why})" if template.why else ""
    said.facts.append(("model", f"{config.model.make or model}, template {template.name}{told}"))
    cluster = cluster_for(config, "train")
    found = estimate(Path(model), config.train, config.nodes, cluster.nproc_per_node or 1, cluster.accelerator)
    if "train" not in config.pipeline.jobs:
        return 0
    if found is None:  # a model that is yet to be made, or fetched
        said.facts.append(("", saving(config.train)))
        return 0
    said.facts.extend(("", line) for line in found.lines)
    return found.disk_run


def _dataset(config: Config, said: _Notes) -> Found:
    """The data, with what was found out about it and the steps that come of it."""
    name, path = config.dataset.name or "custom", config.dataset.path
    if path is None or "train" not in config.pipeline.jobs:
        return Found(name, Path(), "alpaca", {})
    entry = {"file_name": absolute(path), "formatting": "alpaca"}
    missing = Found(name, Path(absolute(path)), "alpaca", {name: entry})
    train = config.train
    stage, most = str(train.get("stage", "sft")), train.get("max_samples")
    found = said.unless_missing(lambda: said.seen.once(find_dataset, config.dataset, stage, most), missing, path)
    rows = "" if found.rows is None else f", {count(found.rows, 'row')}"
    said.facts.append(("data", f"{os.path.normpath(found.file)}, {found.formatting}{rows}"))
    said.facts.extend(("", line) for line in found.first.split("\n") if line)
    said.notes.extend(found.notes)
    if found.usable is not None:
        ranks = cluster_for(config, "train").nproc_per_node or 1
        lines, warnings = step_lines(found.usable, train, config.nodes, ranks)
        said.facts.extend(("steps", line) for line in lines)
        said.notes.extend(f"warning: {line}" for line in warnings)
    return found


def check_machine(config: Config, inputs: Inputs) -> None:
    """What would fail later on this machine: LLaMA-Factory not installed, no room, a folder that cannot be written."""
    inside = config.container.runtime != "none"  # there nothing can be looked at from here
    if not inside and config.cluster.python is None and importlib.util.find_spec("llamafactory") is None:
        raise PkuslurmError(
            f"cluster.python: {sys.executable} has no LLaMA-Factory; run `make setup` and use .venv/bin/python, "
            "or name an interpreter that has it"
        )
    if not inside and config.cluster.python is not None and shutil.which(config.cluster.python) is None:
        raise PkuslurmError(f"cluster.python={config.cluster.python}: there is no such program")
    for key, folder in (("run_root", config.run_root), ("cache_root", config.cache_root)):
        if "," in folder:
            raise PkuslurmError(f"{key}={folder}: LLaMA-Factory splits paths at commas; give a folder without one")
    need = SMALL_BYTES + inputs.disk_bytes
    for key, folder in (("run_root", config.run_root), ("cache_root", config.cache_root)):
        there = _nearest_existing(Path(folder).expanduser().absolute())
        if not there.is_dir():
            raise PkuslurmError(f"{key}={folder}: {there} is no folder; give a folder of your own")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PkuslurmError(f"{key}={folder}: {there} cannot be written by you; give a folder of your own")
        free = shutil.disk_usage(there).free
        wanted = need if key == "run_root" else SMALL_BYTES
        if free < wanted:
            raise PkuslurmError(f"{key}={folder}: {free / 1e9:.1f} GB are free, {wanted / 1e9:.1f} GB are needed")


def interpreter(config: Config) -> str:
    """Absolute, since jobs start in the run's directory; not resolved: a link leads out of a virtual environment.

    In a container it is the image's, found there.
    """
    name = config.cluster.python
    if config.container.runtime != "none":
        return name or PYTHON
    if name is None:
        return sys.executable
    found = shutil.which(os.path.expanduser(name))
    return os.path.abspath(found) if found else name


def _model(config: Config, environ: Mapping[str, str], seen: Seen) -> str:
    if config.model.make is not None:
        made = Path(absolute(config.cache_root)) / "models" / TINY_MODEL
        if "prepare" not in config.pipeline.jobs and not made.is_dir():
            raise PkuslurmError(
                f"model.make={config.model.make}: pipeline={config.pipeline.name} makes no model; give model.path"
            )
        return str(made)
    found = _known_model(config.model.path, environ, seen, "model.path")
    assert found is not None
    return found


def _known_model(name: str | None, environ: Mapping[str, str], seen: Seen, key: str = "infer.base") -> str | None:
    if name is None:
        return None
    found = find_model(name, environ)
    if found is None:
        raise PkuslurmError(f"{key}={name}: {_no_model(name, environ)}")
    seen.once(check_model, found)
    return str(found)


def _no_model(name: str, environ: Mapping[str, str]) -> str:
    if Path(name).expanduser().is_file():
        return "this is a file; give the folder of a Hugging Face model"
    looked = where_looked(name, environ)
    if not looked:
        hint = nearest_to(Path(absolute(name))) if "/" in name else ""
        return f"no such folder or downloaded model{hint}; give a model's folder, or its id, such as Qwen/Qwen3-0.6B"
    places = ", ".join([*looked[:2], "…"][: len(looked)])  # there may be a dozen
    beside = Path(sys.executable).with_name("modelscope")
    program = shlex.quote(str(beside)) if beside.is_file() else "modelscope"
    return f"no such folder or downloaded model; looked in {places}; get it with: {program} download --model {name}"


def _folder(key: str, path: str | None) -> str | None:
    if path is None:
        return None
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise PkuslurmError(f"{key}={path}: there is no such folder")
    return str(folder)


def _nearest_existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
