"""What a run needs from this machine, found or refused before anything is written. Reads; starts and writes nothing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pkuslurm.config.llamafactory import check_keys
from pkuslurm.config.llamafactory import check_template as known_template
from pkuslurm.config.pairs import check_pairs
from pkuslurm.config.schema import Config
from pkuslurm.config.unrunnable import cannot_run
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import IS_CHECKOUT, absolute
from pkuslurm.plan.inputs import Inputs, Prompt, Source
from pkuslurm.plan.resources import cluster_for
from pkuslurm.preflight.containers import check_image, check_places, check_runtime
from pkuslurm.preflight.data import find_data, media_dir, trained_on
from pkuslurm.preflight.datasets import names_of
from pkuslurm.preflight.devices import check_devices_here
from pkuslurm.preflight.estimate import estimate, saving
from pkuslurm.preflight.llamafactory import check_deepspeed, look
from pkuslurm.preflight.modelfiles import read_object
from pkuslurm.preflight.models import check_model, find_model, no_model
from pkuslurm.preflight.nearest import existing
from pkuslurm.preflight.notes import Notes
from pkuslurm.preflight.paths import adapters, empty_folder, train_paths
from pkuslurm.preflight.prompts import prompts_of
from pkuslurm.preflight.seen import Seen
from pkuslurm.preflight.slurm import check_configured, check_scheduler, site_notes
from pkuslurm.preflight.templates import check_template, choose_template
from pkuslurm.render.containers import PYTHON
from pkuslurm.render.render import TINY_MODEL

# Forms of weights that hold no number for each parameter; fp8 and mxfp4 LLaMA-Factory unpacks.
PACKED = ("awq", "gptq", "aqlm", "bitsandbytes", "hqq", "eetq")
# What a run writes beside the weights: tokenized data, logs, answers, the report.
SMALL_BYTES = 200_000_000


class Template(NamedTuple):
    """LLaMA-Factory's name, and how it was told; "": it was given."""

    name: str
    why: str


def resolve(config: Config, environ: Mapping[str, str], lenient: bool, seen: Seen | None = None) -> Inputs:
    """The run's inputs, absolute. ``lenient`` (a dry run): what is not here becomes a note instead of a refusal.

    ``seen``: the same for all points of a sweep.
    """
    if lenient:
        return _resolve(config, environ, lenient, seen or Seen())
    check_scheduler(config.cluster.executor)
    try:
        return _resolve(config, environ, lenient, seen or Seen())
    except PkuslurmError:
        check_configured(config.cluster.executor)  # nobody shall mend the rest for a cluster that is not there
        raise


def _resolve(config: Config, environ: Mapping[str, str], lenient: bool, seen: Seen) -> Inputs:
    environ = {**environ, "PKUSLURM_CACHE": config.cache_root}  # which a preset may have set
    said = Notes(lenient, [*config.notes, *site_notes(config)], [], seen)
    if lenient and (why := cannot_run(config)) is not None:
        said.notes.append(f"warning: this is shown and cannot be launched: {why}")
    said.unless_missing(lambda: check_image(config), None, config.container.image)
    if note := said.unless_missing(lambda: check_runtime(config, environ), None, None):
        said.notes.append(note)
    _check_settings(config, said)
    said.unless_missing(lambda: check_devices_here(config, environ), None, None)
    if lenient:
        empty_folder("merge.export_dir", config.merge.get("export_dir"))
    model = said.unless_missing(lambda: _model(config, environ, said.seen), str(config.model.path), config.model.path)
    _check_mergeable(config, Path(model))
    template = _template(config, model, said)
    needed = _model_facts(config, model, template, said)
    nothing: tuple[Prompt, ...] = ()
    prompts = said.unless_missing(lambda: prompts_of(config), nothing, _file(config.infer.prompts))
    data = find_data(config, said)
    start = _adapter(config, said)
    nowhere: dict[str, str] = {}
    paths = said.unless_missing(lambda: train_paths(config.train, environ), nowhere, None)
    adapter = said.unless_missing(
        lambda: _folder("infer.adapter", config.infer.adapter), config.infer.adapter, config.infer.adapter
    )
    base = said.unless_missing(
        lambda: _known_model(config.infer.base, environ, said.seen), config.infer.base, config.infer.base
    )
    first, more = data[0], data[1:]
    inputs = Inputs(
        model_path=model,
        template=template.name,
        dataset_name=trained_on(config, first),
        dataset_info={name: about for found in data for name, about in found.info.items()},
        dataset_file=str(first.file),
        formatting=first.formatting,
        prompts=prompts,
        adapter=adapter,
        base=base,
        python=interpreter(config),
        notes=tuple(said.notes),
        facts=tuple(said.facts),
        convert=first.convert,
        disk_bytes=needed,
        more=tuple(Source(found.name, str(found.file), found.formatting, found.convert) for found in more),
        media_dir=media_dir(config, data),
        start=start,
        paths=paths,
    )
    check_places(config, inputs)
    return inputs


