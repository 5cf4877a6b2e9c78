"""Where this installation keeps what is not Python: conf/ is beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
BOOT = PACKAGE / "boot.py"
PAYLOAD = PACKAGE / "payload" / "__main__.py"


def absolute(path: str) -> str:
    """``path`` from the root, ~ expanded; symbolic links stay: a cluster's /home is often one."""
    return str(Path(path).expanduser().absolute())
