"""The outermost layer of both commands: whatever happens becomes one line and an exit code, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pkuslurm import early
from pkuslurm.errors import PkuslurmError
from pkuslurm.read.text import safe


def guarded(command: Callable[[], int]) -> int:
    """Run ``command``: refusals and mistakes in one line on stderr; our own bugs in one line and a file."""
    early.ready()
    try:
        os.getcwd()
    except FileNotFoundError:
        print("pkuslurm: the current folder has been deleted; cd to one that exists", file=sys.stderr)
        return 2
    try:
        code = command()
        sys.stdout.flush()  # here, where a reader that has gone is no error
        return code
    except PkuslurmError as error:
        print(f"pkuslurm: {safe(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("pkuslurm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader (head, less) has seen enough; keep Python from complaining while it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        import tempfile
        import traceback

        handle, path = tempfile.mkstemp(prefix="pkuslurm-bug-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        print(
            f"pkuslurm: this is a bug of ours ({type(error).__name__}: {safe(error)}); details: {path}", file=sys.stderr
        )
        return 1
