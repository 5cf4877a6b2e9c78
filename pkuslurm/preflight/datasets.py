"""Where the data is and in which of LLaMA-Factory's two forms. Reads only; prepare checks every row."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pkuslurm.config.schema import Dataset
from pkuslurm.errors import PkuslurmError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt")


@dataclass(frozen=True)
class Found:
    name: str
    file: Path
    formatting: str
    info: dict[str, Any]


def find_dataset(dataset: Dataset) -> Found:
    """The file and LLaMA-Factory's description of it. Raises PkuslurmError where there is none or more than one."""
    assert dataset.path is not None
    path = Path(dataset.path).expanduser().absolute()
    if not path.exists():
        raise PkuslurmError(f"dataset.path={dataset.path}: there is no such file or folder")
    if path.is_dir():
        path, entry = _from_folder(path, dataset.name)
    else:
        entry = {}
    if not path.is_file():
        raise PkuslurmError(f"dataset.path={dataset.path}: {path} is not there")
    if path.suffix not in SUFFIXES:
        raise PkuslurmError(f"dataset.path={path}: data comes as {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise PkuslurmError(f"dataset.path={path}: the file is empty")
    formatting = entry.get("formatting", "auto") if dataset.formatting == "auto" else dataset.formatting
    if formatting == "auto":
        formatting = "sharegpt" if "conversations" in first_row(path) else "alpaca"
    entry = {"file_name": str(path), "formatting": formatting} | {
        key: value for key, value in entry.items() if key not in ("file_name", "formatting")
    }
    row = first_row(path) if formatting == "alpaca" and "columns" not in entry and not dataset.columns else {}
    if row and "input" not in row and {"instruction", "output"} <= set(row):
        # LLaMA-Factory looks the column up in every row; a block of columns leaves unnamed ones out
        more = {name: name for name in ("system", "history") if name in row}
        entry["columns"] = {"prompt": "instruction", "response": "output", **more}
    if dataset.columns:
        entry["columns"] = dict(dataset.columns)
    if dataset.tags:
        entry["tags"] = dict(dataset.tags)
    name = dataset.name or path.stem.replace(",", "_")
    return Found(name, path, str(formatting), {name: entry})


def _from_folder(folder: Path, name: str | None) -> tuple[Path, dict[str, Any]]:
    described = folder / "dataset_info.json"
    if described.is_file():
        try:
            entries = json.loads(described.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise PkuslurmError(f"dataset.path: {described} is not JSON ({error})") from None
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise PkuslurmError(f"dataset.path: {described} must hold an object of objects, one for each dataset")
        if name is None and len(entries) == 1:
            name = next(iter(entries))
        if name not in entries:
            raise PkuslurmError(f"dataset.name={name}: {described} describes {', '.join(entries)}")
        entry = dict(entries[name])
        if "file_name" not in entry:
            raise PkuslurmError(f"dataset.name={name}: its entry in {described} has no file_name")
        return folder / entry["file_name"], entry
    files = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise PkuslurmError(f"dataset.path={folder}: one data file is wanted there, found {names}; name the file")
    return files[0], {}


def first_row(file: Path) -> dict[str, Any]:
    """The first row of a json, jsonl or csv file; empty where it cannot be told without a library."""
    row: object = {}
    try:
        if file.suffix == ".jsonl":
            with file.open(encoding="utf-8-sig") as stream:
                row = next((json.loads(line) for line in stream if line.strip()), {})
        elif file.suffix == ".json":
            text = file.read_text(encoding="utf-8-sig")
            whole = json.loads(text) if text.lstrip().startswith("[") else json.loads(text.split("\n", 1)[0])
            row = whole[0] if isinstance(whole, list) and whole else whole
        elif file.suffix == ".csv":
            with file.open(encoding="utf-8-sig", newline="") as stream:
                row = next(islice(csv.DictReader(stream), 1), {})
    except (ValueError, UnicodeDecodeError, csv.Error) as error:
        raise PkuslurmError(f"dataset.path={file}: it cannot be read as {file.suffix[1:]} ({error})") from None
    return row if isinstance(row, dict) else {}
