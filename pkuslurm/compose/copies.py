"""Points that differ in plain values only: composed once, then copied with other values.

What Hydra, OmegaConf and the checks would do again for each is the same but for the keys that vary. The longer way,
``compose_parts``, is taken where that is not certain: groups, what an interpolation of the configuration refers to,
what is no plain value, what is taken away or replaced with a whole node.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pkuslurm.compose import composition, typed
from pkuslurm.compose.expansion import Axis
from pkuslurm.compose.once import Composed, Parts, compose_parts
from pkuslurm.compose.presets import Defaults
from pkuslurm.compose.quoting import parsed
from pkuslurm.compose.secrets import check_secrets
from pkuslurm.compose.settings import settings_of
from pkuslurm.compose.words import GROUPS
from pkuslurm.config.checks import check
from pkuslurm.config.parse import parse_config
from pkuslurm.errors import PkuslurmError

Keys = tuple[str, ...]
# They decide which model, data and training are chosen where that was left to us.
DECISIVE: Keys = ("train.finetuning_type", "dataset.path", "model.path", "cluster.executor")
# They decide which jobs a YAML's run has, or which of its keys count.
DECISIVE += ("train.stage", "train.do_train", "train.create_new_adapter", "model.adapter", "model.make")
# Resolvers whose arguments name no key; one that is written as ${…} in them is seen as such.
WITHOUT_KEYS = ("oc.env", "oc.decode", "pkuslurm.conf", "pkuslurm.rate")


@dataclass(frozen=True)
class _Word:
    """One word of a point: as Hydra gets it, its value where it is a plain one, and what is said about it."""

    override: str
    plain: bool
    value: Any
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Base:
    """A composed point to be copied; ``text`` is its YAML with a key in place of each entry that varies."""

    parts: Parts
    text: tuple[str | Keys, ...]


@dataclass
class Composer:
    """Composes the points of one sweep, in any order."""

    axes: Sequence[Axis]
    roots: Sequence[Path]
    defaults: Defaults
    _words: dict[str, _Word] = field(default_factory=dict)
    _entries: dict[str, str] = field(default_factory=dict)
    _slow: dict[Keys, Collection[str]] = field(default_factory=dict)  # what a first point showed that cannot be copied
    _bases: dict[Keys, _Base] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # a group is chosen before any key is set
        names = [axis.name.lstrip("~") for axis in self.axes if axis.name not in GROUPS]
        self._shipped = composition.shipped()
        self._candidates = [
            axis.varies
            and axis.name not in (*GROUPS, *DECISIVE)
            and sum(_related(axis.name, other) for other in names) == 1
            for axis in self.axes
        ]

    def compose(self, items: Sequence[str]) -> Composed:
        """The point of ``items``, one for each axis: what ``compose`` makes of them alone."""
        words = [self._word(item) for item in items]
        fast = {
            axis.name: word
            for axis, word, candidate in zip(self.axes, words, self._candidates, strict=True)
            if candidate and word.plain
        }
        while (kind := self._kind(words, fast)) in self._slow:
            fast = {name: word for name, word in fast.items() if name not in self._slow[kind]}
        if kind not in self._bases:
            return self._first(items, words, fast)
        try:
            return self._copy(self._bases[kind], items, words, fast)
        except PkuslurmError:
            return self._parts(items).composed  # which says it as it is said without -m

    def _parts(self, items: Sequence[str]) -> Parts:
        return compose_parts(items, self.roots, self.defaults, self._shipped)

    def _word(self, item: str) -> _Word:
        if item not in self._words:
            _, override = typed.override_of(item, self.roots)
            read = None if item.startswith("~") else parsed(override.partition("=")[2])
            value = None if read is None else read.value()
            plain = read is not None and _is_plain(value)
            self._words[item] = _Word(override, plain, value, typed.notes([item]))
        return self._words[item]

    def _kind(self, words: Sequence[_Word], fast: Mapping[str, _Word]) -> Keys:
        """Points of the same kind are copies of each other."""
        return tuple(
            axis.name if fast.get(axis.name) is word else word.override
            for axis, word in zip(self.axes, words, strict=True)
        )

    def _first(self, items: Sequence[str], words: Sequence[_Word], fast: Mapping[str, _Word]) -> Composed:
        """Compose the first point of its kind, for the others to be copied from."""
        parts = self._parts(items)
        referred = _referred(parts.unresolved)
        sure = {
            name: word
            for name, word in fast.items()
            if referred is not None
            and not any(_related(name, key) for key in referred)
            and all(_has(values, _path(name), word.value) for values in (parts.unresolved, parts.values))
        }
        text = tuple(_pieces(parts.unresolved, [_path(name) for name in sure]))
        if self._written(text, sure) != parts.composed.yaml:
            sure, text = {}, (parts.composed.yaml,)
        if len(sure) < len(fast):
            self._slow[self._kind(words, fast)] = set(fast) - set(sure)
        self._bases[self._kind(words, sure)] = _Base(parts, text)
        return parts.composed

    def _copy(self, base: _Base, items: Sequence[str], words: Sequence[_Word], fast: Mapping[str, _Word]) -> Composed:
        parts = base.parts
        values = dict(parts.values)
        varying: dict[str, Any] = {"dry_run": parts.unresolved.get("dry_run")}
        for name, word in fast.items():
            values = _with(values, _path(name), word.value)
            varying = _with(varying, _path(name), word.value)
        check_secrets(varying)
        if all(name.startswith(("train.", "merge.")) for name in fast):
            config = replace(parts.composed.config, train=values["train"], merge=values["merge"])
        else:
            config = parse_config(values)
        check(config, parts.composed.choices)
        return Composed(
            config,
            self._written(base.text, fast),
            tuple(items),
            parts.composed.choices,
            settings_of(values, self._shipped, parts.origins, parts.composed.blame.given),
            (*(note for word in words for note in word.notes), *parts.standing),
            parts.composed.blame,
        )

    def _written(self, text: Sequence[str | Keys], fast: Mapping[str, _Word]) -> str:
        return "".join(piece if isinstance(piece, str) else self._entry(piece, fast[".".join(piece)]) for piece in text)

    def _entry(self, path: Keys, word: _Word) -> str:
        if word.override not in self._entries:
            self._entries[word.override] = _below(path[:-1], {path[-1]: word.value})
        return self._entries[word.override]


def _path(name: str) -> Keys:
    return tuple(name.split("."))


def _related(one: str, other: str) -> bool:
    """The same key, or one within the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _is_plain(value: object) -> bool:
    """What OmegaConf keeps as it is: no reference, no node to be merged, nothing that it takes for missing."""
    if isinstance(value, list):
        return all(_is_plain(item) and not isinstance(item, list) for item in value)
    if isinstance(value, str):
        return "${" not in value and value != "???"
    return value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


