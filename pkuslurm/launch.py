"""python -m pkuslurm.launch [override ...]: overrides → plan → printed, or run here."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pkuslurm import early  # noqa: F401  # before the slow imports
from pkuslurm.compose import Composed, compose, compose_sweep, groups, show, told
from pkuslurm.config.built import check_built
from pkuslurm.config.schema import Config
from pkuslurm.errors import PartlySubmitted, PkuslurmError
from pkuslurm.guard import guarded
from pkuslurm.paths import CONF, absolute, command
from pkuslurm.plan.inputs import Inputs
from pkuslurm.plan.plan import RunPlan, plan
from pkuslurm.preflight.resolve import check_machine, resolve
from pkuslurm.preflight.slurm import check_login_node, check_slurm
from pkuslurm.read.places import remember
from pkuslurm.read.text import safe
from pkuslurm.render.render import RunFiles, render
from pkuslurm.render.text import dry_run_text, labelled, last_words
from pkuslurm.rundir import RunDir, read_json
from pkuslurm.submit.cards import counted
from pkuslurm.submit.meet_settings import again, settings, variables
from pkuslurm.submit.meet_where import Role, facts, placed, platforms, role, screen
from pkuslurm.submit.meet_where import place as meeting_place
from pkuslurm.submit.write import create, make_root, new_run_id

if TYPE_CHECKING:
    from pkuslurm.submit.local import Nodes

HELP = """\
python -m pkuslurm.launch [key=value ...]

Fine-tunes a model, merges it, asks it, reports. Without a word: a tiny model that is made here, offline, in minutes.

  python -m pkuslurm.launch nodes=2                                        two nodes, as processes on this machine
  python -m pkuslurm.launch model.path=/my/model dataset.path=/my/data.json
  python -m pkuslurm.launch train.learning_rate=5e-5 train.num_train_epochs=5
  python -m pkuslurm.launch dry_run=true                                   prints everything, does nothing

  -m                   a sweep, one run for each combination: -m train.learning_rate=1e-5,5e-5 train.lora_rank=8,16
  --cfg job            the composed configuration
  --config-dir DIR     further presets, in folders named as the groups below
  -h, --help           this

