"""Where the data is, what its columns mean, and whether its rows can be trained on. Reads only.

prepare looks again, since the file may have changed by then.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pkuslurm.config.schema import Dataset
from pkuslurm.errors import PkuslurmError
from pkuslurm.payload.entry import MEDIA
from pkuslurm.payload.rows import Checked, look
from pkuslurm.payload.tables import READERS, BadData, open_table
from pkuslurm.preflight.columns import HEAD, check_roles, describe
from pkuslurm.preflight.nearest import nearest_to

# of a file that is too large to be read at once, so many rows are looked at here; prepare looks at all
LIMIT = 100_000
_EXCEL = "save it as CSV UTF-8: in Excel, 另存为 → CSV UTF-8 (逗号分隔)"
_DOCUMENT = "save its text as .txt (train.stage=pt), or its questions and answers as CSV UTF-8"
_PACKED = "unpack it and name the file inside"
_REMEDIES = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".et", ".numbers"), _EXCEL),
    **dict.fromkeys((".docx", ".doc", ".pdf", ".wps", ".odt", ".rtf"), _DOCUMENT),
    **dict.fromkeys((".gz", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"), _PACKED),
}
_URLS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


@dataclass(frozen=True)
class Found:
    """``info``: {name: entry} of dataset_info.json, with the original file. ``convert``: prepare must write the file
    anew first. ``rows`` of the file (None: not told here), of which ``dropped`` are of no use, by reason; ``notes``:
    what was told and what will be done; ``first``: the first usable row, a line for each message.
    """

    name: str
    file: Path
    formatting: str
    info: dict[str, Any]
    rows: int | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    convert: bool = False
    notes: tuple[str, ...] = ()
    first: str = ""
    media: bool = False  # its rows name pictures, videos or sounds

    @property
    def usable(self) -> int | None:
        """Rows that will be trained on, before max_samples and val_size; of a large file an estimate from above."""
        return None if self.rows is None else self.rows - sum(self.dropped.values())


class NotHere(PkuslurmError):
    """Data that lies on a hub, or somewhere else where a run does not look: a dry run says so and goes on."""


def names_of(value: object) -> list[str]:
    """Names of datasets, with commas or as a list."""
    names = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    return [str(name).strip() for name in names]


def is_remote(path: str) -> bool:
    """LLaMA-Factory's words for a hub in place of a folder (dataset_dir)."""
    return path == "ONLINE" or path.startswith("REMOTE:")


def entry(dataset: Dataset, name: str, key: str) -> Dataset:
    """One of several entries of a folder's dataset_info.json; ``key`` has named them. Raises PkuslurmError."""
    path = Path(str(dataset.path)).expanduser()
    if path.is_file() and path.name != "dataset_info.json":
        raise PkuslurmError(
            f"{key}={name}: it is looked for in the dataset_info.json of a folder, and "
            f"dataset.path={dataset.path} is a file; give the folder and dataset.name"
        )
    return replace(dataset, name=name, formatting="auto", columns=None, tags=None)


def find_dataset(dataset: Dataset, stage: str = "sft", most: int | None = None, key: str = "dataset.name") -> Found:
    """The file, LLaMA-Factory's description of it, and what is in it; ``most`` is train.max_samples; ``key`` names it.

    Raises PkuslurmError where there is none or more than one, or where its rows cannot be trained on.
    """
    assert dataset.path is not None
    check_roles(dataset.columns, dataset.tags)
    if dataset.name and "," in dataset.name:
        raise PkuslurmError(f"dataset.name={dataset.name}: one dataset is wanted, by a name without a comma")
    if is_remote(dataset.path):
        raise NotHere(
            f"dataset.path={dataset.path}: it is on a hub, and nothing is downloaded here; download it and give its "
            "folder (dataset_dir)"
        )
    try:
        file, given = _find(dataset.path, dataset.name, key)
        name = dataset.name or given.pop("name", None) or file.stem.replace(",", "_").strip() or "data"
        given.pop("name", None)
        return _look(dataset, name, file, given, stage, most)
    except BadData as error:
        raise PkuslurmError(f"dataset.path={error}") from None
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PkuslurmError(f"dataset.path={dataset.path}: it cannot be read ({reason})") from None


