"""The rows of a data file, one after another, whatever its form and encoding; and the file written anew as UTF-8 lines
of JSON where LLaMA-Factory would not read it, or not rightly. Standard library; pyarrow where it is installed."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .encoding import NAMES, SMALL, BadData, open_text

__all__ = ["READERS", "SMALL", "BadData", "Row", "Table", "convert", "open_table"]

Row = dict[str, Any]

# forms that LLaMA-Factory knows by these very suffixes; others are converted
KNOWN = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt")
READERS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text",
    ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
_SPACE = re.compile(r"\s*")


@dataclass
class Table:
    """``rows`` can be walked once, and raises BadData where the file is broken. ``convert``: why LLaMA-Factory cannot
    be given the file itself, in words ("" if it can). ``total`` tells the number of rows after so many were walked, if
    it can.
    """

    rows: Iterator[Row]
    convert: str = ""
    size: int = 0
    total: Callable[[int], int | None] = lambda walked: None
    stream: IO[Any] | None = None

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()


def open_table(path: Path) -> Table | None:
    """The rows of ``path``; None for a form that needs a library which is not here. Raises BadData."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadData(f"{path}: data comes as {', '.join(READERS)}")
    try:
        size = path.stat().st_size
        table = _columnar(path, reader) if reader in ("parquet", "arrow") else _textual(path, reader, size)
    except OSError as error:
        raise BadData(f"{path}: it cannot be read ({error.strerror})") from None
    if table is not None:
        table.size = size
        if path.suffix not in KNOWN:
            table.convert = table.convert or f"{path.suffix} is no suffix that LLaMA-Factory knows"
    return table