Groups (group=choice):
"""
NOWHERE = "cluster.meet: where the nodes meet is not said; a training job needs nothing, applications a shared folder"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code; prints every refusal as one line."""
    return guarded(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    overrides, options = _options(argv)
    directories = [Path(options["config-dir"])] if "config-dir" in options else []
    if "help" in options:
        listed = groups(directories).items()
        print(HELP + "".join(f"  {name:<11}{', '.join(choices)}\n" for name, choices in listed))
        print(f"Every key with its meaning: {CONF / 'config.yaml'}")
        return 0
    if "multirun" in options:
        if "cfg" in options:
            raise PkuslurmError("--cfg job: of one run; leave -m out")
        from pkuslurm.launch_sweep import inherited, launch_sweep

        typed = inherited(overrides, os.environ)
        sweep = compose_sweep(typed, directories)
        config = sweep.points[0].composed.config
        # what is added to a sweep has its model and data
        if config.sweep.extend is None and (found := _from_platform(config, typed)):
            typed += found
            sweep = compose_sweep(typed, directories)
        return launch_sweep(sweep, typed, os.environ)
    composed = compose(overrides, directories)
    same = composed.yaml  # what a platform has told may differ from node to node
    if found := _from_platform(composed.config, overrides):
        composed = compose([*overrides, *found], directories)
    if "cfg" in options:
        print(composed.yaml, end="")
        return 0
    return launch(composed, os.environ, [*(f"--config-dir={one}" for one in directories), *overrides], same)


def _from_platform(config: Config, typed: Sequence[str]) -> list[str]:
    return platforms(typed, os.environ) if config.cluster.executor == "meet" else []


def launch(composed: Composed, environ: Mapping[str, str], words: Sequence[str], same: str | None = None) -> int:
    """One composed point: printed where dry_run is set, else checked, written and run.

    ``words`` were typed; ``same``: the YAML of what must be so on all nodes that meet, unless it is all of it.
    """
    config = replace(
        composed.config, run_root=absolute(composed.config.run_root), cache_root=absolute(composed.config.cache_root)
    )
    changed = {item.key for item in composed.settings}
    typed = [item.key for item in composed.settings if item.origin == "command line"]  # not a site's defaults.yaml
    with composed.blame:
        check_built(config, sorted(changed), typed)
    config = counted(placed(config, changed, environ), environ)
    if config.sweep.extend is not None:
        raise PkuslurmError(f"sweep.extend={config.sweep.extend}: points are added by a sweep; write launch -m …")
    steps = plan(config)
    meets = config.cluster.executor == "meet"
    own = role(environ, config.nodes, config.cluster.nproc_per_node or 1) if meets else Role()
    place = meeting_place(config, changed, own, environ) if meets and config.nodes > 1 else None
    if meets and config.nodes > 1 and place is None and not config.dry_run:
        line = again([word for word in words if not word.startswith("cluster.meet=")])
        print(screen(line, config.nodes, config.cluster.join_timeout, environ), end="", file=sys.stderr)
        return 2
    with composed.blame:
        inputs = resolve(config, environ, lenient=config.dry_run)
    inputs = replace(inputs, notes=tuple(map(composed.blame.said, inputs.notes)))
    if meets:
        inputs = replace(inputs, facts=(*facts(config, environ), *inputs.facts))
    elif environ.get("WORK_DIR") and "run_root" not in changed and not environ.get("PKUSLURM_RUN_ROOT"):
        inputs = replace(inputs, facts=(("runs", f"in {config.run_root}, since WORK_DIR is set"), *inputs.facts))
    if meets and config.nodes > 1 and place is None:
        inputs = replace(inputs, notes=(NOWHERE, *inputs.notes))
    if config.dry_run:
        run = RunDir(Path(config.run_root) / "RUN_ID")
        files = render(steps, inputs, run, composed.yaml, sys.executable)
        notes = [*composed.notes, *inputs.notes]
        print(dry_run_text(steps, files, notes, inputs.facts, _scripts(steps, files)), end="", flush=True)
        if sys.stderr.isatty():
            print(*map(safe, last_words(notes)), sep="\n", end="\n" if notes else "", file=sys.stderr)
        return 0
    check_machine(config, inputs)
    if config.cluster.executor == "slurm":
        check_slurm(steps)
    else:
        check_login_node(config, environ)

    def work(nodes: Nodes | None) -> int:
        run = RunDir(Path(config.run_root) / new_run_id(config.name or _label(composed)))
        files = render(steps, inputs, run, composed.yaml, sys.executable)
        create(steps, files, composed.overrides, composed.settings)
        remember(run.path.parent, environ)
        _announce(run, inputs, composed)
        if config.cluster.executor == "slurm":
            return _submit(steps, run)
        return _run_here(steps, run, nodes, inputs.notes)

    if place is None:
        return work(None)
    root = config.run_root if config.cluster.meet is None and "run_root" not in typed else None
    there = variables(own, config.nodes, environ, root)
    line = "" if there is None else again(words, variables=there)
    return _meet(config, place, own, same or composed.yaml, line, work)


def _meet(config: Config, place: Path, own: Role, same: str, line: str, work: Callable[[Nodes | None], int]) -> int:
    """``work`` on node 0, once all nodes are there; the run's exit code on each of them."""
    from pkuslurm.submit.meet import together
    from pkuslurm.submit.meeting_files import folder

    source = "" if config.from_yaml is None else f"from_yaml={absolute(config.from_yaml)}"
    made = not place.is_dir()
    try:
        make_root(place, 0o750 if config.access == "group" else 0o700)
        file = folder(place, "cluster.meet" if config.cluster.meet is not None else "run_root") / f"{own.key}.json"
        alike, timeout = settings(same, config), float(config.cluster.join_timeout)
        return together(file, own, config.nodes, alike, line, timeout, work, source)
    except OSError as error:
        raise PkuslurmError(f"{error.filename or place}: {error.strerror or error}") from None
    finally:
        if made:
            with suppress(OSError):
                place.rmdir()  # nobody came: nothing is left


def _announce(run: RunDir, inputs: Inputs, composed: Composed) -> None:
    """What will be done, before anything starts."""
    with suppress(OSError):  # the terminal may go away while the run works, and then the run must not end
        print(f"run {run.run_id}", file=sys.stderr)
        for name, text in inputs.facts:
            print(f"{name:<8} {safe(text)}", file=sys.stderr)
        for line in show(told(composed.settings)).splitlines():
            print(f"set      {safe(line)}", file=sys.stderr)
        for note in (*composed.notes, *inputs.notes):
            print(safe(labelled(note)), file=sys.stderr)


def _run_here(steps: RunPlan, run: RunDir, nodes: Nodes | None, told: Sequence[str]) -> int:
    from pkuslurm.read.closing import closing
    from pkuslurm.screen import Screen
    from pkuslurm.submit.local import NotBegun, run_jobs

    try:
        code = run_jobs(run, steps.kinds, Screen(run, steps.kinds, told), nodes=nodes)
    except NotBegun as error:
        print(run.path, flush=True)
        raise PartlySubmitted(f"{error}; the run is written: make room, then {command('retry', run.run_id)}") from None
    with suppress(OSError):
        passed = closing(run, sys.stderr)
        if code == 0 and passed is False:
            code = 1
    with suppress(OSError):
        print(run.path, flush=True)
    return code


def _scripts(steps: RunPlan, files: RunFiles) -> dict[str, str]:
    """What sbatch would be given, with JOB_ID where a parent's id will stand."""
    if steps.config.cluster.executor != "slurm":
        return {}
    from pkuslurm.submit.slurm import Submission, groups, script

    texts = {}
    for group in groups([files.jobs[kind] for kind in steps.kinds]):
        first = steps.job(group[0]["kind"])
        after = ":".join("JOB_ID" for _ in first.parents)
        submission = Submission(group[0]["key"], group, f"afterok:{after}" if after else "", hold=not after)
        texts[" ".join(job["kind"] for job in group)] = script(submission)
    return texts


def _submit(steps: RunPlan, run: RunDir) -> int:
    """Submit, print, return; with wait=true follow to the end."""
    from pkuslurm.submit.slurm import Refused, submit

    try:
        submit(run, steps.kinds)
    except PartlySubmitted:
        print(run.path, flush=True)
        raise
    except Refused:
        shutil.rmtree(run.path, ignore_errors=True)  # nothing of it is in the queue
        raise
    with suppress(OSError):
        ids = {kind: entry["job_id"] for kind, entry in (read_json(run.run_json) or {})["jobs"].items()}
        listed = ", ".join(f"{kind} {job_id}" for kind, job_id in ids.items())
        print(f"submitted {listed}; they go on by themselves", file=sys.stderr)
        print(f"next     {command('status', run.run_id)}", file=sys.stderr)
    code = _follow(steps, run) if steps.config.wait else 0
    with suppress(OSError):
        print(run.path, flush=True)
    return code


def _follow(steps: RunPlan, run: RunDir) -> int:
    from pkuslurm.follow import follow
    from pkuslurm.read.closing import closing
    from pkuslurm.retry import go_on

    try:
        code = follow(run, float(steps.config.cluster.poll_seconds), go_on)
    except KeyboardInterrupt:
        with suppress(OSError):
            print("stopped following; the jobs go on (pkuslurm cancel ends them)", file=sys.stderr)
        return 130
    with suppress(OSError):
        if closing(run, sys.stderr) is False and code == 0:
            code = 1
    return code


def _label(composed: Composed) -> str:
    config = composed.config
    model = config.model.make or Path(str(config.model.path)).name
    data = config.dataset.name or Path(str(config.dataset.path)).stem
    return f"{model}-{data}" if "train" in config.pipeline.jobs else model


def _options(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split Hydra's few options from the overrides."""
    overrides: list[str] = []
    options: dict[str, str] = {}
    rest = list(argv)
    while rest:
        item = rest.pop(0)
        if item in ("-h", "--help"):
            options["help"] = ""
        elif item in ("-m", "--multirun"):
            options["multirun"] = ""
        elif item.partition("=")[0] in ("--config-dir", "-cd", "--cfg", "-c"):
            flag, equals, value = item.partition("=")
            name = "config-dir" if flag in ("--config-dir", "-cd") else "cfg"
            if not equals:
                if not rest:
                    raise PkuslurmError(f"{flag}: a value is wanted after it")
                value = rest.pop(0)
            if name == "cfg" and value != "job":
                raise PkuslurmError(f"--cfg {value}: only --cfg job is here")
            if name == "config-dir" and not Path(value).is_dir():
                raise PkuslurmError(f"--config-dir {value}: there is no such folder")
            options[name] = value
        else:
            overrides.append(item)
    return overrides, options


if __name__ == "__main__":
    sys.exit(main())