def _look(dataset: Dataset, name: str, file: Path, given: dict[str, Any], stage: str, most: int | None) -> Found:
    if dataset.formatting != "auto":
        given["formatting"] = dataset.formatting
    media = any((dataset.columns or given.get("columns") or {}).get(kind) for kind in MEDIA)
    if file.is_dir():
        told = describe(str(file), (), given, dataset.columns, dataset.tags, stage)
        note = f"{file.name}: a folder of files, which are not looked at here; LLaMA-Factory reads them"
        entry = {"file_name": str(file), **told.entry}
        return Found(name, file, str(entry["formatting"]), {name: entry}, notes=(note,), media=media)
    table = open_table(file)
    with nullcontext() if table is None else closing(table):
        head = [] if table is None else list(islice(table.rows, HEAD))
        if table is not None and not head:
            raise BadData(f"{file}: it holds no row")
        told = describe(str(file), head, given, dataset.columns, dataset.tags, stage)
        entry = {"file_name": str(file), **told.entry}
        formatting = str(entry["formatting"])
        if table is None:
            note = f"{file.name}: it cannot be looked at here (no pyarrow); prepare does"
            return Found(name, file, formatting, {name: entry}, notes=(note,), media=media)
        table.rows = chain(head, table.rows)
        checked = look(file, table, formatting, entry, stage, most, LIMIT)
    rows = entry.get("num_samples") or checked.rows
    notes = (*(f"{file.name}: {note}" for note in told.notes), *_notes(file.name, checked, most))
    return Found(
        name,
        file,
        formatting,
        {name: entry},
        rows,
        dict(checked.dropped),
        bool(checked.convert),
        notes,
        checked.first,
        media,
    )


def _notes(name: str, checked: Checked, most: int | None) -> list[str]:
    notes = []
    if checked.convert.startswith("it is "):
        notes.append(f"{name} {checked.convert.removeprefix('it ')}: converted to UTF-8")
    elif checked.convert:
        notes.append(f"{name} is written anew as lines of JSON: {checked.convert}")
    if checked.looked_at == LIMIT and most != LIMIT:
        notes.append(f"{name}: it is large; its first {LIMIT:,} rows were looked at, prepare looks at all")
    return notes + checked.warnings


def _find(given: str, name: str | None, key: str) -> tuple[Path, dict[str, Any]]:
    """The data file and what a dataset_info.json says of it."""
    path = Path(given).expanduser().absolute()
    if not path.exists():
        raise PkuslurmError(f"dataset.path={given}: there is no such file or folder{nearest_to(path)}")
    entry: dict[str, Any] = {}
    if path.name == "dataset_info.json":
        path = path.parent
    if path.is_dir():
        described = path / "dataset_info.json"
        path, entry = _described(described, name, key) if described.is_file() else (_only_file(path), {})
        if path.is_dir() and len(_files(path)) > 1:  # LLaMA-Factory reads them all
            return path, entry
    if path.is_dir():
        path = _only_file(path)
    if not path.exists():
        raise PkuslurmError(f"dataset.path={given}: {path} is not there")
    if not path.is_file():
        raise PkuslurmError(f"dataset.path={given}: {path} is no plain file")
    suffix = path.suffix.lower()
    if suffix in _REMEDIES:
        raise PkuslurmError(f"dataset.path={path}: {suffix} cannot be trained on; {_REMEDIES[suffix]}")
    if suffix not in READERS:
        raise PkuslurmError(f"dataset.path={path}: data comes as {', '.join(READERS)}; name it by its form")
    if path.stat().st_size == 0:
        raise PkuslurmError(f"dataset.path={path}: the file is empty")
    return path, entry


def _described(described: Path, name: str | None, key: str) -> tuple[Path, dict[str, Any]]:
    try:
        entries = json.loads(described.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise PkuslurmError(f"dataset.path={described}: it is not JSON ({error})") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise PkuslurmError(f"dataset.path={described}: it must hold an object of objects, one for each dataset")
    if name is None and len(entries) == 1:
        name = next(iter(entries))
    if name not in entries:
        names = ", ".join(list(entries)[:12]) + (", …" if len(entries) > 12 else "")
        if name is None:
            raise PkuslurmError(f"{key}: {described} describes {names or 'nothing'}; name one by dataset.name")
        near = difflib.get_close_matches(name, entries, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise PkuslurmError(f"{key}={name}: {described} describes {names or 'nothing'}; it has no such dataset{hint}")
    entry = dict(entries[name])
    url = next((one for one in _URLS if one in entry), None)
    if url is not None:
        raise NotHere(
            f"{key}={name}: {described} has it at {url}={entry[url]}, and nothing is downloaded here; "
            "download it and give the file: dataset.path=…"
        )
    if not isinstance(entry.get("file_name"), str):
        raise PkuslurmError(f"{key}={name}: its entry in {described} has no file_name")
    for part in ("columns", "tags"):
        if part in entry and not isinstance(entry[part], dict):
            raise PkuslurmError(f"{key}={name}: {part} of its entry in {described} must be an object")
    return described.parent / entry.pop("file_name"), entry | {"name": name}


def _files(folder: Path, suffixes: Collection[str] = READERS) -> list[Path]:
    there = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    return [file for file in there if file.suffix.lower() in suffixes]


def _only_file(folder: Path) -> Path:
    files = _files(folder)
    if not files:
        files = _files(folder, _REMEDIES)
    if len(files) == 1:
        return files[0]
    below = [file for file in sorted(folder.glob("*/*")) if file.suffix.lower() in READERS] if not files else []
    names = ", ".join(str(file.relative_to(folder)) for file in (files or below)[:8]) or "none"
    raise PkuslurmError(f"dataset.path={folder}: one data file is wanted there, found {names}; name the file")
