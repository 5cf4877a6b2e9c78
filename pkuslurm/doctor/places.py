"""The folders that runs, caches and memory lie in, and the user's defaults for them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pkuslurm.doctor import machine
from pkuslurm.doctor.check import Check
from pkuslurm.read import find
from pkuslurm.read.text import size

# less is soon full: the demo takes 0.2 GiB, a merged model of 1.5B parameters 3 GiB
LITTLE_DISK = 5 << 30


def folders(environ: Mapping[str, str], chosen: Mapping[str, Any]) -> Iterator[Check]:
    """The folders that runs write to: writable, and with room. ``chosen``: of a site's defaults.yaml."""
    home = environ.get("HOME") or os.path.expanduser("~")  # without HOME the user database tells
    root = environ.get("PKUSLURM_RUN_ROOT") or text(chosen, "run_root")
    yield _folder("run_root", Path(root or Path(environ.get("WORK_DIR") or ".", "runs")), "run_root=", True)
    cache = environ.get("PKUSLURM_CACHE") or text(chosen, "cache_root") or f"{home}/.cache/pkuslurm"
    yield _folder("cache_root", Path(cache), "PKUSLURM_CACHE=", True)
    if environ.get("HOME"):
        yield _folder("HOME", Path(home), "HOME=", False)
    else:
        yield Check("HOME", False, f"not set, {home} is taken", "set HOME to your home directory")
    state = find.state_file(environ)
    if state is None:
        yield Check(
            "state directory", False, "HOME and XDG_STATE_HOME are not set", "runs are found by --run-root only"
        )
    else:
        yield _folder("state directory", state.parent, "XDG_STATE_HOME=", False)


def _folder(name: str, path: Path, setting: str, needed: bool) -> Check:
    path = Path(os.path.abspath(os.path.expanduser(path)))
    there = machine.existing(path)
    kind = machine.file_system(path)
    notes = [kind, "" if there == path else "will be made"]
    if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
        return Check(name, False, f"{path}: {there} is not writable ({kind})", f"{setting} a folder that is", needed)
    used = shutil.disk_usage(there)
    detail = f"{path}: {size(used.free)} free, {', '.join(filter(None, notes))}"
    if name in ("run_root", "cache_root"):
        if kind in machine.IN_MEMORY:
            return Check(
                name, False, f"{detail}: it is lost at a restart and takes memory", f"{setting} a folder on a disk"
            )
        if used.free < LITTLE_DISK:
            return Check(name, False, detail, "`pkuslurm prune` shows what can go, or choose another disk")
        if kind in machine.NETWORK:
            detail += ": fine for runs; another node may see a file some seconds late"
    return Check(name, True, detail)


def defaults(environ: Mapping[str, str]) -> dict[str, Any]:
    """The user's defaults.yaml, where there is one: ./conf, the user's, the group's; the first that has a key wins."""
    found: dict[str, Any] = {}
    for folder in _conf(environ):
        found = _yaml(folder / "defaults.yaml") | found
    return found


def python(environ: Mapping[str, str], chosen: Mapping[str, Any]) -> str | None:
    """cluster.python of the defaults, or of the preset of one's own that they choose."""
    named = text(chosen, "cluster", "python")
    preset = chosen.get("cluster")
    if named is None and isinstance(preset, str) and "/" not in preset:
        for folder in _conf(environ):
            content = _yaml(folder / "cluster" / f"{preset}.yaml")
            named = named or text(content, "python") or text(content, "cluster", "python")  # @package _global_
    return named


def _conf(environ: Mapping[str, str]) -> list[Path]:
    folders = [Path("conf")]
    folders += [Path(environ["HOME"], ".config/pkuslurm/conf")] if environ.get("HOME") else []
    return [*folders, Path(environ["PKUSLURM_CONF"])] if environ.get("PKUSLURM_CONF") else folders


def _yaml(file: Path) -> dict[str, Any]:
    """What the file holds; nothing where it cannot be read: launch refuses that in words."""
    if not file.is_file():
        return {}
    import yaml

    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def text(value: Mapping[str, Any], *names: str) -> str | None:
    """A value by its keys, nested or as one dotted key; not one that waits for Hydra."""
    inner: Any = value.get(".".join(names))
    if inner is None:
        inner = value
        for name in names:
            inner = inner.get(name) if isinstance(inner, Mapping) else None
    return inner if isinstance(inner, str) and "${" not in inner else None
