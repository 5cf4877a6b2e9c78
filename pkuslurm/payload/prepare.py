"""The first job: the tiny model if it is wanted, the data checked, and tokenized once for all ranks and runs."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from . import tables, tiny_model, tokenized
from .dataset_info import entries, names
from .entry import used_columns
from .files import refuse, versions, write_json
from .rows import BadData, Checked, check
from .shaping import data_keys
from .steps import arithmetic_warnings, packed, steps, unlogged


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
    key = tokenized.cache_key(args, keys)
    folder = Path(payload["cache_root"]) / "tokenized" / key
    cached = tokenized.facts_of(folder) is not None
    if not cached:
        _, seconds["tokenize"] = _timed(lambda: tokenized.make(folder, args, keys, checked))
    facts = tokenized.facts_of(folder)
    if facts is None:
        raise RuntimeError(f"{folder}: the tokenized data disappeared while it was being used")
    _fits(facts, args)
    _, seconds["link"] = _timed(lambda: tokenized.publish(folder / "data", Path(payload["data_dir"])))
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
    known = entries(args)
    first = (payload, next(iter(known.values()), {}))
    return [first, *((source, known[source["name"]]) for source in payload.get("more", ()))]


def _formatting(source: dict[str, Any], entry: dict[str, Any]) -> str:
    return str(
        entry["formatting"] if source["formatting"] == "auto" and "formatting" in entry else source["formatting"]
    )


def _together(checks: list[Checked], args: dict[str, Any]) -> Checked:
    """What all sets that are trained on come to; what is held out is only warned of."""
    trained = checks[: len(names(args.get("dataset"))) or 1]
    known = [one.rows for one in trained if one.rows is not None]
    return Checked(
        checks[0].formatting,
        rows=sum(known) if len(known) == len(trained) else None,
        dropped=sum((one.dropped for one in trained), Counter()),
        warnings=[warning for one in checks for warning in one.warnings],
    )


def _sets(payload: dict[str, Any], args: dict[str, Any], checks: list[Checked]) -> list[dict[str, Any]]:
    """Each set's file, its rows (None: not known), and whether it is trained on, held out, or both."""
    trained, evaluated = (names(args.get(key)) for key in ("dataset", "eval_dataset"))
    called = ([*trained, *evaluated][:1] or [""]) + [source["name"] for source in payload.get("more", ())]
    return [
        {
            "name": name,
            "file": source["dataset_file"],
            "rows": checked.rows,
            "train": name in trained,
            "eval": name in evaluated,
        }
        for name, (source, _), checked in zip(called, _sources(payload, args), checks, strict=True)
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
