"""A small image with a python, made of this machine's own files: no registry, no network, a few seconds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("charliecloud-runtime", "squashfs-tools", "fuse3")
PROGRAMS = ("ch-run", "mksquashfs", "fusermount3")
FUSE = Path("/dev/fuse")
# ch-run mounts over these, or at them
FOLDERS = (
    "dev",
    "proc",
    "sys",
    "tmp",
    "etc",
    "run",
    "home",
    "root",
    "work",
    "srv",
    "data",
    "mnt",
    "opt/image/bin",
    "ch",
)
# where the image's python3 is found before /usr/bin has one; and a value that must not win over ours
ENVIRONMENT = (
    "PATH=/opt/image/bin:/usr/bin:/bin\nIMAGE_SAYS=it's the image's, = and all\nHF_HUB_OFFLINE=0\nnot a line\n"
)


def lacking() -> list[str]:
    """What this machine lacks to run an image as an ordinary user; root on Debian gets the packages."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
        for command in (["apt-get", "update", "-qq"], install):
            subprocess.run(command, env=os.environ | quiet, capture_output=True, check=False, timeout=300)
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return [f"{', '.join(missing)} (Debian's {', '.join(PACKAGES)})"]
    return [] if FUSE.exists() else [str(FUSE)]


@contextmanager
def fuse_for_everybody() -> Iterator[None]:
    """As udev makes it; a container's /dev has it for root alone."""
    before = FUSE.stat().st_mode
    FUSE.chmod(0o666)
    try:
        yield
    finally:
        FUSE.chmod(before)


def make(folder: Path, python3: str) -> Path:
    """A squashfs file: a shell, a python, and ``python3``: the program that is found first under that name."""
    root, image = folder / "root", folder / "image.sqfs"
    for name in FOLDERS:
        (root / name).mkdir(parents=True)
    for name in ("passwd", "group", "hosts", "resolv.conf"):
        (root / "etc" / name).touch()
    (root / "etc" / "only-in-the-image").touch()
    (root / "ch" / "environment").write_text(ENVIRONMENT, encoding="utf-8")
    interpreter = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}").resolve()
    library = Path(sysconfig.get_path("stdlib"))
    without = (
        "__pycache__",
        "test",
        "config-*",
        "idlelib",
        "tkinter",
        "ensurepip",
        "site-packages",
        "lib2to3",
        "unittest",
    )
    shutil.copytree(library, _at(root, library), ignore=shutil.ignore_patterns(*without), dirs_exist_ok=True)
    shell = Path("/bin/sh").resolve()
    for file in {shell, interpreter, *_libraries(shell, interpreter, *library.glob("lib-dynload/*.so"))}:
        shutil.copy2(file, _at(root, file))
    for name, target in (("bin/sh", shell), ("usr/bin/python3", interpreter)):
        if not (link := _at(root, Path("/", name))).exists():
            link.symlink_to(target)
    program = root / "opt" / "image" / "bin" / "python3"
    program.write_text(python3, encoding="utf-8")
    program.chmod(0o755)
    made = [
        "mksquashfs",
        str(root),
        str(image),
        "-quiet",
        "-no-progress",
        "-all-root",
        "-noD",
        "-noF",
    ]  # quick before small
    subprocess.run(made, check=True, capture_output=True)
    shutil.rmtree(root)
    image.chmod(0o644)
    return image


def _at(root: Path, path: Path) -> Path:
    there = root / path.relative_to("/")
    there.parent.mkdir(parents=True, exist_ok=True)
    return there


def _libraries(*programs: Path) -> set[Path]:
    told = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=False).stdout
    return {Path(word) for word in re.findall(r"(/\S+\.so\S*) \(0x", told)}
