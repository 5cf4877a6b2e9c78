"""LLaMA-Factory's keys as data: names, types and choices of each version, and what is wrong with given ones. Pure.

llamafactory_keys.json holds the versions that we know, as tests/tools/snapshot_keys.py reads them from their source.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pkuslurm.config.parse import show
from pkuslurm.errors import PkuslurmError

# YAML 1.1 writes this text unquoted, and LLaMA-Factory's reader (OmegaConf) then reads a number: 1e-4, 5E3, +1e-4.
_EXPONENT = re.compile(r"[-+]?(\d+[eE][-+]?\d+|\d+\.\d*[eE]\d+|\.\d+[eE]\d+)")
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list [a,b]",
    "dict": "keys and values {a: 1}",
    "null": "null",
}
# As people think of them; the others are named in the source's order.
_IN_THIS_ORDER = {"finetuning_type": ("lora", "full", "freeze", "oft")}
# Numbers of the right type with which nothing can be trained: (least, itself allowed, most).
_RANGES: dict[str, tuple[float, bool, float]] = {
    "learning_rate": (0, False, math.inf),
    "num_train_epochs": (0, False, math.inf),
    "per_device_train_batch_size": (0, False, math.inf),
    "per_device_eval_batch_size": (0, False, math.inf),
    "gradient_accumulation_steps": (0, False, math.inf),
    "cutoff_len": (0, False, math.inf),
    "max_samples": (0, False, math.inf),
    "preprocessing_num_workers": (0, False, math.inf),
    "lora_rank": (0, False, math.inf),
    "lora_alpha": (0, False, math.inf),
    "lora_dropout": (0, True, 1),
    "warmup_ratio": (0, True, 1),
    "warmup_steps": (0, True, math.inf),
    "weight_decay": (0, True, math.inf),
    "val_size": (0, True, math.inf),
    "max_steps": (-1, True, math.inf),
    "torch_empty_cache_steps": (0, False, math.inf),
    "export_size": (0, False, math.inf),
}


@dataclass(frozen=True)
class Key:
    """``types``: of int, float, bool, str, list, dict, null; none: anything. ``export``: `export` takes it, too."""

    types: tuple[str, ...]
    choices: tuple[str | int | bool, ...] = ()
    default: Any = None
    export: bool = False


@dataclass(frozen=True)
class Keys:
    """What one LLaMA-Factory, beside one transformers, takes."""

    llamafactory: str
    transformers: str
    keys: Mapping[str, Key]
    templates: frozenset[str] = field(default_factory=frozenset)

    @property
    def version(self) -> str:
        return f"LLaMA-Factory {self.llamafactory} (transformers {'.'.join(self.transformers.split('.')[:2])})"


def to_json(keys: Keys) -> dict[str, Any]:
    """For the snapshot; a key's default says nothing where it is null."""
    train = {}
    for name in sorted(keys.keys):
        key = keys.keys[name]
        entry: dict[str, Any] = {"types": list(key.types)}
        if key.choices:
            entry["choices"] = list(key.choices)
        if key.default is not None:
            entry["default"] = key.default
        train[name] = entry
    export = sorted(name for name, key in keys.keys.items() if key.export)
    return {
        "transformers": keys.transformers,
        "train": train,
        "export": export,
        "templates": sorted(keys.templates),
    }


def from_json(version: str, content: Mapping[str, Any]) -> Keys:
    export = set(content["export"])
    keys = {
        name: Key(tuple(item["types"]), tuple(item.get("choices", ())), item.get("default"), name in export)
        for name, item in content["train"].items()
    }
    return Keys(version, content["transformers"], keys, frozenset(content["templates"]))


@cache
def snapshots() -> tuple[Keys, ...]:
    """The versions that we know, oldest first."""
    text = Path(__file__).with_name("llamafactory_keys.json").read_text(encoding="utf-8")
    return tuple(from_json(version, content) for version, content in sorted(json.loads(text).items()))


def snapshot(llamafactory: str, transformers: str | None = None) -> Keys | None:
    """The snapshot of this version; where ``transformers`` is given, its release (4.57, 5.6) has to be the same."""
    for keys in snapshots():
        same = transformers is None or keys.transformers.split(".")[:2] == transformers.split(".")[:2]
        if keys.llamafactory == llamafactory and same:
            return keys
    return None


@cache
def names(command: Literal["train", "export", "templates"]) -> frozenset[str]:
    """All names of the versions that we know."""
    if command == "templates":
        return frozenset(name for version in snapshots() for name in version.templates)
    return frozenset(
        name for version in snapshots() for name, key in version.keys.items() if command == "train" or key.export
    )


def takes_numbers(name: str) -> bool:
    """Whether this key of train is a number (or null) and nothing else, in some version."""
    found = [version.keys[name].types for version in snapshots() if name in version.keys]
    return any(types and set(types) <= {"int", "float", "null"} for types in found)


