"""What encoding a text is in. Chinese Windows writes GB18030, Excel a byte order mark; LLaMA-Factory reads UTF-8."""

from __future__ import annotations

import codecs
import io
from pathlib import Path
from typing import IO

# up to here a file is read in one go; beyond, it streams
SMALL = 64_000_000
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
NAMES = {"utf-8-sig": "UTF-8 with a byte order mark", "utf-16": "UTF-16", "utf-32": "UTF-32", "gb18030": "GB18030"}


class BadData(Exception):
    """What is wrong with the file, in one line that names the row and what to do."""


def open_text(path: Path, size: int) -> tuple[IO[str], str, str | None]:
    """A stream of the text, its encoding, and the whole text where the file is small."""
    if size <= SMALL:
        data = path.read_bytes()
        encoding, text = decode(path, data)
        return io.StringIO(text, newline=""), encoding, text
    with path.open("rb") as binary:
        encoding, _ = decode(path, binary.read(1 << 20), whole=False)
    return path.open(encoding=encoding, newline=""), encoding, None


def decode(path: Path, data: bytes, whole: bool = True) -> tuple[str, str]:
    """The encoding's name and the text. GB18030 is what Chinese Windows writes; UTF-8 wins where both fit."""
    if data.startswith(b"PK\x03\x04"):
        raise BadData(f"{path}: it is an Excel or zip file in spite of its name; save it as CSV UTF-8, or unpack it")
    marked = next((name for mark, name in _BOMS if data.startswith(mark)), None)
    for encoding in (marked,) if marked else ("utf-8", "gb18030"):
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(data, whole)
        except UnicodeDecodeError:
            continue
        if "\0" in text[:1000]:
            break
        return encoding, text
    raise BadData(f"{path}: it is neither UTF-8 nor GB18030 (a binary file?); save it as UTF-8")
