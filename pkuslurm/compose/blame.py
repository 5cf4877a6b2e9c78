"""Whose word a refusal is about: the file in which a value stands, and, of a LLaMA-Factory YAML, its own key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pkuslurm.compose.from_yaml import OF_MODEL, Given
from pkuslurm.compose.settings import COMMAND_LINE, origin_of
from pkuslurm.config.parse import show
from pkuslurm.errors import PkuslurmError

# Ours and the YAML's, where they differ by more than train. or merge. before it.
_THEIRS = {"dataset.name": "dataset", "dataset.path": "dataset_dir"} | {
    f"model.{ours}": theirs for theirs, ours in OF_MODEL.items()
}
# Of these LLaMA-Factory's own default is written out where a YAML does not have them.
_DEFAULTS = ("dataset_dir", "do_train")


@dataclass(frozen=True)
class Blame:
    """``origins``: who has the last word on each key; ``given``: the YAML of from_yaml, which is one of them."""

    origins: Mapping[str, str] = field(default_factory=dict)
    given: Given | None = None

    def __enter__(self) -> None:
        """For what is refused inside."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, PkuslurmError):
            raise PkuslurmError(self.said(str(error))) from None

    def said(self, text: str) -> str:
        """A refusal or a note that begins with a key (``key=value: …``), with the file that sets it."""
        found = re.match(r"(?:warning: [^:]*: )?(?P<key>[\w-]+(?:\.[\w-]+)*)(?:=(?P<value>[^:]*))?(?=:)", text)
        if found is None or "stands in" in text:
            return text
        origin = origin_of(found["key"], self.origins)
        if self.given is not None and origin == self.given.name:
            return f"{self._of_yaml(self.given, text, found)}{self._left(text)}"
        of_ours = origin is None or origin == COMMAND_LINE or re.fullmatch(r"\w+=[\w.-]+", origin)
        return f"{text}{self._left(text)}" if of_ours else f"{text}; it stands in {origin}"

    def _of_yaml(self, given: Given, text: str, found: re.Match[str]) -> str:
        key = found["key"]
        theirs = _THEIRS.get(key) or key.partition(".")[2] or key
        value = given.content.get(theirs)
        renamed = f"{text[: found.start('key')]}{theirs}{text[found.end('key') :]}"
        renamed = re.sub(r"did you mean (train|merge)\.", "did you mean ", renamed)
        if theirs not in given.content and theirs not in _DEFAULTS:
            return f"{text}; it comes of {given.name}"
        if theirs not in given.content:
            why = f"it is LLaMA-Factory's default, as {given.name} says nothing of {theirs}"
            here = f", and begins at the current folder ({Path.cwd()})" if theirs == "dataset_dir" else ""
            return f"{renamed}; {why}{here}"
        words = [str(one).strip() for one in value] if isinstance(value, list) else str(value).split(",")
        if found["value"] in (None, show(value), str(value), *(word.strip() for word in words)):
            return f"{renamed}; it stands in {given.name}"
        return f"{text}; {given.name} says {theirs}: {show(value)}"  # of a file below it

    def _left(self, text: str) -> str:
        """What of the YAML was not taken, where the refusal is about its absence."""
        notes = () if self.given is None else self.given.notes
        names = set(re.findall(r"\btrain\.(\w+)", text))
        return "".join(f"; {note}" for note in notes if set(re.findall(r": (\w+): not taken", note)) & names)
