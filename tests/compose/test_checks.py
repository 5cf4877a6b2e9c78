"""A well-typed value that cannot work: refused in one line that says what can."""

from __future__ import annotations

import pytest

from pkuslurm.compose import compose, reload
from pkuslurm.compose.words import GROUPS
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import python

FORMS = "it must be one of Slurm's forms: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S"
OWNED = "a run sets this itself; say it with"
REFUSED = {
    "nodes=0": "nodes=0: it must be 1 or more",
    "nodes=-1": "nodes=-1: it must be 1 or more",
    "nodes=1.5": "nodes=1.5: it must be a whole number",
    "name=a/b": "name=a/b: a label is part of a folder's name; it holds no / and no line break",
    "name=...": "name=...: a label needs at least one letter or digit",
    "name=": "name=: it is empty; it must be text or null",
    "access=everyone": "access=everyone: it must be private or group",
    "cluster.nproc_per_node=0": "cluster.nproc_per_node=0: it must be 1 or more",
    "cluster.accelerator=gpu": "cluster.accelerator=gpu: it must be npu or cuda or cpu",
    "cluster.cpus_per_task=0": "cluster.cpus_per_task=0: it must be 1 or more",
    "cluster.array_parallelism=0": "cluster.array_parallelism=0: it must be 1 or more",
    "cluster.poll_seconds=0": "cluster.poll_seconds=0: it must be more than 0",
    "cluster.poll_seconds=nan": "cluster.poll_seconds=nan: it must be more than 0",
    "cluster.poll_seconds=inf": "cluster.poll_seconds=inf: it must be more than 0",
    "cluster.join_timeout=-1": "cluster.join_timeout=-1: it must be more than 0",
    "cluster.time=1h": f"cluster.time=1h: {FORMS}",
    "cluster.time=1:99": f"cluster.time=1:99: {FORMS}",
    "cluster.time=-5": f"cluster.time=-5: {FORMS}",
    "cluster.time=0": "cluster.time=0: it must be more than 0; null leaves it to the partition",
    "cluster.time=true": "cluster.time=true: it must be text or a whole number or null",
    "cluster.mem=64GB": "cluster.mem=64GB: it must be a number of MB, or with K, M, G or T, such as 64G",
    "cluster.gres=gpu 2": "cluster.gres=gpu 2: it must be Slurm's name[:type]:count, such as gpu:2",
    "cluster.partition=a b": "cluster.partition=a b: it must be one word, without spaces; several are joined by commas",
    "cluster.constraint=[a|b]": "cluster.constraint=[…]: it must be text or null, no list; "
    "text with brackets is quoted: '[a]'",
    "cluster.exclusive=maybe": "cluster.exclusive=maybe: it must be true, false, user, mcs or topo",
    "cluster.jobs.train.time=true": "cluster.jobs.train.time=true: it must be text or a whole number or null",
    "cluster.jobs.train.time=1h": f"cluster.jobs.train.time=1h: {FORMS}",
    "cluster.jobs.train.nproc_per_node=0": "cluster.jobs.train.nproc_per_node=0: it must be 1 or more",
    "cluster.jobs.train.env=3": "cluster.jobs.train.env=3: it must be keys and values {a: 1}",
    "cluster.jobs.train.env.RANK=3": "cluster.jobs.train.env.RANK: every job sets this itself; "
    "nodes, cluster.nproc_per_node decide it",
    "cluster.jobs.train.executor=slurm": "cluster.jobs.train.executor: it is the same for all jobs; "
    "write cluster.executor=…",
    "cluster.jobs.train=5": "cluster.jobs.train=5: it holds keys such as partition; set one of them",
    "cluster.jobs.train.partitoin=a": "cluster.jobs.train.partitoin: no such key; "
    "did you mean cluster.jobs.train.partition?",
    "cluster.jobs.trian={partition: a}": "cluster.jobs.trian: no such kind of job; "
    "there are: prepare, train, merge, infer, report, serve",
    "cluster.extra.job-name=x": f"cluster.extra.job-name: {OWNED} name (a run's jobs are named after it)",
    "cluster.extra.J=x": f"cluster.extra.J: {OWNED} name (a run's jobs are named after it)",
    "cluster.extra.ntasks_per_node=2": f"cluster.extra.ntasks_per_node: {OWNED} cluster.nproc_per_node",
    "cluster.extra.mem=4": f"cluster.extra.mem: {OWNED} cluster.mem",
    "cluster.extra.export=ALL": f"cluster.extra.export: {OWNED} cluster.env",
    "cluster.jobs.merge.extra.array=1-3": f"cluster.jobs.merge.extra.array: {OWNED} "
    "-m a=1,2 (a sweep) and cluster.array_parallelism",
    "cluster.extra.mcs=[a,b]": "cluster.extra.mcs=['a', 'b']: an option of sbatch takes one value (true: none)",
    "cluster.env.A-B=1": "cluster.env.A-B: not a variable's name; letters, digits and _ make one",
    "cluster.env.SLURM_X=1": "cluster.env.SLURM_X: every job sets this itself; nodes, cluster.nproc_per_node decide it",
    "cluster.env.X=null": "cluster.env.X=null: a variable holds text; ~cluster.env.X leaves it out",
    "cluster.env.X=[1]": "cluster.env.X=[1]: a variable holds text; quote it as one value",
    "resume.max_attempts=0": "resume.max_attempts=0: it must be 1 or more",
    "resume.signal_seconds=0": "resume.signal_seconds=0: it must be from 1 to 65535",
    "resume.hang_minutes=-1": "resume.hang_minutes=-1: it must be more than 0",
    "serve.port=70000": "serve.port=70000: it must be from 1024 to 65535 (those below are root's)",
    "serve.idle_minutes=0": "serve.idle_minutes=0: it must be more than 0",
    "container=apptainer": "container.image: container.runtime=apptainer runs an image; "
    "write container.image=/path/to/image.sif (or its name in a registry)",
    "pipeline.jobs=[train]": "pipeline.jobs=[train]: it must be a beginning of [prepare,train,merge,infer,report], "
    "or [infer,report], or [merge]",
    "pipeline.jobs=[prepare,train,infer]": "pipeline.jobs=[prepare,train,infer]: train.finetuning_type=lora leaves an "
    "adapter, which is merged before it is asked; put merge before infer",
    "infer.expect=[": "infer.expect=[: not a regular expression (unterminated character set at position 0); "
    r"a literal ( [ + or ? is written \(  \[  \+  \?",
    "infer.expect=[a,b,c,d,(]": "infer.expect=(: not a regular expression "
    r"(missing ), unterminated subpattern at position 0); a literal ( [ + or ? is written \(  \[  \+  \?",
    "infer.expect=[a,b]": "infer.expect: 2 expectations for 5 prompts; give one for all, or one for each",
    "infer.prompts=[]": "infer.prompts: nothing to ask; write infer.prompts=[你是谁], or a file of prompts",
    "infer.prompts=['',你好]": "infer.prompts: one of the questions is empty; leave it out",
    "infer.prompts=[true]": "infer.prompts=[True]: it must be a list [a,b] of text or text",
    "infer.batch_size=0": "infer.batch_size=0: it must be 1 or more",
    "model=custom": "model.path: no model is given; write model.path=/path/to/a/model, or choose model=tiny",
    "dataset=custom": "dataset.path: no data is given; write dataset.path=/path/to/data.json, or dataset=identity",
    "model.path=https://huggingface.co/Qwen/Qwen3-0.6B": "model.path=https://huggingface.co/Qwen/Qwen3-0.6B: "
    "a URL is no model folder; download it first: PYTHON -m pkuslurm fetch Qwen/Qwen3-0.6B",
    "model.path=https://modelscope.cn/models/Qwen/Qwen3-8B/summary": "model.path=https://modelscope.cn/models/Qwen/"
    "Qwen3-8B/summary: a URL is no model folder; download it first: PYTHON -m pkuslurm fetch Qwen/Qwen3-8B",
    "model.path=file:///m": "model.path=file:///m: a URL is no model folder; "
    "download it first: PYTHON -m pkuslurm fetch OWNER/NAME",
    "dataset.path=https://a/b.json": "dataset.path=https://a/b.json: a URL is no data file; download it first",
    "dataset.name=a,": "dataset.name=a,: a name is empty; of several: 'a,b'",
}


