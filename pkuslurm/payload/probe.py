"""``python /…/payload/probe.py versions|npu|cuda``: what this python has installed, and whether each device computes.

Each line that counts is ``pkuslurm-probe {…}``, written before the step that it names: of one that hangs, its line is
the last. Nothing is imported for the versions: torch takes half a minute.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path

MARK = "pkuslurm-probe "
PACKAGES = ("llamafactory", "torch", "torch-npu", "transformers")
_DIST = re.compile(r"(.+?)-([^-]+)\.(?:dist|egg)-info")


def main(argv: list[str]) -> int:
    _say(versions=versions(), python=sys.executable)
    return 0 if argv[0] == "versions" else _devices(argv[0])


def versions() -> dict[str, str]:
    """By the folders that pip leaves: importlib.metadata alone takes longer to import than python to start."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for place in sys.path:
        try:
            names = os.listdir(place or ".")
        except OSError:
            continue
        for match in filter(None, map(_DIST.fullmatch, names)):
            name = match[1].lower().replace("_", "-").replace(".", "-")
            if name in PACKAGES:
                found.setdefault(name, match[2])
    cann = _cann()
    if cann is not None:
        found["CANN"] = cann
    return found


def _cann() -> str | None:
    """As its own files have it: version=8.3.RC2, or toolkit_running_version=[7.8.0.3.220:8.3.RC2]."""
    named = [os.environ[name] for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH") if os.environ.get(name)]
    homes = [*named, *(f"/usr/local/Ascend/{name}" for name in ("ascend-toolkit/latest", "cann", "latest"))]
    for home in map(Path, homes):
        for pattern in ("*-linux/ascend_toolkit_install.info", "ascend_toolkit_install.info", "version.cfg"):
            for file in sorted(home.glob(pattern)):
                if (version := _version(file)) is not None:
                    return version
    return None


def _version(file: Path) -> str | None:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"^version=(\S+)$", text, re.MULTILINE)
    match = match or re.search(r"^toolkit_running_version=\[(?:.*:)?([^:\]]+)\]", text, re.MULTILINE)
    match = match or re.search(r"_version=\[(?:.*:)?([^:\]]+)\]", text)
    return match[1] if match else None


def _devices(name: str) -> int:
    """A small sum on each device, and back: what a card that hangs does not get through."""
    number = None
    try:
        _say(step="importing torch")
        import torch

        if name == "npu":
            _say(step="importing torch_npu")
            importlib.import_module("torch_npu")
        module = getattr(torch, name)
        _say(step="counting the devices")
        count = module.device_count()
        _say(count=count)
        for number in range(count):
            _say(device=number)
            ones = torch.ones(64, device=f"{name}:{number}")
            total = (ones + ones).sum().item()
            module.synchronize(number)
            if total != 128:
                raise RuntimeError(f"64 × 2 gives {total}")
        _say(done=count)
    except Exception as error:  # whatever a driver raises
        words = [line.strip() for line in str(error).splitlines() if line.strip()]
        _say(error=f"{type(error).__name__}{': ' + words[0][:300] if words else ''}", device=number)
        return 1
    return 0


def _say(**words: object) -> None:
    print(MARK + json.dumps(words), flush=True)


if __name__ == "__main__":
    # Python put this folder first: there our files.py, train.py would shadow other people's modules
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != Path(__file__).resolve().parent]
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # a driver's own way of ending may hang, too
