"""Take a cluster down: exactly what ``up`` made."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.cluster import network, people
from tests.cluster.layout import ClusterError, Layout, load, one_at_a_time, recorded
from tests.cluster.mount import mounts, umount
from tests.cluster.process import in_netns, kill_all, marked

# what lies outside the base folder, by the word that ``record`` wrote
REMOVE: dict[str, Callable[[str], None]] = {
    "user": people.delete,
    "link": network.delete_link,
    "netns": network.delete_netns,
    "netns-folder": network.delete_netns_folder,
    "folder": lambda name: Path(name).rmdir(),
}


def down(base: Path) -> bool:
    """Whether there was a cluster."""
    with one_at_a_time(base):
        layout = load(base)
        if layout is not None:
            remove(layout)
    return layout is not None


def remove(layout: Layout) -> None:
    """Whatever of it is there; the caller holds the lock."""
    for belongs in (*(in_netns(layout.netns(name)) for name in layout.names), marked(layout.base)):
        kill_all(belongs)
    for kind, name in recorded(layout):
        if kind != "base":
            REMOVE[kind](name)
    below = [mount for mount in mounts() if layout.base in mount.parents]
    for mount in reversed(below):
        umount(mount)
    # a bind mount left over would have its source emptied
    if left := [mount for mount in mounts() if layout.base in mount.parents]:
        raise ClusterError(f"{left[0]} is still mounted; {layout.base} is left as it is")
    _remove_base(layout)


def _remove_base(layout: Layout) -> None:
    """Last of all settings.json, so that a ``down`` that was interrupted can be repeated."""
    made = ("base", str(layout.base)) in recorded(layout)
    kept = ("settings.json", "made")
    for path in list(layout.base.iterdir()):
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in reversed(kept):
        (layout.base / name).unlink(missing_ok=True)
    if layout.base in mounts():  # the tmpfs over a noexec file system
        umount(layout.base)
    if made:
        layout.base.rmdir()
