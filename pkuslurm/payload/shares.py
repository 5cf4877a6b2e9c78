"""Work in equal shares by forked processes: numpy's short steps would wait for each other's interpreter in threads."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

# a process for each processor; beyond a few the disk is what is waited for
MOST = 8


class Failed(Exception):
    """What the first share that failed said."""


def in_shares(work: Callable[[], Iterable[Callable[[], None]]]) -> None:
    """Run all that ``work`` yields, each once, in as many processes as there are processors. Raises Failed, OSError.

    ``work`` is called in each and must yield the same. A process whose parent is gone ends."""
    count = min(MOST, len(os.sched_getaffinity(0)))
    if count == 1:
        for one in work():
            one()
        return
    ends = [_start(work, number, count) for number in range(count)]
    said = []
    for process, pipe in ends:
        with os.fdopen(pipe, "rb") as stream:
            said.append(stream.read().decode("utf-8", "replace"))
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code and not said[-1]:
            said[-1] = f"0 a process ended with {code}"
    if text := next(filter(None, said), None):
        number, _, words = text.partition(" ")
        if number != "0":
            raise OSError(int(number), os.strerror(int(number)))
        raise Failed(words)


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
        number = (error.errno if isinstance(error, OSError) else None) or 0
        words = " ".join(str(error).split()) or type(error).__name__
        os.write(write, f"{number} {words}".encode("utf-8", "replace")[:4000])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _mine(work: Iterable[Callable[[], None]], number: int, count: int) -> Iterator[Callable[[], None]]:
    return islice(work, number, None, count)
