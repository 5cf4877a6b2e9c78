"""The LLaMA-Factory that an interpreter has, found by its files: nothing is imported, no program is started."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from pkuslurm.config.llamafactory import Keys, snapshot
from pkuslurm.config.pair_rules import Context
from pkuslurm.config.schema import Config
from pkuslurm.errors import PkuslurmError
from pkuslurm.preflight.arguments import keys_of


def look(config: Config) -> Context:
    """What is known here of the LLaMA-Factory that will run: its keys, and what is installed beside it.

    In an image (container.llamafactory says its version), or where this machine has none, that is less, or nothing.
    A dry run asks for no packages: it may be made on another machine.
    """
    deepspeed = deepspeed_config(config.train.get("deepspeed"))
    if config.container.runtime != "none":
        version = config.container.llamafactory
        return Context(config.cluster.accelerator, snapshot(version) if version else None, deepspeed)
    name = config.cluster.python
    keys, there = _beside(sys.executable if name is None else shutil.which(os.path.expanduser(name)) or name)
    return Context(config.cluster.accelerator, keys, deepspeed, None if config.dry_run else there)


@cache
def _beside(python: str) -> tuple[Keys | None, Mapping[str, str] | None]:
    folders = packages_of(python)
    keys = keys_of(folders)
    return keys, installed(folders) if keys is not None else None


def packages_of(python: str) -> list[Path]:
    """The folders that ``python`` imports from, as its files tell: a virtual environment's, what it lies over, conda's.

    The path itself counts first, then its links one by one: resolved at once, a venv's python leads out of the venv.
    """
    program = Path(os.path.abspath(os.path.expanduser(python)))
    for _ in range(10):
        found = _prefix_packages(program.parent.parent, program)
        if found:
            return found
        if not program.is_symlink():
            return []
        program = Path(os.path.abspath(program.parent / program.readlink()))
    return []


def installed(folders: Sequence[Path]) -> dict[str, str]:
    """{name: version} of the distributions there, names as in PyPI's simple index (lower case, dashes)."""
    found: dict[str, str] = {}
    for folder in folders:
        for entry in [*folder.glob("*.dist-info"), *folder.glob("*.egg-info")]:
            name, _, version = entry.stem.partition("-")
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    return found


def check_deepspeed(value: object) -> None:
    """Raise PkuslurmError if train.deepspeed names a file that is not there, or holds no configuration."""
    if isinstance(value, str) and value and deepspeed_config(value) is None:
        wrong = "it must be a JSON object" if Path(value).expanduser().is_file() else "there is no such file"
        raise PkuslurmError(f"train.deepspeed={value}: {wrong}; give DeepSpeed's JSON configuration")


def deepspeed_config(value: object) -> Mapping[str, Any] | None:
    """What train.deepspeed says: {…} itself, or a file's content. None: nothing, or it cannot be read."""
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, str) or not value:
        return None
    with suppress(OSError, ValueError):
        content = json.loads(value if value.startswith("{") else Path(value).expanduser().read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else None
    return None


def _prefix_packages(prefix: Path, program: Path) -> list[Path]:
    number = re.fullmatch(r"python(3\.\d+)", Path(os.path.realpath(program)).name)
    version = f"python{number.group(1)}" if number else "python3.*"
    patterns = [f"lib/{version}/site-packages"]
    if not (prefix / "lib64").is_symlink():
        patterns.append(f"lib64/{version}/site-packages")
    settings = _pyvenv(prefix / "pyvenv.cfg")
    if settings is None:  # a distribution's own python
        patterns += [f"local/lib/{version}/dist-packages", "lib/python3/dist-packages", f"lib/{version}/dist-packages"]
    found: list[Path] = []
    for pattern in patterns:
        for folder in sorted(prefix.glob(pattern)):
            found += [path for path in (folder, *_pth(folder)) if path not in found]
    if settings and settings.get("include-system-site-packages", "").lower() == "true" and "home" in settings:
        home = Path(settings["home"])
        found += [path for path in _prefix_packages(home.parent, home / program.name) if path not in found]
    return found


def _pyvenv(file: Path) -> dict[str, str] | None:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    pairs = (line.partition("=") for line in lines)
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def _pth(folder: Path) -> Iterator[Path]:
    """Folders that .pth files add: overlays and editable installations."""
    for file in sorted(folder.glob("*.pth")):
        with suppress(OSError, UnicodeDecodeError):
            for line in file.read_text(encoding="utf-8").splitlines():
                finder = re.match(r"import (__editable___\w+_finder)\b", line)
                if finder:
                    yield from _editable(folder / f"{finder.group(1)}.py")
                elif line.strip() and not line.startswith(("#", "import ", "import\t")):
                    path = folder / line.strip()
                    if path.is_dir():
                        yield path


def _editable(finder: Path) -> Iterator[Path]:
    """setuptools' editable installations name their packages in a dictionary of a generated module."""
    with suppress(OSError, SyntaxError, ValueError):
        for node in ast.walk(ast.parse(finder.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "MAPPING"
            if named and isinstance(node, ast.AnnAssign) and node.value is not None:
                yield from {Path(path).parent for path in ast.literal_eval(node.value).values()}
