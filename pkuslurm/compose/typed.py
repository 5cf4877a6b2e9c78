"""The words of a command line: settings in Hydra's grammar, and the right word for the usual slips."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import get_args

from pkuslurm.compose import presets
from pkuslurm.compose.quoting import number_of, parsed, quoted_where_needed
from pkuslurm.compose.words import GROUPS, guesses, nearest_key
from pkuslurm.config.llamafactory import takes_numbers
from pkuslurm.config.parse import choices_of, hint_of, is_node, is_number, is_word, show
from pkuslurm.errors import PkuslurmError

# Nodes that take any key (LLaMA-Factory's, sbatch's, variables): Hydra wants `++` there; a user need not know.
OPEN = ("train", "merge", "cluster.env", "cluster.extra", "cluster.jobs", "dataset.columns", "dataset.tags")
MAPPINGS = ("cluster.env", "cluster.extra", "dataset.columns", "dataset.tags")
KEY = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*", re.ASCII)
FULL_WIDTH = str.maketrans("＝：", "==")
BRACKETS = str.maketrans("［］，", "[],")
# what a page or an input method makes of the minus of the keyboard
MINUS = str.maketrans("−–—", "---")
LARGE_RATE = 0.1
# A path or a hub id where a choice is wanted, and where it belongs.
PATHS = {
    "model": "model.path",
    "dataset": "dataset.path",
    "container": "container.image",
    "train": "from_yaml",
    "infer": "infer.prompts",
}


def as_typed(items: Sequence[str], roots: Sequence[Path], choosing: bool = True) -> list[str]:
    """``items`` in Hydra's grammar, each key and group once, as it was said last.

    Not ``choosing``: groups have been chosen before, values alone can be typed.
    """
    separate_words(items)
    typed: dict[str, str] = {}
    for number, item in enumerate(items):
        name, override = override_of(item, roots)
        if not choosing and name in GROUPS:
            raise PkuslurmError(f"{item}: the groups of this run are chosen; set single keys, or launch a new run")
        if override.startswith("~"):
            name = f"~{number}"  # taken away, then perhaps set again: the order counts
        elif typed.pop(name, None) is not None and any(other.startswith("~" + name) for other in typed.values()):
            name = f"{name} {number}"
        typed[name] = override
    return list(typed.values())


def notes(items: Sequence[str]) -> tuple[str, ...]:
    """What should be said about settings that mean what they say, but perhaps not what was meant."""
    said = []
    for item in items:
        key, _, value = item.partition("=")
        if key in ("infer.prompts", "infer.expect") and value.startswith("[") and "," not in value and "，" in value:
            said.append(f"{key}: one text, since ， is part of it; a plain , between the texts makes several")
        if key.lstrip("+") == "train.learning_rate" and (number_of(value) or 0) > LARGE_RATE:
            meant = re.sub(r"[eE]\+?(?=\d)", "e-", value)
            said.append(f"{key}={value} is very large" + (f": {meant} meant?" if meant != value else ""))
    return tuple(said)


def is_open(key: str) -> bool:
    """Whether ``key`` is, or is below, a node that takes any key."""
    return any(key.startswith(node + ".") for node in OPEN) or key in OPEN[2:]


def separate_words(items: Sequence[str]) -> None:
    """Raise PkuslurmError for key = value, in two or three words of the shell, for braces that the shell has taken for
    its own, and for what is not UTF-8."""
    for at, item in enumerate(items):
        try:
            item.encode("utf-8")
        except UnicodeEncodeError:
            raise PkuslurmError(f"{ascii(item)[1:-1]}: this is not UTF-8; type it in a UTF-8 terminal") from None
        _unbraced(item, items)
        before, after = items[at - 1] if at else "", items[at + 1] if at + 1 < len(items) else ""
        if item.startswith("=") and before:
            value = item[1:] or after
            raise PkuslurmError(
                f"{before} {item}: write {_right(before.strip('= '), value)}, without spaces around the ="
            )
        if item.endswith("=") and after and "=" not in after and not after.startswith("-"):
            raise PkuslurmError(f"{item} {after}: write {_right(item[:-1], after)}, without spaces around the =")
        if item.startswith("-") and "=" not in item and after and "=" not in after and not after.startswith("-"):
            raise PkuslurmError(f"{item} {after}: settings are typed without dashes: {_right(item, after)}")
        opened = re.search(r"=(\[[^]]*$|.*/)", before)  # a list, or a path: a word such as model goes on with it
        if "=" in before and "=" not in item and item[:1] not in ("-", "~") and (opened or not _is_known(item)):
            rest = takewhile(lambda word: "=" not in word and not word.startswith("-"), items[at:])
            raise PkuslurmError(f"{item}: a value with spaces needs quotes: {_pasted(' '.join([before, *rest]))}")


def _unbraced(item: str, items: Sequence[str]) -> None:
    """bash makes dataset.columns={a:b,c:d} two words, dataset.columns=a:b and dataset.columns=c:d."""
    key, _, value = item.partition("=")
    if key in MAPPINGS and re.match(r"[\w.-]+:", value):
        said = (other.partition("=") for other in items)
        pairs = ", ".join(": ".join(one.split(":", 1)) for name, _, one in said if name == key and ":" in one)
        raise PkuslurmError(
            f"{show(item)}: keys and values stand in braces, quoted, since the shell takes braces apart: write "
            f"{shlex.quote(f'{key}={{{pairs}}}')}"
        )


def _is_known(key: str) -> bool:
    return key in GROUPS or hint_of(key) is not None


def _pasted(setting: str) -> str:
    """``setting`` as a shell takes it for one word."""
    return shlex.quote(setting) if re.search(r"\s", setting) else setting


def _right(key: str, value: str) -> str:
    """How ``key`` and ``value`` are typed, as far as we can guess."""
    name = key.lstrip("-").replace("-", "_")
    known = name if _is_known(name) else next(iter(guesses(name)), name)
    return f"{known}={value}"


def override_of(item: str, roots: Sequence[Path]) -> tuple[str, str]:
    """One word: the key or group that it sets, and the override as Hydra wants it."""
    if item.startswith("~"):
        return _taken_away(item)
    name, value = named(item)
    if name in GROUPS and not value.startswith("{"):
        return name, f"{name}={_choice(name, value, roots)}"
    if name in ("model.path", "dataset.path"):
        value = value.strip()
    _joined(name, value)
    _stray_signs(name, value)
    _lost_digits(name, value)
    return name, f"{'++' if is_open(name) else ''}{name}={_value(name, value)}"


def named(item: str) -> tuple[str, str]:
    """The key or group that a word sets, and the value as typed. Raises PkuslurmError unless there is such a key."""
    key, equals, value = item.partition("=")
    if item.startswith("-"):
        if equals:
            raise PkuslurmError(f"{show(item)}: settings are typed without dashes: {_right(key, value)}")
        switch = _right(item, "true")
        if bool in get_args(hint := hint_of(switch.partition("=")[0])) or hint is bool:
            raise PkuslurmError(f"{item}: write {switch}")
        raise PkuslurmError(f"{item}: no such option; --help lists them")
    name = re.sub(r"^\+{1,2}", "", key)
    if not KEY.fullmatch(name):
        _not_a_key(item, name)
    if name in GROUPS and not value.startswith("{"):
        return name, value
    if not equals:
        right = f"{name}=…" if hint_of(name) is not None else "key=value"
        raise PkuslurmError(f"{show(item)}: a setting is typed as {right}, without spaces{_guessed(name)}")
    if name.startswith("hydra."):
        raise PkuslurmError(f"{name}: Hydra's own settings have no use here; leave it out")
    if not is_open(name) and (hint_of(name) is None or is_node(name)):
        if is_node(name):
            raise PkuslurmError(f"{name}={show(value)}: it holds keys of its own; set one of them, {name}.key=value")
        raise PkuslurmError(f"{name}: no such key{nearest_key(name, show(value))}")
    if name in ("train", "merge"):
        raise PkuslurmError(f"{name}={show(value)}: it holds keys of its own; set one of them, {name}.key=value")
    return name, value


def wants_number(name: str) -> bool:
    """Whether a number is wanted, and nothing else."""
    return is_number(name) or (name.startswith("train.") and takes_numbers(name.removeprefix("train.")))


def _taken_away(item: str) -> tuple[str, str]:
    name = item[1:].partition("=")[0]
    if not KEY.fullmatch(name):
        _not_a_key(item, name)
    if not is_open(name) or name in OPEN:
        raise PkuslurmError(
            f"{item}: only single keys of train, merge and cluster.env can be taken away; write {name}=…"
        )
    return name, item


def _not_a_key(item: str, name: str) -> None:
    plain = item.translate(FULL_WIDTH)
    key, _, value = plain.partition("=")
    if plain != item and (_is_known(key) or guesses(key)):
        raise PkuslurmError(f"{show(item)}: ＝ and ： are other signs; write {_right(key, value)}")
    key, colon, value = item.partition(":")
    if colon and "=" not in item and (_is_known(key) or guesses(key)):
        raise PkuslurmError(f"{show(item)}: write {_right(key, value.strip())}, with = for :")
    if name != name.strip():
        raise PkuslurmError(f"{show(item)}: write it without spaces around the =")
    if is_open(name):
        raise PkuslurmError(f"{show(name)}: it cannot be a key; each part is letters, digits and _, a letter first")
    raise PkuslurmError(
        f"{show(item)}: a setting is typed as key=value, with a key such as nodes or train.learning_rate"
    )


def _choice(group: str, value: str, roots: Sequence[Path]) -> str:
    """The choice of a group, looked for here: Hydra would name its search path."""
    choice = value.strip("'\"")
    if choice in ("", "null") and group == "experiment":
        return "null"
    if "/" in choice or choice.startswith((".", "~")) or re.search(r"\.(jsonl?|csv|txt|parquet|ya?ml|sif)$", choice):
        right = (
            f"write {_pasted(f'{PATHS[group]}={value}')}"
            if group in PATHS
            else "put such a file into conf/ and name it"
        )
        raise PkuslurmError(f"{group}={show(value)}: {group} takes one of its choices; for a path, {right}")
    if "," in choice and not choice.startswith("["):
        raise PkuslurmError(f"{group}={show(value)}: several values make a sweep, which needs -m")
    if choice == "auto" and group in ("model", "dataset", "train"):
        return choice
    if choice.startswith("[") and group == "pipeline":
        raise PkuslurmError(
            f"pipeline={show(value)}: pipeline takes one of its choices; write pipeline.jobs={show(value)}"
        )
    if presets.file_of(group, choice, roots) is None:
        raise PkuslurmError(presets.no_such_choice(group, show(choice), roots))
    return choice


def _guessed(name: str) -> str:
    return "" if hint_of(name) is not None else nearest_key(name, "…")


def _joined(key: str, value: str) -> None:
    """Two settings in one word: nodes=2，name=a."""
    first, comma, rest = value.partition("，")
    other = rest.partition("=")[0].strip()
    if comma and "=" in rest and _is_known(other) and first[:1] not in "['\"":
        raise PkuslurmError(f"{key}={show(value)}: ， joins no settings; write {key}={first} {rest.strip()}")


def _stray_signs(key: str, value: str) -> None:
    """［a，b］, and a number with a sign that is none of a number's: 2，  3轮  5e−5."""
    plain = value.strip().translate(BRACKETS)
    if value.strip().startswith("［") and "list" in choices_of(hint_of(key)):
        raise PkuslurmError(f"{key}={show(value)}: ［ ］ are full-width; write {_pasted(f'{key}={plain}')}")
    if not wants_number(key):
        return
    found = re.fullmatch(
        r"([-+]?\d[\d.]*(?:[eE][-+]?\d+)?)(\D*)", unicodedata.normalize("NFKC", plain).translate(MINUS)
    )
    stray = next((sign for sign in value if not sign.isascii()), value[-1:])
    if found and (not value.isascii() or found.group(2) == ","):
        code = "" if stray.isascii() or stray.isalpha() else f" (U+{ord(stray):04X})"
        raise PkuslurmError(f"{key}={show(value)}: {stray}{code} is no part of a number; write {key}={found.group(1)}")


def _lost_digits(key: str, value: str) -> None:
    """2024_01 and 0.10 are numbers for Hydra; where text is wanted, they would arrive as 202401 and 0.1."""
    number = number_of(value) if is_word(key) or key.startswith("cluster.env.") else None
    if number is not None and str(number) != value.strip():
        raise PkuslurmError(
            f"{key}={value}: this is read as the number {number}; for the text, quote it twice: \"{key}='{value}'\""
        )


def _value(key: str, value: str) -> str:
    override = parsed(value)
    if override is not None and override.is_sweep_override():
        hint = choices_of(hint_of(key))
        listed = f" [{show(value)}] for a list" if "list" in hint else ""
        quoted = f" \"{key}='{show(value)}'\" for one text" if "text" in hint or is_open(key) else ""
        right = f"write{listed}{',' if listed and quoted else ''}{quoted}" if listed or quoted else f"it must be {hint}"
        raise PkuslurmError(f"{key}={show(value)}: several values make a sweep, which needs -m; {right}")
    return quoted_where_needed(value, mapping=is_open(key))
