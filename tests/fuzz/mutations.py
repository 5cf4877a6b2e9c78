"""Ways in which text and JSON arrive damaged: torn, mixed up, of another version, or from somebody who means harm."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# PKUSLURM_FUZZ=50: so many times as many examples (make test-faults)
TIMES = int(os.environ.get("PKUSLURM_FUZZ", "1"))


def examples(count: int) -> settings:
    """``count`` examples in an ordinary run."""
    quiet = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large)
    return settings(max_examples=count * TIMES, deadline=None, suppress_health_check=quiet)


WORDS = (
    *(
        "",
        " ",
        "|",
        "||||||||||||",
        "\0",
        "\x1b]0;x\x07",
        "\u202eDETELPMOC",
        "\u2028",
        "\ufeff",
        "²",
        "٣",
        "-1",
        "0",
        "1e9",
    ),
    *("9" * 30, "9" * 5000, "COMPLETED", "COMPLETED+", "completed", "CD", "RUNNING", "FAILED by 0", "NEW_STATE"),
    *("N/A", "Unknown", "(null)", "None", "UNLIMITED", "0:0", "0:0:0", "9" * 5000 + ":0", "0:" + "9" * 5000, "3:٣"),
    *("0001-01-01T00:00:00", "9999-12-31T23:59:59", "2026-13-41T99:99:99", "2026-11-24T09:00:00Z", "2026-W01-1"),
    *("12_[0-3%1]", "12_[", "12_[0-4000]", "12_[9-1]", "12_1", "12+1", "12.batch", "n[1-99999999]", "n[1-2,[3]]"),
    *("PartitionName=", "PartitionName=x MaxTime=9-9-9 MaxNodes=²", "MaxArraySize = " + "9" * 5000, "SLURM_VERSION ="),
    *("gpu:a100:" + "9" * 5000, "gpu:²", "npu:4(S:0-1", "$(touch x)", "<script>alert(1)</script>"),
)
DELIMITERS = (",", "\t", ";", " ", "\x1f", "||")


@st.composite
def damaged(draw: st.DrawFn, recorded: str, delimiter: str = "|") -> str:
    """A recorded text after one to four accidents."""
    text = recorded
    for _ in range(draw(st.integers(1, 4))):
        text = draw(st.sampled_from(ACCIDENTS))(draw, text, delimiter)
    return text


def _torn(draw: st.DrawFn, text: str, delimiter: str) -> str:
    return text[: draw(st.integers(0, len(text)))]


def _headless(draw: st.DrawFn, text: str, delimiter: str) -> str:
    return text[draw(st.integers(0, len(text))) :]


def _junk(draw: st.DrawFn, text: str, delimiter: str) -> str:
    at = draw(st.integers(0, len(text)))
    return text[:at] + draw(st.one_of(st.sampled_from(WORDS), st.text(max_size=8))) + text[at:]


def _other_delimiter(draw: st.DrawFn, text: str, delimiter: str) -> str:
    return text.replace(delimiter, draw(st.sampled_from(DELIMITERS)))


def _lines(draw: st.DrawFn, text: str, delimiter: str) -> str:
    """Lines lost, twice, in another order, with a header before each."""
    lines = text.split("\n")
    kept = draw(st.lists(st.sampled_from(lines), max_size=8))
    header = delimiter.join(("JOBID", "STATE", "START_TIME", "END_TIME", "NODELIST", "USER", "REASON", "NAME"))
    return "\n".join([header, *kept] if draw(st.booleans()) else kept)


def _field(draw: st.DrawFn, text: str, delimiter: str) -> str:
    """One column of one line is another, is missing, or stands twice."""
    lines = text.split("\n")
    at = draw(st.integers(0, len(lines) - 1))
    fields = lines[at].split(delimiter)
    column = draw(st.integers(0, len(fields) - 1))
    word = draw(st.one_of(st.sampled_from(WORDS), st.sampled_from(fields), st.text(max_size=6)))
    fields[column : column + draw(st.integers(0, 2))] = [word] * draw(st.integers(0, 2))
    lines[at] = delimiter.join(fields)
    return "\n".join(lines)


def _characters(draw: st.DrawFn, text: str, delimiter: str) -> str:
    """Read in another encoding, with the line ends of another system."""
    ways: tuple[Callable[[str], str], ...] = (
        lambda one: one.encode("utf-16", "replace").decode("utf-8", "replace"),
        lambda one: one.replace("\n", "\r\n"),
        lambda one: one.encode("utf-8", "surrogatepass").decode("latin-1"),
        str.swapcase,
    )
    return draw(st.sampled_from(ways))(text)


ACCIDENTS = (_torn, _headless, _junk, _other_delimiter, _lines, _field, _field, _field, _characters)

# a hundred thousand brackets, each in another; in full only where it is written
DEEP = {"@LISTS@": "[" * 100_000, "@OBJECTS@": '{"a":' * 100_000, "@NUMBER@": "9" * 5000}
# what stands in a file instead of a value; each is JSON, or was once
VALUES = (
    *("null", "true", "false", "0", "-1", "1", "1e999", "-1e999", "NaN", "Infinity", "1.5", "9" * 400, "@NUMBER@"),
    *('""', '"x"', '"\\ud800"', '"\\u0000"', '"\\u001b[31m"', '"../../../etc/passwd"', '"COMPLETED"', '"RUNNING"'),
    *('"/dev/zero"', '"0001-01-01T00:00:00"', '"9999-12-31T23:59:59+00:00"', '"<script>alert(1)</script>"'),
    *("[]", "{}", "[null]", "[[]]", '{"": null}', '[{"path": "\\u0000"}]', '[{"path": "\\ud800"}]', '{"a": {"a": 1}}'),
    *("@LISTS@", "@OBJECTS@", "[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]"),
)


def spelled(text: str) -> str:
    """``text`` with what DEEP stands for."""
    for short, long in DEEP.items():
        text = text.replace(short, long)
    return text


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, itself included."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


def put(value: Any, path: tuple[Any, ...], raw: str) -> str:
    """The JSON text of ``value`` with ``raw`` at ``path``, be it JSON or not."""
    mark = "@@HERE@@"
    if not path:
        return raw
    whole = json.loads(json.dumps(value))
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = mark
    return json.dumps(whole, ensure_ascii=False).replace(f'"{mark}"', raw)


@st.composite
def damaged_json(draw: st.DrawFn, text: str) -> str:
    """A JSON file's text: cut off, a byte changed, or another value, twice or not at all, somewhere in it."""
    value = json.loads(text)
    way = draw(st.integers(0, 5))
    if way == 0:
        return text[: draw(st.integers(0, len(text.rstrip()) - 1))]
    if way == 1:
        at = draw(st.integers(0, len(text) - 1))
        return text[:at] + draw(st.sampled_from(("\0", "9", '"', "}", "\ufffd", "e", "-", "\n"))) + text[at + 1 :]
    everywhere = list(places(value))
    path = draw(st.sampled_from(everywhere))
    if way == 2:
        return put(value, path, draw(st.sampled_from(VALUES)) + "," + json.dumps("twice") + ': "x"') if path else "{}"
    return put(value, path, draw(st.sampled_from(VALUES)))
