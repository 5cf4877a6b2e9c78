"""The outermost layer of both commands: whatever happens becomes one line and an exit code, never a traceback."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable

from pkuslurm import early
from pkuslurm.errors import PkuslurmError
from pkuslurm.read.text import safe


def guarded(command: Callable[[], int]) -> int:
    """Run ``command``: refusals and mistakes in one line on stderr; our own bugs in one line and a file."""
    early.ready()
    if isinstance(sys.stdout, io.TextIOWrapper):  # JSON can say half of a surrogate pair, a path any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
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
        if "Could not determine home directory" in str(error):  # pathlib's, wherever a path begins with ~
            print(
                "pkuslurm: HOME is not set, and this user has no home folder: export HOME=/a/folder/of/yours "
                "(or name cache_root and run_root, and no path with ~)",
                file=sys.stderr,
            )
            return 2
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"pkuslurm: {safe(error.filename)}: this name is too long for a file's", file=sys.stderr)
            return 2
        import tempfile
        import traceback

        handle, path = tempfile.mkstemp(prefix="pkuslurm-bug-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        print(
            f"pkuslurm: this is a bug of ours ({type(error).__name__}: {safe(error)}); details: {path}", file=sys.stderr
        )
        return 1