def _referred(values: object) -> set[str] | None:
    """The keys that interpolations refer to; None where that cannot be told."""
    keys: set[str] = set()
    for text in _texts(values):
        for reference in re.findall(r"\$\{([^${}]*)", text):
            resolver, colon, arguments = reference.partition(":")
            if colon and resolver.strip() in WITHOUT_KEYS:
                continue
            if colon and resolver.strip() == "oc.select":  # a key that need not be there, and what then holds
                reference = arguments.partition(",")[0]
            if not re.fullmatch(r"\w[\w.-]*", reference.strip()):
                return None
            keys.add(reference.strip())
    return keys


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _has(values: Any, path: Keys, value: object) -> bool:
    for key in path:
        if not isinstance(values, Mapping) or key not in values:
            return False
        values = values[key]
    return type(values) is type(value) and repr(values) == repr(value)


def _with(values: Mapping[str, Any], path: Keys, value: object) -> dict[str, Any]:
    """``values`` with one of them set; what is not on the way to it is shared."""
    first, *rest = path
    return {**values, first: _with(values.get(first, {}), tuple(rest), value) if rest else value}


def _pieces(values: Mapping[Any, Any], paths: Collection[Keys], above: Keys = ()) -> Iterator[str | Keys]:
    """The YAML of ``values``, with the path itself in place of each entry of ``paths``."""
    quiet: dict[Any, Any] = {}
    for key, value in values.items():
        path = (*above, key)
        if not any(other[: len(path)] == path for other in paths):
            quiet[key] = value
            continue
        if quiet:
            yield _below(above, quiet)
        quiet = {}
        if path in paths:
            yield path
        else:
            yield _below(above, {key: None}).removesuffix(" null\n") + "\n"
            yield from _pieces(value, paths, path)
    if quiet:
        yield _below(above, quiet)


def _below(above: Keys, values: Mapping[Any, Any]) -> str:
    """The YAML of ``values`` where they stand."""
    nested: Any = values
    for key in reversed(above):
        nested = {key: nested}
    return OmegaConf.to_yaml(nested).split("\n", len(above))[len(above)]
