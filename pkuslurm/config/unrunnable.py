"""What LLaMA-Factory can do and a run cannot: composed, shown by a dry run with a warning, not submitted. Pure."""

from __future__ import annotations

from pkuslurm.config.parse import show
from pkuslurm.config.schema import Config

# Ray's keys that do not begin with ray_.
RAY = ("resources_per_worker", "placement_strategy", "master_addr", "master_port")


def cannot_run(config: Config) -> str | None:
    """Why this training is not run here, in one line with what to do; None: it is."""
    train = {key: value for key, value in config.train.items() if value not in (None, False)}
    if "train" not in config.pipeline.jobs:
        return None
    if config.train.get("do_train") is False:
        does = [key for key in ("do_eval", "do_predict") if train.get(key)]
        what = f"only {' and '.join(does)}" if does else "nothing"
        way = "pipeline=infer asks a model questions, train.do_train=true trains"
        return f"train.do_train=false: LLaMA-Factory would do {what}, which is no run of ours; {way}"
    ray = next((key for key in train if key in RAY or (key.startswith("ray_") and key != "ray_scope")), None)
    if ray is not None:
        return (
            f"train.{ray}={show(train[ray])}: Ray would start workers of its own; a run starts its ranks on its nodes "
            f"by torchrun: take Ray's keys out (~train.{ray}) and say nodes=…"
        )
    for key, name in (("use_kt", "KTransformers"), ("use_mca", "Megatron")):
        if train.get(key):
            return f"train.{key}=true: {name} has launchers and keys of its own; train with it by llamafactory-cli"
    return None
