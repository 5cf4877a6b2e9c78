"""The right word for a wrong one: nearest keys and choices, and Hydra's messages in ours."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

from pkuslurm.config.checks import SHORT
from pkuslurm.config.llamafactory import names as llamafactory_keys
from pkuslurm.config.parse import hint_of
from pkuslurm.paths import CONF

GROUPS = ("cluster", "model", "dataset", "train", "infer", "container", "pipeline", "experiment")
# What people call our keys (and LLaMA-Factory's).
ALIASES = {
    "node": "nodes",
    "nnodes": "nodes",
    "num_nodes": "nodes",
    **{short: f"train.{key}" for short, key in SHORT.items()},
    "train_batch_size": "train.per_device_train_batch_size",
    "steps": "train.max_steps",
    "template": "model.template",
    "model_path": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "data": "dataset.path",
    "data_path": "dataset.path",
    "dataset_path": "dataset.path",
    "dataset_dir": "dataset.path",
    "output_dir": "run_root",
    "name_or_path": "model.path",
    "image": "container.image",
    "gpus": "cluster.nproc_per_node",
    "npus": "cluster.nproc_per_node",
    "nproc": "cluster.nproc_per_node",
    "ntasks_per_node": "cluster.nproc_per_node",
    "prompt": "infer.prompts",
    "question": "infer.prompts",
    "adapter": "infer.adapter",
    "port": "serve.port",
    "dryrun": "dry_run",
    "cluster.nodes": "nodes",
}


@cache
def known_keys() -> tuple[str, ...]:
    """Every key that can be typed, LLaMA-Factory's included."""
    config: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))
    keys: list[str] = []
    nodes = [("", config)]
    while nodes:
        prefix, node = nodes.pop(0)
        for key, value in node.items():
            if isinstance(value, dict) and value and f"{prefix}{key}" != "merge":
                nodes.append((f"{prefix}{key}.", value))
            elif key != "defaults":
                keys.append(f"{prefix}{key}")
    opened = [
        f"{node}.{key}"
        for node, name in (("train", "train"), ("merge", "export"))
        for key in sorted(llamafactory_keys(name))
        if node == "merge" or not key.startswith("export_")  # a training takes them and does nothing with them
    ]
    return (*keys, *opened)


def guesses(key: str) -> list[str]:
    """At most two keys that ``key`` was probably meant to be."""
    prefix, _, last = key.rpartition(".")
    alias = ALIASES.get(key) or (
        ALIASES.get(last) if prefix in ("train", "merge", "cluster", "infer", "model") else None
    )
    if alias:
        return [alias]
    known = known_keys()
    # the right key below a misspelt node, or with none: trian.learning_rate, partition
    same = [name for name in known if name.rpartition(".")[2].lower() == last.lower()]
    if f"train.{last}" in same and not prefix:
        return [f"train.{last}"]
    if same:
        return difflib.get_close_matches(key, same, 1, 0.0) if prefix else same[:2]
    if prefix and hint_of(prefix) is not None:
        tails = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == prefix}
        return [tails[name] for name in difflib.get_close_matches(last, list(tails), 2, 0.7)]
    tops = [name for name in known if bool(prefix) == ("." in name)] + ([] if prefix else list(GROUPS))
    near = difflib.get_close_matches(key, tops, 2, 0.75)
    return near or difflib.get_close_matches(key, known, 2, 0.8)


def nearest_key(key: str, value: str | None = None) -> str:
    """``; did you mean …?``, or where all keys are shown."""
    found = guesses(key)
    if not found:
        return "; --cfg job shows all keys"
    return f"; did you mean {' or '.join(found)}{'' if value is None else '=' + value}?"


def nearest(word: str, known: Sequence[str]) -> str:
    """``; did you mean …?`` for the choice of a group."""
    lower = {name.lower(): name for name in known}
    if word.lower() in lower:
        return f"; did you mean {lower[word.lower()]}?"
    near = difflib.get_close_matches(word.lower(), list(lower), 2, 0.65)
    if not near and len(word) > 2:
        near = [name for name in lower if name.startswith(word.lower())][:2]
    return f"; did you mean {' or '.join(lower[name] for name in near)}?" if near else ""


def chain(error: BaseException) -> list[BaseException]:
    """An exception and its causes: Hydra wraps, and the words may stand in any of them."""
    links = [error]
    while (cause := links[-1].__cause__ or links[-1].__context__) is not None and cause not in links:
        links.append(cause)
    return links


def reword(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's and OmegaConf's mistakes, in one line of ours."""
    text = "\n".join(str(link) for link in chain(error))
    key = found.group(1) if (found := re.search(r"full_key: (\S+)", text)) else ""
    if found := re.search(r"Environment variable '([^']+)' not found", text):
        name = found.group(1)
        where = f"{key}=${{oc.env:{name}}}: " if key else ""
        return f"{where}the variable {name} is not set; export {name}, or write ${{oc.env:{name},default}}"
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"{found.group(1)}: no such key{nearest_key(found.group(1))}"
    if found := re.search(r"Could not delete from config. '([^']+)'", text):
        return f"~{found.group(1)}: nothing to take away, it is not set"
    if found := re.search(r"Could not (?:find|load) '([^']+)'", text):
        within = re.search(r"In '([^']+)'", text)
        return f"{found.group(1)}: there is no such preset" + (f" ({within.group(1)} asks for it)" if within else "")
    if found := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)'", text):
        typed, _, value = found.group(1).partition("=")
        return (
            f"{typed}={value}: several values make a sweep, which needs -m; write [a,b] for a list, or quote the text"
        )
    if found := re.search(r"Interpolation key '([^']+)' not found", text):
        name = found.group(1)
        return f"{key}: ${{{name}}} names no key of ours; a variable of the environment is written ${{oc.env:{name}}}"
    if any(isinstance(link, GrammarParseError) for link in chain(error)):
        return f"{key}: ${{ begins a reference such as ${{oc.env:NAME}}, this one cannot be read; for text write \\${{"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in lines if not line.startswith("Error merging override")), "")
    culprit = f"{key}: " if key and key not in said else ""
    return f"{culprit}{said}" if said else f"{' '.join(overrides)}: this could not be composed"
