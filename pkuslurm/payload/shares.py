"""Work in equal shares by forked processes: numpy's short steps would wait for each other's interpreter in threads."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from .files import no_room

# a process for each processor; beyond a few the disk is what is waited for
MOST = 8


class Failed(Exception):
    """What a share that failed said."""


def in_shares(work: Callable[[], Iterable[Callable[[], None]]], beside: Callable[[], None] | None = None) -> None:
    """Run all that ``work`` yields, each once, in as many processes as there are processors; and ``beside`` in this
    one, where what waits for the disk has its time. Raises Failed, OSError.

    ``work`` is called in each and must yield the same. A process whose parent is gone ends."""
    count = min(MOST, len(os.sched_getaffinity(0)))
    if count == 1:
        for one in work():
            one()
        if beside is not None:
            beside()
        return
    ends = [_start(work, number, count) for number in range(count)]
    failed: list[Exception] = []
    if beside is not None:
        try:
            beside()
        except OSError as error:
            failed.append(error)
    for process, pipe in ends:
        with os.fdopen(pipe, "rb") as stream:
            said = stream.read().decode("utf-8", "replace")
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if said:
            failed.append(_error(*json.loads(said)))
        elif code:
            failed.append(Failed(f"a process ended with {code}"))
    if failed:
        # of a full disk one share tells, another of what that has led to
        raise next(filter(no_room, failed), failed[0])


def _error(number: int | None, words: str, name: str | None) -> Exception:
    return Failed(words) if number is None else OSError(number, words, name)


def _start(work: Callable[[], Iterable[Callable[[], None]]], number: int, count: int) -> tuple[int, int]:
    parent, (read, write) = os.getpid(), os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        return process, read
    code = 1
    try:
        for one in _mine(work(), number, count):
            if os.getppid() != parent:
                break
            one()
        else:
            code = 0
    except Exception as error:
        errno, words, name = None, str(error), None
        if isinstance(error, OSError):
            errno, words, name = error.errno, error.strerror or words, error.filename2 or error.filename
        words = " ".join(words.split())[:1000] or type(error).__name__
        os.write(write, json.dumps([errno, words, None if name is None else str(name)]).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _mine(work: Iterable[Callable[[], None]], number: int, count: int) -> Iterator[Callable[[], None]]:
    return islice(work, number, None, count)
