"""The report for somebody else: the same page, without who, where and on which machines."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from pkuslurm.read.job import JobStatus
from pkuslurm.read.report.facts import Facts
from pkuslurm.rundir import RunDir, read_json

# Parts of paths that say nothing about anybody and are words of their own.
COMMON = {
    *("home", "tmp", "var", "data", "data1", "data2", "usr", "opt", "mnt", "srv", "etc", "dev", "proc", "lib"),
    *("bin", "work", "scratch", "share", "shared", "lustre", "gpfs", "public", "users", "group", "groups"),
    *("runs", "run", "conf", "models", "model", "datasets", "dataset", "cache", "jobs", "logs", "state", "done"),
    *("adapter", "merged", "results", "python", "python3", "site-packages", "localhost", "127.0.0.1"),
}
# settings that say nothing but where, and those whose values are somebody's
DROPPED = ("run_root", "cache_root")
HIDDEN = ("name", "cluster.account", "cluster.env")
# an environment value shorter than this (1, true, offline) is no secret, and a word that may stand anywhere
LONG_VALUE = 12

_PATH = re.compile(r"(?<![A-Za-z0-9_.~/<])(?:~|[A-Za-z]:)?(?:/[^\s/\"'<>|:;,()\[\]{}]+){2,}/?")
_NAME = re.compile(r"[a-z_]+")
_ADDRESS = re.compile(r"(?<![\d.])(?!127\.0\.0\.1)\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?![\d.])")
_MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")


def anonymous(facts: Facts, environ: Mapping[str, str]) -> Facts:
    """``facts`` with user names, host names, paths, environment values and the run's id and label replaced."""
    scrub = scrubber(facts, environ)
    now = facts.now
    jobs = tuple(_job(job, scrub) for job in now.jobs)
    document = _walk(_without_environment(now.document), scrub)
    return replace(
        facts,
        run=RunDir(Path("RUN")),
        now=replace(
            now,
            run_id="RUN",
            path=Path("RUN"),
            name=None,
            jobs=jobs,
            reason=None if now.reason is None else scrub(now.reason),
            document=document,
        ),
        results=_walk(facts.results, scrub),
        jobs=_walk(facts.jobs, scrub),
        answers=tuple(_walk(answer, scrub) for answer in facts.answers),
        sizes=tuple((scrub(name), count) for name, count in facts.sizes),
    )


def scrubber(facts: Facts, environ: Mapping[str, str]) -> Callable[[str], str]:
    """A function that replaces in a text what belongs to this run's user, machines and folders."""
    paths = dict(_paths(facts, environ))
    words = {word: name for word, name in _words(facts, environ) if _tells(word)}
    # the longest first: /a/b/c before /a/b
    known = [(path, paths[path]) for path in sorted(paths, key=len, reverse=True) if len(path) > 2]  # HOME=/ is none
    # also at the edge of a Chinese word, which has no space; not inside of an English one
    named = [
        (re.compile(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])", re.IGNORECASE), words[word])
        for word in sorted(words, key=len, reverse=True)
    ]

    def scrub(text: str) -> str:
        for path, name in known:
            text = text.replace(path, name)
        text = _MAIL.sub("MAIL", _ADDRESS.sub("ADDRESS", _PATH.sub(_last, text)))
        for pattern, name in named:
            text = pattern.sub(name, text)
        return text

    return scrub


def _tells(word: str) -> bool:
    return len(word) > 1 and not word.isdigit() and word.lower() not in COMMON


def _last(match: re.Match[str]) -> str:
    """Of a path only the file's own name stays, which is what the reader needs to understand the sentence."""
    return f"PATH/{PurePath(match[0]).name}"


