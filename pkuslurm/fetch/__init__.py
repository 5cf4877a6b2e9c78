"""pkuslurm fetch MODEL: from ModelScope, Hugging Face or a mirror into the cache that the nodes see.

By the standard library: a login node has pkuslurm's own dependencies, and none of them speaks to a hub; the hubs' own
programs bring a dozen packages each, and take pickles and code along unless they are told not to.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pkuslurm.errors import PkuslurmError
from pkuslurm.fetch import place
from pkuslurm.fetch.choose import INDEX, RECORD, check_names, is_code, texts, weights
from pkuslurm.fetch.download import Folder, fetch_all
from pkuslurm.fetch.hubs import RemoteFile, address, hub_of, listing, page
from pkuslurm.fetch.progress import Progress
from pkuslurm.fetch.web import Hub, Missing, Unreachable
from pkuslurm.paths import absolute
from pkuslurm.preflight.modelfiles import read_object
from pkuslurm.preflight.models import HUB_ID, aliases, check_model, find_model
from pkuslurm.read.text import safe, size

# What else the hubs have pages of.
_NO_MODELS = ("datasets/", "spaces/", "studios/", "collections/", "papers/", "docs/")


@dataclass(frozen=True)
class Wanted:
    """What is to be fetched, and into which folder."""

    hub: Hub
    model: str
    revision: str | None
    target: Path
    code: bool
    options: tuple[str, ...] = ()  # as they were typed, but for --code

    @property
    def command(self) -> str:
        return shlex.join([sys.executable, "-m", "pkuslurm", "fetch", self.model, *self.options])


def main(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """The verb. Prints the model's folder; everything else goes to stderr."""
    del rest
    environ = os.environ
    model, source, revision = _named(arguments.model, arguments.source, arguments.revision)
    hub = hub_of(source, environ)
    chosen = arguments.to is not None
    cache_root = "" if chosen else _cache_root()
    target = Path(absolute(arguments.to)) if chosen else place.home_of(model, cache_root, environ)
    given = {"--from": source, "--revision": revision, "--to": str(target) if chosen else None}
    options = tuple(word for name, value in given.items() if value is not None for word in (name, value))
    wanted = Wanted(hub, model, revision, target, arguments.code, options)
    if not chosen and revision is None and not arguments.code and (found := _there(model, cache_root)):
        _say(f"{model} is there already")
        print(found)
        return 0
    whole = _is_whole(target)
    if whole and not arguments.code:
        raise PkuslurmError(f"{target}: a model is there already; remove it, or give another folder: --to DIR")
    try:
        (fetch_code if whole else fetch)(wanted)
    except Unreachable:
        for line in place.without_network(hub, model, revision, target, arguments.code):
            _say(line)
        raise
    except KeyboardInterrupt:
        _say(f"\nstopped; what has come stays in {place.working(target)}, the same command goes on from there")
        raise
    _say(f"use it: model.path={shlex.quote(str(target) if chosen else model)}")
    print(target)
    return 0


def _named(given: str, source: str | None, revision: str | None) -> tuple[str, str | None, str | None]:
    """The hub id; the hub and the revision, where a page's address names them and nothing else was typed. A preset's
    name stands for its model."""
    if found := re.match(r"(https?://[^/?#]+)/(?:models/)?([^/?#]+/[^/?#]+)(?:/(?:tree|blob)/([^/?#]+))?", given):
        if found[2].startswith(_NO_MODELS):
            raise PkuslurmError(f"fetch {given}: this is no model's page; only models are fetched")
        if _is_id(found[2]):
            # the page of Hugging Face itself; its mirror is named by HF_ENDPOINT or --from
            known = {"huggingface.co": "huggingface", "modelscope.cn": "modelscope", "www.modelscope.cn": "modelscope"}
            hub = source or known.get(urlsplit(found[1]).netloc, found[1])
            return found[2], hub, revision or (unquote(found[3]) if found[3] else None)
    if _is_id(given):
        return given, source, revision
    if re.fullmatch(r"[\w.-]+", given):
        from pkuslurm.compose import compose, groups

        if given in groups()["model"]:
            path = compose([f"model={given}", "dry_run=true"]).config.model.path
            if path is not None and HUB_ID.fullmatch(path):
                return path, source, revision
    raise PkuslurmError(
        f"fetch {given}: a model's id is wanted, OWNER/NAME (of A-Z a-z 0-9 . _ -), such as Qwen/Qwen3-0.6B, or its "
        "page's address"
    )


def _is_id(text: str) -> bool:
    """OWNER/NAME, which leads into a folder and never out of one."""
    return HUB_ID.fullmatch(text) is not None and not text.startswith((".", "-", "/")) and "/." not in text


def _cache_root() -> str:
    """As launch would take it: a site's defaults.yaml may name it."""
    from pkuslurm.compose import compose

    return absolute(compose([]).config.cache_root)


def _there(model: str, cache_root: str) -> Path | None:
    """The folder that launch would take, if it is whole."""
    found = find_model(model, {**os.environ, "PKUSLURM_CACHE": cache_root})
    if found is None:
        return None
    try:
        check_model(found)
    except PkuslurmError:
        return None
    return found


