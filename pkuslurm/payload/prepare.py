"""The first job: the tiny model if it is wanted, the data checked, and tokenized once for all ranks and runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from . import tables, tiny_model
from .entry import used_columns
from .files import hash_file, hash_tree, install, is_shared, open_files, refuse, sweep, versions, write_json
from .rows import BadData, Checked, check
from .shaping import data_keys, shaping_args
from .steps import arithmetic_warnings, packed, steps, unlogged
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


def main(job: dict[str, Any]) -> None:
    """Fill data_dir, write results/prepare.json. Raises SystemExit(2), in words, where the data cannot be used."""
    payload = job["payload"]
    args: dict[str, Any] = payload["train_args"]
    seconds: dict[str, float] = {}
    model, seconds["model"] = _timed(lambda: _model(payload))
    try:
        checks, seconds["check"] = _timed(lambda: _check(payload, args))
    except BadData as error:
        refuse(f"dataset.path={error}")
    _, seconds["convert"] = _timed(lambda: _convert_all(payload, args, checks))
    checked = _together(checks, args)
    keys = data_keys()
    key = cache_key(args, keys)
    folder = Path(payload["cache_root"]) / "tokenized" / key
    cached = _facts(folder) is not None
    if not cached:
        _, seconds["tokenize"] = _timed(lambda: _tokenize_into(folder, args, keys, checked))
    facts = _facts(folder)
    if facts is None:
        raise RuntimeError(f"{folder}: the tokenized data disappeared while it was being used")
    _fits(facts, args)
    _, seconds["link"] = _timed(lambda: publish(folder / "data", Path(payload["data_dir"])))
    counted = steps(facts["train_rows"], args, payload["ranks"])
    # of rows that are packed launch could not count the steps
    late = unlogged(counted, args) if packed(args) else []
    warnings = [*checked.warnings, *_cut(facts, args), *arithmetic_warnings(counted), *late]
    for warning in warnings:
        _say(f"warning: {warning}")
    for line in facts["first"]:
        _say(line)
    result = {
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "versions": versions(),
        "model": model | {"seconds": round(seconds["model"], 2)},
        "dataset": {
            "file": payload["dataset_file"],
            "formatting": checked.formatting,
            "sets": _sets(payload, args, checks),
            **_kept(facts, args, checked),
            "dropped": sum(checked.dropped.values()),
            "reasons": dict(checked.dropped),
            "train_rows": facts["train_rows"],
            "eval_rows": facts["eval_rows"],
            "tokens": facts["tokens"],
            "cut": facts["cut"],
            "cached": cached,
            "key": key,
            "first": facts["first"],
        },
        "steps": counted,
        "warnings": warnings,
    }
    write_json(payload["result"], result)


def _timed(work: Any) -> tuple[Any, float]:
    began = time.monotonic()
    return work(), time.monotonic() - began


def _model(payload: dict[str, Any]) -> dict[str, Any]:
    path = Path(payload["model_path"])
    made = False
    if payload["make"] == "tiny":
        made = tiny_model.ensure(path)
    elif payload["make"]:
        refuse(f"model.make={payload['make']}: only tiny can be made")
    if not (path / "config.json").is_file():
        refuse(f"model.path={path}: there is no model (no config.json); give a folder that holds one")
    return {"path": str(path), "made": made}


def _entries(args: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """dataset_info.json's entries of the datasets that ``args`` name. Refuses where it lacks one."""
    info = Path(args["dataset_dir"]) / "dataset_info.json"
    names = [*_names(args.get("dataset")), *_names(args.get("eval_dataset"))]
    try:
        known = json.loads(info.read_text(encoding="utf-8"))
        return {name: known[name] for name in names}
    except (OSError, ValueError) as error:
        refuse(f"dataset: {info} cannot be read ({error})")
    except KeyError as error:
        refuse(f"dataset={error.args[0]}: {info} does not describe it; it has {', '.join(known)}")


def _names(value: Any) -> list[str]:
    """Names of datasets, with commas or as a list."""
    return [name.strip() for name in (value.split(",") if isinstance(value, str) else value)] if value else []


def _check(payload: dict[str, Any], args: dict[str, Any]) -> list[Checked]:
    """Every set of data, the first one first; raises BadData."""
    return [
        check(
            source["dataset_file"], _formatting(source, entry), entry, args.get("stage", "sft"), args.get("max_samples")
        )
        for source, entry in _sources(payload, args)
    ]


