"""The cache of tokenized data: a folder whose name is a hash of all that shaped it, and a run's own copy of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from .dataset_info import entries
from .files import hash_file, hash_tree, install, is_shared, open_files, refuse, sweep, versions, write_json
from .rows import Checked
from .shaping import shaping_args
from .tokens import tokenize

# what a tokenizer is made of; weights are not
_TOKENIZER_FILES = (
    "*tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
    "config.json",
    "*.py",
)


def cache_key(args: dict[str, Any], keys: frozenset[str]) -> str:
    """A name for all that shapes the rows: settings, the data's and the tokenizer's contents, versions.

    LLaMA-Factory itself takes whatever lies in tokenized_path, also what was made with another template.
    """
    shaping = shaping_args(args, keys)
    # by contents, not by place: a copied model or file gives the same rows
    shaping.pop("model_name_or_path", None)
    sources = {}
    for name, entry in entries(args).items():
        content = None
        if "file_name" in entry:
            path = Path(args["dataset_dir"]) / entry["file_name"]
            try:
                content = hash_tree(path) if path.is_dir() else hash_file(path)
            except OSError as error:
                refuse(f"dataset={name}: {path} cannot be read ({error.strerror})")
        rest = {key: value for key, value in entry.items() if key != "file_name"}
        sources[name] = [content, Path(entry.get("file_name", "")).suffix, rest]
    model = Path(args["model_name_or_path"])
    files = sorted({file for pattern in _TOKENIZER_FILES for file in model.glob(pattern) if file.is_file()})
    known = versions()
    whole = {
        "form": 2,
        "args": shaping,
        "data": sources,
        "tokenizer": {file.name: hash_file(file) for file in files},
        "versions": {name: known.get(name) for name in ("llamafactory", "transformers", "tokenizers", "datasets")},
    }
    text = json.dumps(whole, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def facts_of(folder: Path) -> dict[str, Any] | None:
    """What is known of a cached folder; None where it is not whole (facts.json is written last)."""
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        whole = all((folder / "data" / name).stat().st_size == size for name, size in facts["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if whole else None


def make(folder: Path, args: dict[str, Any], keys: frozenset[str], checked: Checked) -> None:
    """Make the cached ``folder``; two at once are safe, the first to rename wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        new = work / "new"
        new.mkdir()
        facts = tokenize(args, keys, new / "data", work)
        facts["files"] = {
            file.relative_to(new / "data").as_posix(): file.stat().st_size
            for file in (new / "data").rglob("*")
            if file.is_file()
        }
        facts["rows"] = facts["kept"] if checked.rows is None else checked.rows
        write_json(new / "facts.json", facts)
        install(new, folder, lambda: facts_of(folder) is not None)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(source: Path, target: Path) -> None:
    """``target`` becomes a copy of the tree ``source``, by hard links where both lie on one file system.

    Built beside it and renamed. Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    mode = target.parent.stat().st_mode
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        new = work / "new"
        shutil.copytree(source, new, copy_function=partial(_link, shared=is_shared(mode)))
        if is_shared(mode):
            for folder in (new, *(path for path in new.rglob("*") if path.is_dir())):
                folder.chmod(mode & 0o777)
            open_files(new)
        if target.exists():
            target.rename(work / "old")
        new.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _link(source: str, target: str, shared: bool) -> str:
    # a link has the cache's mode; in a group's run that is right only by chance
    if shared and os.stat(source).st_mode & 0o777 != 0o640:
        shutil.copy2(source, target)
        return target
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
