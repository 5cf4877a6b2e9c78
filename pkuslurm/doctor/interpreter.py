"""What a Python has installed, read from its folders: nothing of it is imported, torch takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

SECONDS = 5.0
_PROBE = (
    "import json, sys; print(json.dumps([sys.version.split()[0], sys.implementation.cache_tag, sys.path, sys.prefix]))"
)


@dataclass(frozen=True)
class Python:
    """An interpreter: its program, version, the tag in its bytecode's names, where it looks for modules."""

    program: str
    version: str
    tag: str
    path: tuple[str, ...]
    prefix: str


def own() -> Python:
    tag = sys.implementation.cache_tag or ""
    return Python(sys.executable, sys.version.split()[0], tag, tuple(filter(None, sys.path)), sys.prefix)


def look(program: str) -> Python | str:
    """The interpreter ``program``, or in words why it is none."""
    try:
        if Path(program).samefile(sys.executable) and Path(program).parent == Path(sys.executable).parent:
            return own()
        done = subprocess.run(
            [program, "-c", _PROBE], capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL, cwd="/"
        )
        version, tag, path, prefix = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return f"it did not answer within {SECONDS:.0f} s"
    except OSError as error:
        return error.strerror or str(error)
    except (ValueError, TypeError):
        return "it is no Python that answers"
    return Python(program, str(version), str(tag), tuple(part for part in path if part and part != "/"), str(prefix))


def distribution(python: Python, name: str) -> metadata.Distribution | None:
    """The installed distribution ``name``; None where there is none."""
    return next(iter(metadata.Distribution.discover(name=name, path=list(python.path))), None)


def versions(python: Python, names: Sequence[str]) -> dict[str, str]:
    """Of ``names`` those that are installed, with their versions."""
    found = {name: distribution(python, name) for name in names}
    return {name: one.version for name, one in found.items() if one is not None}


def unfit(python: Python, of: str, names: Sequence[str]) -> list[str]:
    """Which of ``names`` the distribution ``of`` does not want as they are: ``transformers 5.9 (wants <=5.6)``."""
    from packaging.requirements import InvalidRequirement, Requirement

    wanted = distribution(python, of)
    wrong = []
    for line in (wanted.requires or []) if wanted else []:
        try:
            need = Requirement(line)
            there = distribution(python, need.name) if need.name.lower() in names else None
            applies = need.marker is None or need.marker.evaluate({"extra": ""})
        except (InvalidRequirement, ValueError):
            continue
        if there is not None and applies and not need.specifier.contains(there.version, prereleases=True):
            wrong.append(f"{need.name} {there.version} (wants {need.specifier})")
    return wrong


def bytecode(python: Python, packages: Sequence[str]) -> tuple[int, int]:
    """How many modules of ``packages`` there are, and how many of them have bytecode for this interpreter."""
    modules = compiled = 0
    for package in packages:
        for folder in python.path:
            root = os.path.join(folder, package)
            if os.path.isdir(root):
                for sources, ready in _modules(root, f".{python.tag}.pyc"):
                    modules, compiled = modules + sources, compiled + ready
                break
    return modules, compiled


def _modules(root: str, suffix: str) -> Iterator[tuple[int, int]]:
    waiting = [root]
    while waiting:
        folder, names, ready = waiting.pop(), [], set[str]()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith(".py"):
                        names.append(entry.name[:-3])
                    elif entry.name == "__pycache__":
                        ready = {name.removesuffix(suffix) for name in os.listdir(entry.path) if name.endswith(suffix)}
                    elif "." not in entry.name and entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except OSError:
            continue
        yield len(names), sum(name in ready for name in names)
