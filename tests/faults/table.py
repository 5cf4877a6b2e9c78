"""The table in docs/reliability.md, out of results.json. By hand, after an edit: python -m tests.faults.table"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- rows: written by make test-faults -->\n", "<!-- end of rows -->\n"
# the fault matrix; numbers that are not here it does not have
MATRIX = [*range(1, 22), 23, 24, 25, 27, 28, 30, 32, 34, 35, 36, 38, 39, 40, 42, 44]
HEAD = """\
| # | fault | what is promised | final state | s | lost, repeated | left over | alone |
|---|---|---|---|---|---|---|---|
"""
# why a number of the matrix, or a part of it, has no row
NOT_RUN = {
    "18 by the kernel": "OUT_OF_MEMORY needs a memory cgroup, which the test cluster has not; a child is killed",
}

Json = dict[str, Any]


def load() -> Json:
    try:
        found: Json = json.loads(RESULTS.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"rows": {}}
    return found


def save(results: Json) -> None:
    """Both files; rows whose test is no longer there go."""
    there = {}
    for nodeid, values in sorted(results["rows"].items()):
        path, _, name = nodeid.partition("::")
        file = RESULTS.parents[2] / path
        if file.exists() and f"def {name.partition('[')[0]}(" in file.read_text(encoding="utf-8"):
            there[nodeid] = values
    results["rows"] = there
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write(results)


def write(results: Json) -> None:
    before, begin, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{DOCUMENT} has no place for the rows"
    DOCUMENT.write_text(before + begin + text(results) + end + after, encoding="utf-8")


def text(results: Json) -> str:
    """With the rows that results.json has, and those of tests/ that it has not."""
    rows = sorted(results["rows"].items(), key=lambda pair: (_order(pair[1]["number"]), pair[0]))
    run = [(nodeid, values) for nodeid, values in rows if values["outcome"] != "skipped"]
    dates = sorted({values["date"] for _, values in run})
    when = "" if not dates else dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    failed = sum(values["outcome"] == "failed" for _, values in run)
    lines = [
        f"{len(run)} rows, {failed} failed; {when}, Slurm {results.get('slurm')}, {results.get('machine')}.\n\n",
        HEAD,
        *(_line(nodeid, values) for nodeid, values in run),
        "\nNot run:\n\n",
        *(f"- {what}: {why}\n" for what, why in _not_run(rows)),
    ]
    if "soak" in results:
        lines.append(f"\nSoak (`make soak`), {results['soak']}\n")
    return "".join(lines)


def _line(nodeid: str, values: Json) -> str:
    name = nodeid.rpartition("::")[2]
    state = values.get("state", "–") if values["outcome"] == "passed" else f"**FAILED**: {values.get('why', '')}"
    name, _, case = name.partition("[")
    cells = [
        values["number"] + ("*" if values.get("quick") else ""),
        values["fault"] + (f" ({case.rstrip(']')})" if case else ""),
        values["promise"],
        state,
        str(values.get("seconds", "–")),
        values.get("steps", "–"),
        values.get("left", "–"),
    ]
    plain = " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in cells)
    return f'| {plain} | `make test-faults ARGS="-k {name}"` |\n'


def _not_run(rows: list[tuple[str, Json]]) -> list[tuple[str, str]]:
    there = {nodeid.partition("[")[0] for nodeid, _ in rows}
    skipped = [(f"{v['number']} {v['fault']}", v.get("why") or "skipped") for _, v in rows if v["outcome"] == "skipped"]
    known = declared()
    missing = [f"{number} {fault}" for nodeid, (number, fault) in sorted(known.items()) if nodeid not in there]
    without = [str(number) for number in MATRIX if str(number) not in {number for number, _ in known.values()}]
    return [
        *NOT_RUN.items(),
        *skipped,
        *((what, "not in the sessions that this table is made of") for what in missing),
        *([(", ".join(without), "no test")] if without else []),
    ]


def declared() -> dict[str, tuple[str, str]]:
    """Number and fault of every row that there is, by its test's id."""
    found = {}
    for file in sorted((RESULTS.parents[2] / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.row":
                    number, fault = (str(ast.literal_eval(one)) for one in mark.args[:2])
                    found[f"{file.relative_to(RESULTS.parents[2])}::{node.name}"] = (number, fault)  # type: ignore[union-attr]
    return found


def _order(number: str) -> tuple[bool, str, int]:
    letters, digits = re.match(r"(\D*)(\d*)", number).groups()  # type: ignore[union-attr]
    return bool(letters), letters, int(digits or 0)


if __name__ == "__main__":
    save(load())
