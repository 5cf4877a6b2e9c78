"""A second user on the same cluster looks for what is not theirs: while a run works, and after it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests import verify
from tests.cluster.fixture import Cluster
from tests.cluster.runs import command, ended, job, jobs_of, launch, running, verb

pytestmark = pytest.mark.usefixtures("nothing_is_left")

TOKEN, QUESTION = "canary-token-4711", "canary-question-4712"
# all that an ordinary user can ask Slurm, and see of a node
ASK = (
    "scontrol show job -dd; scontrol show step; scontrol show node -d; squeue -a -o '%all'; sacct -a -l -P; "
    "scontrol write batch_script {job} -; cat /var/spool/slurm*/*/slurm_script"
)
LOOK = (
    "ps -wweo args; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline; ls -lR {run}; cat {run}/* {run}/*/*; "
    "find /tmp /dev/shm /var/tmp {shared} -user pkalice -type f -exec cat {{}} +; ss -ltnp"
)


def test_a_second_user_finds_no_secret(slurm: Cluster) -> None:
    env = {"MY_TOKEN": TOKEN}
    secret = ("cluster.env.CANARY_TOKEN=${oc.env:MY_TOKEN}", f"infer.prompts=[{QUESTION}]", "infer.expect=null")
    printed = launch(slurm, *secret, "dry_run=true", env=env)
    assert printed.returncode == 0 and TOKEN not in printed.stdout + printed.stderr and "CANARY_TOKEN" in printed.stdout
    words = command(slurm, *secret, "cluster.env.STANDIN_TRAIN=sleep")
    done = slurm.run("pkalice", ["bash", "-c", 'umask 000; exec "$@"', "bash", *words], env=env)
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.splitlines()[-1])
    found = running(slurm, run, "train")
    node = job(found, "train")["nodes"][0]
    there = slurm.run("pkalice", ["srun", "--overlap", "-w", node, "bash", "-c", "cat /proc/[0-9]*/environ"])
    assert TOKEN in there.stdout, "it is in the job, and its owner sees it"

    shared = slurm.shared("pkalice")
    asked = slurm.run("pkbob", ["bash", "-c", ASK.format(job=jobs_of(run)["train"]["job_id"])])
    seen = slurm.run("pkbob", ["srun", "--overlap", "-w", node, "bash", "-c", LOOK.format(run=run, shared=shared)])
    here = slurm.run("pkbob", ["bash", "-c", LOOK.format(run=run, shared=shared)])
    told = "".join(done.stdout + done.stderr for done in (asked, seen, here))
    assert run.name in asked.stdout and "pkuslurm" in seen.stdout, "there was something to see"
    assert TOKEN not in told and QUESTION not in told
    for words in (["status", run], ["logs", run], ["report", run], ["chat", run], ["serve", run], ["cancel", run]):
        done = verb(slurm, *words, user="pkbob")
        assert done.returncode == 2 and not verify.terminal(done.stdout + done.stderr), done

    # and what its owner may send around by mistake
    verb(slurm, "cancel", run)
    ended(slurm, run)
    mine = [verb(slurm, *words, run) for words in (["status"], ["status", "--json"], ["logs", "--all"], ["report"])]
    assert TOKEN not in "".join(done.stdout + done.stderr for done in mine)
    kept = [file for file in run.rglob("*") if file.is_file() and "views" not in file.parts]
    assert kept and not [file for file in kept if TOKEN.encode() in file.read_bytes()]

    # under umask 000. Slurm follows links: what it writes lies where nobody else can put one
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in (run, *run.rglob("*")) if not path.is_symlink()}
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}
    printed_to = [word[7:] for word in asked.stdout.split() if word.startswith(f"StdOut={run}")]
    assert len(printed_to) >= 3 and all(Path(file).is_relative_to(run / "logs") for file in printed_to)