def _sources(payload: dict[str, Any], args: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each file of data, with its entry of dataset_info.json."""
    entries = _entries(args)
    first = (payload, next(iter(entries.values()), {}))
    return [first, *((source, entries[source["name"]]) for source in payload.get("more", ()))]


def _formatting(source: dict[str, Any], entry: dict[str, Any]) -> str:
    return str(
        entry["formatting"] if source["formatting"] == "auto" and "formatting" in entry else source["formatting"]
    )


def _together(checks: list[Checked], args: dict[str, Any]) -> Checked:
    """What all sets that are trained on come to; what is held out is only warned of."""
    trained = checks[: len(_names(args.get("dataset"))) or 1]
    known = [one.rows for one in trained if one.rows is not None]
    return Checked(
        checks[0].formatting,
        rows=sum(known) if len(known) == len(trained) else None,
        dropped=sum((one.dropped for one in trained), Counter()),
        warnings=[warning for one in checks for warning in one.warnings],
    )


def _sets(payload: dict[str, Any], args: dict[str, Any], checks: list[Checked]) -> list[dict[str, Any]]:
    """Each set's file, its rows (None: not known), and whether it is trained on, held out, or both."""
    trained, evaluated = (_names(args.get(key)) for key in ("dataset", "eval_dataset"))
    names = ([*trained, *evaluated][:1] or [""]) + [source["name"] for source in payload.get("more", ())]
    return [
        {
            "name": name,
            "file": source["dataset_file"],
            "rows": checked.rows,
            "train": name in trained,
            "eval": name in evaluated,
        }
        for name, (source, _), checked in zip(names, _sources(payload, args), checks, strict=True)
    ]


def _kept(facts: dict[str, Any], args: dict[str, Any], checked: Checked) -> dict[str, Any]:
    """How many rows there are, and how many of them are of use; of packed ones the tokens come in blocks, which are
    then what ``train_rows`` and ``eval_rows`` count."""
    if not packed(args):
        return {"rows": checked.rows if checked.rows is not None else facts["rows"], "kept": facts["kept"]}
    kept = None if checked.rows is None else checked.rows - sum(checked.dropped.values())
    return {"rows": checked.rows, "kept": kept, "blocks": facts["train_rows"], "block": args.get("cutoff_len", 2048)}


def _convert_all(payload: dict[str, Any], args: dict[str, Any], checks: list[Checked]) -> None:
    for (source, entry), checked in zip(_sources(payload, args), checks, strict=True):
        _convert(source, entry, checked)


def _convert(source: dict[str, Any], entry: dict[str, Any], checked: Checked) -> None:
    """The file as LLaMA-Factory can read it, where dataset_info.json names that; launch has decided it."""
    file, target = Path(source["dataset_file"]), source.get("convert_to")
    if target:
        columns = used_columns(checked.formatting, entry)
        answers = {columns[role] for role in ("response", "chosen", "rejected") if role in columns}
        try:
            tables.convert(file, Path(target), columns.values(), answers)
        except BadData as error:
            refuse(f"dataset.path={error}")
    elif checked.convert.startswith("it is "):
        refuse(f"dataset.path={file}: {checked.convert}, which it was not at launch; launch anew")


def _fits(facts: dict[str, Any], args: dict[str, Any]) -> None:
    """A template can have words that the tokenizer must first be given, by numbers that the model has no rows for."""
    model = Path(args["model_name_or_path"])
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        known = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return
    if isinstance(known, int) and facts["largest_id"] >= known and not args.get("resize_vocab"):
        refuse(
            f"model.template={args.get('template')}: it needs token {facts['largest_id']}, and the model in {model} "
            f"has only {known} (vocab_size); take the template that the model was made for, or train.resize_vocab=true"
        )


def _cut(facts: dict[str, Any], args: dict[str, Any]) -> list[str]:
    if not facts["cut"]:
        return []
    limit = args.get("cutoff_len", 2048)
    return [f"{facts['cut']} of {facts['train_rows']} rows reach cutoff_len={limit} and are cut there"]


def _say(line: str) -> None:
    print(f"pkuslurm: {line}", file=sys.stderr, flush=True)


def cache_key(args: dict[str, Any], keys: frozenset[str]) -> str:
    """A name for all that shapes the rows: settings, the data's and the tokenizer's contents, versions.

    LLaMA-Factory itself takes whatever lies in tokenized_path, also what was made with another template.
    """
    shaping = shaping_args(args, keys)
    # by contents, not by place: a copied model or file gives the same rows
    shaping.pop("model_name_or_path", None)
    sources = {}
    for name, entry in _entries(args).items():
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


def _facts(folder: Path) -> dict[str, Any] | None:
    """What is known of a cached folder; None where it is not whole (facts.json is written last)."""
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        whole = all((folder / "data" / name).stat().st_size == size for name, size in facts["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if whole else None


def _tokenize_into(folder: Path, args: dict[str, Any], keys: frozenset[str], checked: Checked) -> None:
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
        install(new, folder, lambda: _facts(folder) is not None)
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