def _check_settings(config: Config, said: Notes) -> None:
    """Raise PkuslurmError for what the LLaMA-Factory that will run does not take, or not together."""
    context = look(config)
    if "train" in config.pipeline.jobs:
        check_keys("train", config.train, context.keys)
        sets = max(len(names_of(config.dataset.name)), 1), len(names_of(config.train.get("eval_dataset")))
        over = {} if config.model.adapter is None else {"adapter_name_or_path": config.model.adapter}
        check_pairs(config.train | over, replace(context, datasets=tuple(filter(None, sets))))
        deepspeed = config.train.get("deepspeed")
        said.unless_missing(lambda: check_deepspeed(deepspeed), None, str(deepspeed))
    check_keys("merge", config.merge, context.keys)
    if config.model.template != "auto":
        known_template(config.model.template, context.keys)


def _adapter(config: Config, said: Notes) -> str | None:
    """From which adapter a training starts, or what a run that only merges merges, which is said."""
    given = config.model.adapter
    start = said.unless_missing(lambda: adapters("model.adapter", given), given, given)
    if config.pipeline.jobs == ["merge"]:
        if start is not None and "," in start:
            raise PkuslurmError(f"model.adapter={given}: one at a time; merge the first, then the next into that")
        what = f"{start} into the model" if start else "no adapter: the model is copied"
        said.facts.append(("merge", f"{what}, in {config.merge.get('export_dir') or 'the run'}"))
    return start


def _file(prompts: list[str] | str) -> str | None:
    return prompts if isinstance(prompts, str) else None


def _template(config: Config, model: str, said: Notes) -> Template:
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


def _model_facts(config: Config, model: str, template: Template, said: Notes) -> int:
    """Say what the model is and what it needs; the bytes that the run will write, 0 where it is not known."""
    told = f" ({template.why})" if template.why else ""
    said.facts.append(("model", f"{config.model.make or model}, template {template.name}{told}"))
    cluster = cluster_for(config, "train")
    ranks, merges = cluster.nproc_per_node or 1, "merge" in config.pipeline.jobs
    found = estimate(Path(model), config.train, config.nodes, ranks, cluster.accelerator, merges)
    if "train" not in config.pipeline.jobs:
        return 0
    if found is None:  # a model that is yet to be made, or fetched
        said.facts.append(("", saving(config.train)))
        return 0
    said.facts.extend(("", line) for line in found.lines)
    return found.disk_run


def check_machine(config: Config, inputs: Inputs) -> None:
    """What would fail later on this machine: LLaMA-Factory not installed, no room, a folder that cannot be written."""
    empty_folder("merge.export_dir", config.merge.get("export_dir"))
    inside = config.container.runtime != "none"  # there nothing can be looked at from here
    if not inside and config.cluster.python is None and importlib.util.find_spec("llamafactory") is None:
        setup = "run `make setup` and use .venv/bin/python, or " if IS_CHECKOUT else ""
        raise PkuslurmError(
            f"cluster.python: {sys.executable} has no LLaMA-Factory; {setup}name one that has it: cluster.python=PATH"
        )
    if not inside and config.cluster.python is not None and shutil.which(config.cluster.python) is None:
        raise PkuslurmError(f"cluster.python={config.cluster.python}: there is no such program")
    for key, folder in (("run_root", config.run_root), ("cache_root", config.cache_root)):
        if "," in folder:
            raise PkuslurmError(f"{key}={folder}: LLaMA-Factory splits paths at commas; give a folder without one")
    need = SMALL_BYTES + inputs.disk_bytes
    for key, folder in (("run_root", config.run_root), ("cache_root", config.cache_root)):
        there = existing(Path(folder).expanduser().absolute())
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


def _check_mergeable(config: Config, model: Path) -> None:
    """Raise PkuslurmError where hours of training would end in a merge that LLaMA-Factory refuses."""
    adapter = config.train.get("finetuning_type", "lora") in ("lora", "oft") or "train" not in config.pipeline.jobs
    method = (read_object(model / "config.json").get("quantization_config") or {}).get("quant_method")
    if "merge" in config.pipeline.jobs and adapter and method in PACKED:
        raise PkuslurmError(
            f"model.path={config.model.path}: its weights are quantized ({method}), nothing can be merged into them; "
            "write pipeline=train, or tune the original model with train.quantization_bit=4"
        )


def _known_model(name: str | None, environ: Mapping[str, str], seen: Seen, key: str = "infer.base") -> str | None:
    if name is None:
        return None
    found = find_model(name, environ)
    if found is None:
        raise PkuslurmError(f"{key}={name}: {no_model(name, environ)}")
    seen.once(check_model, found)
    return str(found)


def _folder(key: str, path: str | None) -> str | None:
    if path is None:
        return None
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise PkuslurmError(f"{key}={path}: there is no such folder")
    return str(folder)