def _paths(facts: Facts, environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Folders that are known, whatever characters are in them, and what stands in their place."""
    run = facts.run.path
    for value in _strings([facts.now.document, *facts.jobs.values(), *facts.results.values()]):
        # nearer to the root a folder's name alone may stand in any text: _PATH finds those
        if value.startswith("/") and "\n" not in value and len(PurePath(value).parent.parts) > 2:
            yield str(PurePath(value).parent), "PATH"
    for name in ("HOME", "PKUSLURM_CACHE", "PKUSLURM_RUN_ROOT", "WORK_DIR", "TMPDIR"):
        if environ.get(name, "").startswith("/"):
            yield environ[name].rstrip("/"), name if name == "HOME" else "PATH"
    yield str(run), "RUN"
    with suppress(OSError):
        yield str(run.resolve()), "RUN"
    yield str(run.parent), "RUN_ROOT"
    for job in facts.jobs.values():
        env = job.get("env")
        for value in env.values() if isinstance(env, Mapping) else ():
            if isinstance(value, str) and (len(value) >= LONG_VALUE or "/" in value):
                yield value, "VALUE"


def _words(facts: Facts, environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names and what stands in their place: hosts are numbered, so that the same one stays the same one."""
    for name in (*facts.run.path.parts[1:], facts.run.run_id, facts.now.run_id):
        yield name, "PART" if name not in (facts.run.run_id, facts.now.run_id) else "RUN"
    if facts.now.name:
        yield facts.now.name, "LABEL"
    for user in _users(facts.run.path, environ):
        yield user, "USER"
    for number, host in enumerate(_hosts(facts), 1):
        yield host, f"HOST{number}"
        if not host[:1].isdigit():  # the short name; of an address that would be a number
            yield host.partition(".")[0], f"HOST{number}"


def _users(run: Path, environ: Mapping[str, str]) -> Iterator[str]:
    yield from (environ[name] for name in ("USER", "LOGNAME", "SUDO_USER") if environ.get(name))
    numbers = [os.getuid()]
    with suppress(OSError):
        numbers.append(run.stat().st_uid)
    for number in numbers:
        with suppress(KeyError):  # a container knows no names
            entry = pwd.getpwuid(number)
            yield from (name for name in (entry.pw_name, entry.pw_gecos.partition(",")[0]) if name)
            yield PurePath(entry.pw_dir).name


def _hosts(facts: Facts) -> list[str]:
    found = [node for job in facts.now.jobs for node in job.nodes]
    documents: list[Any] = [facts.now.document, *(read_json(file) for file in facts.run.path.glob("state/*.json"))]
    documents.append(facts.now.document.get("launcher"))
    found += [value["host"] for value in documents if isinstance(value, Mapping) and isinstance(value.get("host"), str)]
    return [host for host in dict.fromkeys([*found, os.uname().nodename]) if host]


def _job(job: JobStatus, scrub: Callable[[str], str]) -> JobStatus:
    return replace(
        job,
        job_id=None if job.job_id is None else scrub(job.job_id),
        nodes=tuple(map(scrub, job.nodes)),
        reason=None if job.reason is None else scrub(job.reason),
    )


def _without_environment(document: Mapping[str, Any]) -> dict[str, Any]:
    """run.json whose settings tell no variable's value."""
    settings = document.get("settings")
    kept = []
    for item in settings if isinstance(settings, list) else []:
        key = str(item.get("key")) if isinstance(item, Mapping) else ""
        if key.startswith(HIDDEN):
            item = item | {"value": "VALUE"}
        if key not in DROPPED:
            kept.append(item)
    return dict(document) | {"settings": kept}


def _walk(value: Any, scrub: Callable[[str], str]) -> Any:
    """Every string in ``value`` scrubbed, keys included."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        # kinds and the names of our own fields are looked up by the page; sentences may be keys, too
        return {
            key if _NAME.fullmatch(str(key)) else scrub(str(key)): _walk(inner, scrub) for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_walk(inner, scrub) for inner in value]
    return value


def _strings(value: Iterable[Any]) -> Iterator[str]:
    for inner in value.values() if isinstance(value, Mapping) else value:
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, Mapping | list | tuple):
            yield from _strings(inner)