def convert(path: Path, target: Path, keep: Collection[str], absent: Collection[str]) -> None:
    """Write ``path`` as UTF-8 lines of JSON, all or nothing: the columns ``keep``. Empty cells of a CSV become "" (a
    column of nulls only has no type), but in ``absent`` they stay null. Raises BadData, OSError.
    """
    table = open_table(path)
    if table is None:
        raise BadData(f"{path}: it cannot be converted here; save it as UTF-8 jsonl")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    plain = READERS[path.suffix.lower()] in ("csv", "text")
    try:
        with (
            closing(table),
            os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream,
        ):
            for row in table.rows:
                kept = {key: row.get(key) for key in keep}
                if plain:
                    kept = {key: "" if kept[key] is None and key not in absent else kept[key] for key in kept}
                stream.write(json.dumps(kept, ensure_ascii=False) + "\n")
        os.chmod(name, 0o666 & (target.parent.stat().st_mode | 0o600))
        os.replace(name, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _textual(path: Path, reader: str, size: int) -> Table:
    stream, encoding, text = open_text(path, size)
    if text is None and encoding == "utf-8" and reader == "json" and _first_character(stream) != "[":
        stream.close()
        binary = path.open("rb")
        rows = _guarded(path, _objects(path, _lines(path, binary), "line"))
        return Table(rows, total=lambda walked: walked + _count(binary), stream=binary)
    table = _rows_of_text(path, reader, stream, encoding, text)
    table.stream = stream
    return table


def _rows_of_text(path: Path, reader: str, stream: IO[str], encoding: str, text: str | None) -> Table:
    rows: Iterator[Row]
    why = f"it is {NAMES[encoding]}" if encoding in NAMES else ""
    if reader == "csv":
        return Table(_guarded(path, _csv(path, stream)), why or "numbers and words like NA would not stay text")
    if reader == "text":
        blank = any(not line.strip() for line in text.rstrip("\n").split("\n")) if text is not None else False
        rows = ({"text": line.rstrip("\r\n")} for line in stream if line.strip())
        return Table(_guarded(path, rows), why or ("blank lines are left out" if blank else ""))
    start = _first_character(stream)
    if start == "[":
        if text is not None:
            return Table(_objects(path, iter(_whole(path, text)), "row"), why)
        return Table(_guarded(path, _objects(path, _elements(path, stream), "row")), why)
    if text is not None and start == "{" and not _is_json(text.lstrip().split("\n", 1)[0]) and _is_json(text):
        return Table(_objects(path, iter([json.loads(text)]), "row"), why or "it is one object over many lines")
    return Table(_guarded(path, _objects(path, _lines(path, stream), "line")), why)


def _guarded(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    number = 0
    try:
        for number, row in enumerate(rows, 1):  # noqa: B007 (needed where it breaks off)
            yield row
    except UnicodeDecodeError as error:
        raise BadData(f"{path}: after row {number} it is not {error.encoding} any more; save it as UTF-8") from None
    except OSError as error:
        raise BadData(f"{path}: it cannot be read ({error.strerror})") from None


def _first_character(stream: IO[str]) -> str:
    start = stream.read(4096).lstrip()[:1]
    stream.seek(0)
    return start


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _whole(path: Path, text: str) -> list[Any]:
    try:
        rows: list[Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadData(f"{path}: it is not JSON ({_where(error)})") from None
    return rows


def _where(error: Exception) -> str:
    """One position: the number of characters before it says nothing to anybody."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}: line {error.lineno}, column {error.colno}"
    return str(error)


def _lines(path: Path, stream: IO[Any]) -> Iterator[Any]:
    # not splitlines(): U+2028 inside a text ends no line of JSON
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except UnicodeDecodeError:
                raise BadData(f"{path}: line {number} is not UTF-8; save it as UTF-8") from None
            except (ValueError, RecursionError) as error:
                problem = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise BadData(f"{path}: line {number} is not JSON ({problem})") from None


def _elements(path: Path, stream: IO[str]) -> Iterator[Any]:
    """The elements of a list too large to be held at once."""
    decoder, block = json.JSONDecoder(), 1 << 20
    text, at, number = stream.read(block), 0, 0
    at = text.index("[") + 1
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        try:
            if text[at : at + 1] == "]":
                break
            start = at
            if number:
                if text[at : at + 1] not in (",", ""):
                    break
                start = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
            value, at = decoder.raw_decode(text, start)
        except ValueError as error:
            more = stream.read(block)
            if not more:
                raise BadData(f"{path}: row {number + 1} is not JSON ({error.args[0].split(':')[0]})") from None
            text, at, block = text[at:] + more, 0, block * 2
            continue
        number, block = number + 1, 1 << 20
        yield value
    if text[at : at + 1] != "]" or (text[at + 1 :] + stream.read(block)).strip():
        raise BadData(f"{path}: after row {number} it is not JSON")


def _count(stream: IO[bytes]) -> int:
    """Lines from where the stream is to its end."""
    lines, last = 0, b"\n"
    while block := stream.read(1 << 20):
        lines, last = lines + block.count(b"\n"), block[-1:]
    return lines + (last != b"\n")


def _objects(path: Path, values: Iterator[Any], where: str) -> Iterator[Row]:
    """``values``, all of which must be objects; one alone that only wraps the rows is told."""
    alone: Row | None = None
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise BadData(f"{path}: {where} {number} is no object {{…}}")
        if number == 1:
            alone = value
            continue
        if alone is not None:
            yield alone
            alone = None
        yield value
    if alone is not None:
        lists = [key for key, item in alone.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
        if lists and not any({"from", "role"} & alone[key][0].keys() for key in lists):
            raise BadData(f"{path}: its rows are inside {lists[0]!r}; the file must be the list itself")
        yield alone


def _csv(path: Path, stream: IO[str]) -> Iterator[Row]:
    """Rows of a CSV file; an empty cell is None."""
    csv.field_size_limit(1 << 30)
    header = stream.readline()
    stream.seek(0)
    # Excel writes ; where the comma is the decimal sign, and tabs as "Unicode text"
    separator = max(",;\t", key=header.count)
    if "，" in header and separator not in header:
        raise BadData(f"{path}: its header has ， (full-width) between the columns; write plain commas there")
    reader = csv.DictReader(stream, delimiter=separator, strict=True)
    number = 0
    try:
        for number, row in enumerate(reader, 1):
            if None in row:
                raise BadData(
                    f"{path}: row {number} (line {reader.line_num}) has more cells than the header; "
                    f"put a text with {separator!r} in it into double quotes"
                )
            yield {key: value or None for key, value in row.items()}
    except csv.Error as error:
        raise BadData(f"{path}: row {number + 1} is not CSV ({error})") from None


def _columnar(path: Path, reader: str) -> Table | None:
    try:
        arrow = importlib.import_module("pyarrow")
        parquet, ipc = importlib.import_module("pyarrow.parquet"), importlib.import_module("pyarrow.ipc")
    except ImportError:
        return None
    broken = (arrow.ArrowException, OSError)
    try:
        path.open("rb").close()
        if reader == "parquet":
            file = parquet.ParquetFile(path)
            number = int(file.metadata.num_rows)
            return Table(_batches(path, reader, file.iter_batches(batch_size=1000), broken), total=lambda _: number)
        try:
            batches = iter(ipc.open_stream(arrow.memory_map(str(path))))
        except arrow.ArrowInvalid:
            whole = ipc.open_file(arrow.memory_map(str(path)))
            batches = (whole.get_batch(number) for number in range(whole.num_record_batches))
        return Table(_batches(path, reader, batches, broken))
    except PermissionError:
        raise
    except broken as error:
        raise BadData(f"{path}: it cannot be read as {reader} ({str(error).splitlines()[0]})") from None


def _batches(path: Path, reader: str, batches: Iterator[Any], broken: tuple[type[Exception], ...]) -> Iterator[Row]:
    try:
        for batch in batches:
            yield from batch.to_pylist()
    except broken as error:
        raise BadData(f"{path}: it cannot be read as {reader} ({str(error).splitlines()[0]})") from None
