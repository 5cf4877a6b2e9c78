"""Slurm's short form of a list of hosts, ``a[01-03,7],b``, spelled out."""

from __future__ import annotations

import itertools
import re

from pkuslurm.errors import PkuslurmError

# a range such as [1-99999999] in a damaged variable must not fill the memory
LARGEST = 65536

_RANGE = re.compile(r"(\d+)(?:-(\d+))?\Z")


def expand(text: str) -> list[str]:
    """The hosts of ``text`` in its order, as ``scontrol show hostnames`` prints them.

    Numbers keep the width of the range's first number: ``a[08-10]`` is a08, a09, a10. Several brackets in one
    word multiply, the last one running fastest. Raises PkuslurmError for anything else, the empty list
    included.
    """
    hosts: list[str] = []
    for word in _split(text):
        hosts.extend(_expand_word(word, text))
        if len(hosts) > LARGEST:
            raise PkuslurmError(f"node list {text!r}: more than {LARGEST} hosts")
    if not hosts:
        raise PkuslurmError(f"node list {text!r}: names no host")
    return hosts


def _split(text: str) -> list[str]:
    """Cut at the commas that are outside of brackets."""
    words, depth, word = [], 0, ""
    for letter in text.strip():
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if depth not in (0, 1):
            raise PkuslurmError(f"node list {text!r}: the brackets do not match")
        if letter == "," and depth == 0:
            words.append(word)
            word = ""
        else:
            word += letter
    if depth:
        raise PkuslurmError(f"node list {text!r}: the brackets do not match")
    return [*words, word]


def _expand_word(word: str, text: str) -> list[str]:
    # the odd pieces are what stood in brackets
    pieces = re.split(r"\[([^]]*)\]", word)
    if not word or any(piece.strip() != piece or " " in piece for piece in pieces):
        raise PkuslurmError(f"node list {text!r}: {word!r} is no host name")
    choices: list[list[str]] = []
    size = 1
    for index, piece in enumerate(pieces):
        choices.append(_expand_ranges(piece, text) if index % 2 else [piece])
        size *= len(choices[-1])
        if size > LARGEST:
            raise PkuslurmError(f"node list {text!r}: more than {LARGEST} hosts")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _expand_ranges(piece: str, text: str) -> list[str]:
    numbers: list[str] = []
    for part in piece.split(","):
        match = _RANGE.match(part)
        if match is None:
            raise PkuslurmError(f"node list {text!r}: {part!r} is no number and no range")
        first, last = match[1], match[2] or match[1]
        if not 0 <= int(last) - int(first) < LARGEST:
            raise PkuslurmError(f"node list {text!r}: {part!r} runs backwards or is too long")
        numbers.extend(f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    return numbers