def check_keys(node: Literal["train", "merge"], values: Mapping[str, Any], keys: Keys | None) -> None:
    """Raise PkuslurmError for the first key that LLaMA-Factory does not have, or whose value it cannot take.

    ``keys``: of the LLaMA-Factory that will run; None where it is not known, then what any known version takes.
    """
    versions = (keys,) if keys is not None else snapshots()
    for name, value in values.items():
        taking = [version.keys[name] for version in versions if _takes(version, node, name)]
        if not taking:
            raise PkuslurmError(f"{node}.{name}: {_unknown(node, name, versions)}")
        # the last version's word, where no version takes the value
        problems = [problem for key in taking if (problem := _problem(name, value, key))]
        if len(problems) == len(taking):
            raise PkuslurmError(f"{node}.{name}={show(value)}: {problems[-1]}")


def check_template(template: str, keys: Keys | None) -> None:
    """Raise PkuslurmError unless LLaMA-Factory knows this chat template."""
    versions = (keys,) if keys is not None else snapshots()
    known = {name for version in versions for name in version.templates}
    if template in known:
        return
    elsewhere = [version.version for version in snapshots() if template in version.templates]
    if elsewhere:
        raise PkuslurmError(f"model.template={template}: only {' and '.join(elsewhere)} has it{_this(versions)}")
    near = difflib.get_close_matches(template, sorted(known), 2, 0.65) or ["qwen", "default"]
    raise PkuslurmError(
        f"model.template={show(template)}: LLaMA-Factory has no such template; did you mean {' or '.join(near)}?"
    )


def _takes(version: Keys, node: str, name: str) -> bool:
    key = version.keys.get(name)
    return key is not None and (node == "train" or key.export)


def _unknown(node: str, name: str, versions: Sequence[Keys]) -> str:
    elsewhere = [version.version for version in snapshots() if _takes(version, node, name)]
    if elsewhere:
        return f"only {' and '.join(elsewhere)} has it{_this(versions)}"
    if node == "merge" and any(name in version.keys for version in versions):
        return f"LLaMA-Factory has no such key in its export; write train.{name}"
    known = sorted({key for version in versions for key in version.keys if _takes(version, node, key)})
    near = difflib.get_close_matches(str(name), known, 2, 0.72)
    hint = f"; did you mean {' or '.join(f'{node}.{key}' for key in near)}?" if near else ""
    return f"LLaMA-Factory has no such key{hint}"


def _this(versions: Sequence[Keys]) -> str:
    return f"; this is {versions[0].llamafactory} (transformers {versions[0].transformers})"


def _problem(name: str, value: object, key: Key) -> str | None:
    """What is wrong with the value; None if LLaMA-Factory takes it. It coerces nothing: 4 as text is no number."""
    if key.choices:
        if value is None and "null" in key.types:
            return None
        if any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in key.choices):
            return None
        return _not_a_choice(name, value, key)
    if key.types and not any(_is(kind, value) for kind in key.types):
        words = " or ".join(dict.fromkeys(_WORDS[kind] for kind in _told(key.types)))
        return f"it must be {words}{_how_text(name, value, key)}"
    if isinstance(value, float) and not math.isfinite(value) and name not in _RANGES:
        return "it must be a finite number"
    if name == "max_steps" and value == 0:
        return "it must be 1 or more, or leave it out"
    if name in _RANGES and isinstance(value, int | float | str):
        return _out_of_range(float(value), *_RANGES[name])
    return None


def _is(kind: str, value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {
        "int": number and isinstance(value, int),
        "float": number or (isinstance(value, str) and _EXPONENT.fullmatch(value) is not None),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "list": isinstance(value, list | tuple),
        "dict": isinstance(value, Mapping),
        "null": value is None,
    }[kind]


def _told(types: Sequence[str]) -> list[str]:
    """A whole number is a number, too; null is told last."""
    return [kind for kind in types if kind != "null" and not (kind == "int" and "float" in types)] + [
        kind for kind in types if kind == "null"
    ]


def _how_text(name: str, value: object, key: Key) -> str:
    if "str" not in key.types:
        return ""
    if isinstance(value, list):
        return f", with commas: '{','.join(map(str, value))}'"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"; numbers become text in two kinds of quotes: \"'{value}'\""
    return ""


def _not_a_choice(name: str, value: object, key: Key) -> str:
    choices = [str(choice) for choice in _IN_THIS_ORDER.get(name, key.choices)]
    near = difflib.get_close_matches(str(value), choices, 1, 0.6)
    hint = f"; did you mean {near[0]}?" if near and len(choices) > 6 else ""
    if value is False and "no" in choices:
        hint = "; YAML reads an unquoted no as false: write 'no'"
    if len(choices) > 15 and near:
        return f"it is none of LLaMA-Factory's {len(choices)} choices{hint}"
    words = " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
    return f"it must be {words}{hint}"


def _out_of_range(value: float, least: float, itself: bool, most: float) -> str | None:
    low = value >= least if itself else value > least
    if low and value <= most and math.isfinite(value):
        return None
    if most < math.inf:
        return f"it must be from {least:g} to {most:g}"
    return f"it must be {least:g} or more" if itself else f"it must be more than {least:g}"
