"""``python -m tests.cluster``: bring a Slurm cluster up, look at it, break it, take it down."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

from tests.cluster import daemons, faults, people, python
from tests.cluster.down import down
from tests.cluster.layout import ClusterError, Layout, base_from_environment, load, the_cluster
from tests.cluster.process import running
from tests.cluster.up import up

NODE_VERBS: dict[str, Callable[[Layout, str], None]] = {
    "node-kill": faults.node_kill,
    "node-up": faults.node_up,
    "link-down": faults.link_down,
    "link-up": faults.link_up,
}
DAEMON_VERBS: dict[str, Callable[[Layout, str], None]] = {
    "pause": faults.pause,
    "resume": faults.resume,
    "kill": faults.kill,
    "start": faults.start,
}
SWITCHES: dict[str, Callable[[Layout, bool], object]] = {
    "accounting": faults.accounting,
    "loopback-names": faults.loopback_names,
}
DAEMONS = {"ctld": "slurmctld", "dbd": "slurmdbd"}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return _do(arguments)
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 2


def _do(arguments: argparse.Namespace) -> int:
    base = base_from_environment()
    verb = arguments.verb
    if verb == "up":
        wanted = Layout(base, arguments.nodes, not arguments.no_accounting, arguments.min_job_age)
        return _up(wanted, arguments.temporary)
    if verb == "down" and os.geteuid() == 0:
        begin = time.monotonic()
        was = down(base)
        print(f"removed in {time.monotonic() - begin:.1f} s" if was else f"no cluster in {base}")
        return 0
    if verb == "status":
        return _status(load(base))
    if os.geteuid() != 0:
        raise ClusterError(f"{verb}: only root may")
    layout = the_cluster(base)
    if verb == "as":
        people.become(layout, arguments.user, arguments.command, arguments.cwd)
    elif verb == "python":
        print(python.usable_python(layout))
    elif verb in NODE_VERBS:
        NODE_VERBS[verb](layout, arguments.node)
    elif verb == "min-job-age":
        faults.min_job_age(layout, arguments.seconds)
    elif verb in SWITCHES:
        SWITCHES[verb](layout, arguments.state == "on")
    elif verb == "heal":
        faults.heal(layout)
    else:
        daemon, _, what = verb.partition("-")
        DAEMON_VERBS[what](layout, DAEMONS[daemon])
    return 0


def _up(wanted: Layout, temporary: bool) -> int:
    begin = time.monotonic()
    made = up(wanted)
    layout = the_cluster(wanted.base)
    if not temporary:  # somebody wants it now, also if tests brought it up
        layout.temporary.unlink(missing_ok=True)
    elif made:
        layout.temporary.touch()
    say(
        f"up in {time.monotonic() - begin:.1f} s" if made else f"it is up, in {layout.base}",
        f"export SLURM_CONF={layout.conf}   # then sinfo, squeue, srun as any user; or:",
        "python -m tests.cluster as pkalice -- srun -N2 hostname",
    )
    return 0


def _status(layout: Layout | None) -> int:
    if layout is None:
        print("down")
        return 1
    how = "up" if layout.ready.exists() else "half up"
    lines = [f"{how}, in {layout.base}, {layout.bridge} 10.{layout.net}.0.0/24"]
    lines += [f"  {name:10} {running(layout.pid(name)) or 'does not run'}" for name in daemons.daemons(layout)]
    lines += [daemons.call(command, layout=layout).stdout.rstrip() for command in ("sinfo", "squeue")]
    say(*lines)
    return 0


def say(*lines: str) -> None:
    """In one write: `status | head -1` closes the pipe early."""
    sys.stdout.write("\n".join(lines) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add = verbs.add_parser("up", help="bring it up (nothing happens if it is)")
    add.add_argument("--nodes", type=int, choices=range(2, 10), default=4)
    add.add_argument("--no-accounting", action="store_true")
    add.add_argument("--min-job-age", type=int, default=300, metavar="SECONDS")
    add.add_argument("--temporary", action="store_true", help="the tests': the last session takes it down")
    verbs.add_parser("down", help="remove exactly what up made")
    verbs.add_parser("status", help="what runs")
    add = verbs.add_parser("as", help="run a command as an ordinary user")
    add.add_argument("--cwd", help="default: the user's shared folder")
    add.add_argument("user")
    add.add_argument("command", nargs="+", metavar="-- COMMAND")
    verbs.add_parser("python", help="print a Python, with this one's packages, that the users can run")
    for name in NODE_VERBS:
        verbs.add_parser(name).add_argument("node")
    for daemon in DAEMONS:
        for what in DAEMON_VERBS:
            verbs.add_parser(f"{daemon}-{what}")
    verbs.add_parser("min-job-age", help="how long ended jobs are remembered").add_argument("seconds", type=int)
    for name, text in {
        "accounting": "off: as a site without slurmdbd",
        "loopback-names": "on: every node resolves itself to 127.0.1.1",
    }.items():
        verbs.add_parser(name, help=text).add_argument("state", choices=("on", "off"))
    verbs.add_parser("heal", help="undo the faults; jobs go on")
    return parser


if __name__ == "__main__":
    sys.exit(main())
