"""A Python that the users, on the login node and on the nodes, can run, with this one's packages and this checkout.

This interpreter may lie under a home that only root enters, and so may its virtual environment and the checkout. Then
they are bind mounted, read-only, under the cluster's folder, and a virtual environment is made there that consists of
three mounts and one .pth file:

    <base>/python/<digest>/prefix   the interpreter's installation
                           site0    site-packages, as they are
                           src      the checkout
                           venv     bin/python, pyvenv.cfg, lib/pythonX.Y/site-packages/cluster.pth

The nodes' mount namespaces are slaves of <base>/python, so that they see what is mounted later.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from pathlib import Path

from tests.cluster.layout import USERS, ClusterError, Layout, one_at_a_time
from tests.cluster.mount import bind, mounts
from tests.cluster.people import run

REPO = Path(__file__).resolve().parents[2]


def usable_python(layout: Layout) -> Path:
    """``sys.executable`` if a user can run it and import pkuslurm from this checkout, else one made from it."""
    if _works(layout, Path(sys.executable)):
        return Path(sys.executable)
    made = layout.base / "python" / hashlib.sha256(f"{sys.executable}\0{REPO}".encode()).hexdigest()[:8]
    python = made / "venv" / "bin" / "python"
    with one_at_a_time(layout.base):
        if not python.exists():
            _make(made, python)
    if not _works(layout, python):
        raise ClusterError(f"{python}, made from {sys.executable}: {USERS[0]} cannot run it: {_says(layout, python)}")
    return python


def source(python: Path) -> Path:
    """The checkout as the users see it, from what ``usable_python`` gave."""
    mounted = python.parents[2] / "src"
    return mounted if mounted in mounts() else REPO


def _make(made: Path, python: Path) -> None:
    prefix = Path(sys.base_prefix)
    interpreter = Path(sys.executable).resolve()
    if not _open_to_all(interpreter):
        prefix = bind(prefix, made / "prefix")
        interpreter = prefix / interpreter.relative_to(sys.base_prefix)
    sites = dict.fromkeys(Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib"))
    mounted = [bind(site, made / f"site{number}") for number, site in enumerate(s for s in sites if s.is_dir())]
    bind(REPO, made / "src")
    packages = made / "venv" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    # the checkout first: an editable install's own .pth may name another one
    lines = [str(made / "src"), *(f"import site; site.addsitedir({str(site)!r})" for site in mounted)]
    (packages / "cluster.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (made / "venv" / "pyvenv.cfg").write_text(
        f"home = {interpreter.parent}\ninclude-system-site-packages = {str(_sees_system_packages()).lower()}\n"
    )
    python.parent.mkdir()
    _commands(Path(sys.executable).parent, python)
    _interpreter(interpreter, python, prefix)


def _interpreter(interpreter: Path, python: Path, prefix: Path) -> None:
    """A link; or a copy where the binary looks for libpython by the path that the users cannot enter.

    The copy looks beside itself: $ORIGIN/lib is never longer than a home's folder, so it fits in its place.
    """
    binary = interpreter.read_bytes()
    old = f"{sys.base_prefix}/lib\0".encode()
    new = b"$ORIGIN/lib\0".ljust(len(old), b"\0")
    if prefix == Path(sys.base_prefix) or old not in binary or len(new) != len(old):
        python.symlink_to(interpreter)
        return
    python.with_name("lib").symlink_to(prefix / "lib")
    python.write_bytes(binary.replace(old, new))
    python.chmod(0o755)


def _commands(folder: Path, python: Path) -> None:
    """torchrun, llamafactory-cli and the like, started by the new interpreter."""
    old = f"#!{sys.executable}\n".encode()
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink() and (text := path.read_bytes()[:65536]).startswith(b"#!"):
            first, _, rest = text.partition(b"\n")
            if first + b"\n" == old or b"python" in first:
                copy = python.with_name(path.name)
                copy.write_bytes(f"#!{python}\n".encode() + rest)
                copy.chmod(0o755)


def _works(layout: Layout, python: Path) -> bool:
    return _says(layout, python) in (str(REPO), str(source(python)))


def _says(layout: Layout, python: Path) -> str:
    """Which checkout's pkuslurm a user gets from it, or what is wrong."""
    import_it = "import pkuslurm, pathlib; print(pathlib.Path(pkuslurm.__file__).resolve().parents[1])"
    try:
        ended = run(layout, USERS[0], [str(python), "-c", import_it])
    except OSError as error:
        return str(error)
    return (ended.stdout or ended.stderr).strip()


def _open_to_all(path: Path) -> bool:
    """Whether anybody may execute the file and pass the folders above it."""
    return all(os.stat(part).st_mode & 0o001 for part in (path, *path.parents))


def _sees_system_packages() -> bool:
    try:
        text = (Path(sys.prefix) / "pyvenv.cfg").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return "include-system-site-packages = true" in text