def _is_whole(target: Path) -> bool:
    """Whether a model is there already. Raises PkuslurmError where something else is."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        check_model(target)
    except PkuslurmError as problem:
        raise PkuslurmError(
            f"{target}: it is no whole model ({problem}); remove it, or give another: --to DIR"
        ) from None
    return True


def fetch(wanted: Wanted) -> None:
    """The files into the working folder, checked; then that gets the model's name."""
    hub, model = wanted.hub, wanted.model
    revision, files = _listed(wanted, wanted.revision)
    if not any(file.path == "config.json" for file in files):
        _weights(wanted, files, None)  # says what is there instead
        raise PkuslurmError(f"{model}: {page(hub, model)} has no config.json: no model in Hugging Face's form")
    small = texts(files, wanted.code)
    index = next((file for file in files if file.path == INDEX), None)
    if index is None:
        _weights(wanted, files, None)
    with place.alone(wanted.target) as work:
        facts = {"model": model, "hub": hub.endpoint, "revision": revision}
        folder = Folder(work, facts)

        def at(file: RemoteFile) -> str:
            return address(hub, model, revision, file.path)

        if index is not None:
            fetch_all(hub, [index], at, folder, Progress(index.size, 0))
        chosen = [*small, *_weights(wanted, files, read_object(work / INDEX) if index else None)]
        total, here = sum(file.size for file in chosen), sum(folder.here(file) for file in chosen)
        place.check_room(work, total - here)
        _announce(wanted, files, chosen, here)
        try:
            fetch_all(hub, chosen, at, folder, Progress(total, here))
        except Unreachable as problem:
            raise PkuslurmError(f"{problem}; fetch again later, it goes on from where it stands") from None
        _finish(work, folder, chosen, wanted)


def fetch_code(wanted: Wanted) -> None:
    """What is missing of the code of a model that is there: of the same revision; what is there stays as it is."""
    hub, model, target = wanted.hub, wanted.model, wanted.target
    known = read_object(target / RECORD)
    same = known.get("revision") if known.get("hub") == hub.endpoint else None
    revision, files = _listed(wanted, wanted.revision or same)
    if same is not None and revision != same:
        raise PkuslurmError(f"{target}: the model there is revision {same}, not {revision}; give another: --to DIR")
    missing = [file for file in files if is_code(file) and not os.path.lexists(target / file.path)]
    if not missing:
        _say(f"{model}: all code that {hub.host} has for it is there")
        return
    with place.alone(target):
        _say(f"{model} from {hub.host}: {', '.join(file.path for file in missing)}, into {target}")
        folder = Folder(target, known or {"model": model, "hub": hub.endpoint, "revision": revision})
        total = sum(file.size for file in missing)
        fetch_all(hub, missing, lambda file: address(hub, model, revision, file.path), folder, Progress(total, 0))


def _listed(wanted: Wanted, revision: str | None) -> tuple[str, list[RemoteFile]]:
    """The revision and its files, by names that stay in the model's folder."""
    try:
        found, files = listing(wanted.hub, wanted.model, revision)
    except Missing as problem:
        raise PkuslurmError(_missing(wanted, problem)) from None
    check_names(files)
    return found, files


def _weights(wanted: Wanted, files: Sequence[RemoteFile], index: Mapping[str, Any] | None) -> list[RemoteFile]:
    try:
        return weights(files, index)
    except PkuslurmError as problem:
        raise PkuslurmError(f"{wanted.model} ({page(wanted.hub, wanted.model)}): {problem}") from None


def _announce(wanted: Wanted, files: Sequence[RemoteFile], chosen: Sequence[RemoteFile], here: int) -> None:
    names = {file.path for file in chosen}
    left = [file for file in files if file.path not in names]
    total = sum(file.size for file in chosen)
    _say(f"{wanted.model} from {wanted.hub.host}: {len(chosen)} files, {size(total)}, into {wanted.target}")
    if here:
        _say(f"{size(here)} of it are here already")
    if left:
        _say(f"left out: {len(left)} files, {size(sum(file.size for file in left))} (pickles, code, other forms of it)")


def _finish(work: Path, folder: Folder, chosen: Sequence[RemoteFile], wanted: Wanted) -> None:
    """Only what was chosen stays; what preflight will ask is asked now; then the folder gets its name."""
    for entry in work.glob(".part-*"):
        entry.unlink(missing_ok=True)  # of another version
    names = {file.path for file in chosen}
    for name in [name for name in folder.record["files"] if name not in names]:
        folder.place(RemoteFile(name, 0)).unlink(missing_ok=True)
    try:
        check_model(work)
    except PkuslurmError as problem:
        raise PkuslurmError(f"{wanted.model}: all files came as listed, but {problem}") from None
    if read_object(work / "config.json").get("auto_map") and not wanted.code:
        _say(
            "warning: this model brings code of its own (auto_map in config.json), which was not fetched: read it on "
            f"{page(wanted.hub, wanted.model)}, then {wanted.command} --code, and model.trust_remote_code=true"
        )
    try:
        if wanted.target.is_dir():
            wanted.target.rmdir()  # an empty one, as looked before
        (work / ".lock").unlink()
        work.rename(wanted.target)
    except OSError as error:
        raise PkuslurmError(f"{wanted.target}: {error.strerror}; the model lies whole in {work}") from None


def _missing(wanted: Wanted, problem: Missing) -> str:
    others = [name for name in aliases(wanted.model) if name != wanted.model]
    hint = f"; it may be called {' or '.join(others)} there" if others else ""
    other = "huggingface" if wanted.hub.kind == "modelscope" else "modelscope"
    asked = f"{wanted.model} (revision {wanted.revision})" if wanted.revision else wanted.model
    return f"fetch {asked}: not on {problem}{hint}; or try --from {other}"


def _say(text: str) -> None:
    print(safe(text, keep="\n"), file=sys.stderr, flush=True)