@pytest.fixture(scope="module")
def kept() -> str:
    return compose([]).yaml


@pytest.mark.parametrize(("typed", "message"), REFUSED.items())
def test_it_is_refused_in_one_line(typed: str, message: str, kept: str) -> None:
    """On a new run and, single keys, on one that exists, which Hydra has no part in and is quicker."""
    with pytest.raises(PkuslurmError) as refusal:
        compose([typed]) if typed.partition("=")[0] in GROUPS else reload(kept, [typed])
    assert str(refusal.value) == message.replace("PYTHON", python())
    assert "\n" not in message and len(message) <= 300


# What LLaMA-Factory's own keys hold is looked at by another module: the beginning of its words.
LLAMAFACTORY = {
    "train.lerning_rate=1": "train.lerning_rate: ",
    "train.output_dir=x": "train.output_dir: a run sets this itself; say it with run_root",
    "train.learning_rate=fast": "train.learning_rate=fast: ",
    "train.finetuning_type=lorra": "train.finetuning_type=lorra: ",
    "merge.max_steps=3": "merge.max_steps: ",
    "merge.export_hub_model_id=a/b": "merge.export_hub_model_id: not yet built",
    "model.template=qwenn": "model.template=qwenn: LLaMA-Factory has no such template; did you mean qwen",
}


@pytest.mark.parametrize(("typed", "message"), LLAMAFACTORY.items())
def test_llamafactorys_keys_are_checked(typed: str, message: str) -> None:
    with pytest.raises(PkuslurmError) as refusal:
        compose([typed])
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("time", ["5", "90:30", "1:30:00", "2-3", "2-3:04", "2-3:04:05", "UNLIMITED"])
def test_every_form_of_slurms_time_is_taken(time: str, kept: str) -> None:
    assert str(reload(kept, [f"cluster.time={time}"]).config.cluster.time) == time
