"""Where this installation keeps what is not Python: conf/ is beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
BOOT = PACKAGE / "boot.py"
PAYLOAD = PACKAGE / "payload" / "__main__.py"
# else what is installed, or a bundle: there is no make
IS_CHECKOUT = CONF.parent != PACKAGE
# by `make bundle`: no index is asked where it is used
BUNDLED = (PACKAGE / "_bundled").is_dir()


def absolute(path: str) -> str:
    """``path`` from the root, ~ expanded; symbolic links stay: a cluster's /home is often one."""
    return str(Path(path).expanduser().absolute())


def python() -> str:
    """This interpreter as one would type it here."""
    with suppress(OSError):  # the folder may be gone
        shorter = sys.executable.removeprefix(os.getcwd() + os.sep)
        if os.sep in shorter:
            return shlex.quote(shorter)
    return shlex.quote(sys.executable)


def command(*words: str) -> str:
    """``pkuslurm words``, to be typed here: also where no script of that name is on PATH."""
    return " ".join([python(), "-m", "pkuslurm", *map(shlex.quote, words)])
