"""Which jobs the run of a LLaMA-Factory YAML has: what its training leaves decides what can be done with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf


def adapt(raw: DictConfig, typed: Sequence[str]) -> tuple[str, ...]:
    """Take out of ``raw``'s pipeline what makes no sense after its training, and say so; a typed pipeline stays."""
    jobs: list[str] = list(raw.pipeline.jobs)
    if "train" not in jobs or any(item.lstrip("+").startswith("pipeline") for item in typed):
        return ()
    left, why = _left(jobs, OmegaConf.to_container(raw, resolve=False))
    if left == jobs:
        return ()
    raw.pipeline.jobs = left
    return (f"jobs {', '.join(left)}: {why}",)


def _left(jobs: list[str], raw: Any) -> tuple[list[str], str]:
    train = raw["train"]
    kind, stage = train.get("finetuning_type", "lora"), train.get("stage", "sft")
    until = jobs[: jobs.index("train") + 1]
    if train.get("do_train") is False:
        return until, "nothing is trained"
    if stage == "rm":
        return until, "a reward model gives scores, it is neither merged nor asked; train.reward_model takes its folder"
    if kind in ("full", "freeze"):
        return [job for job in jobs if job != "merge"], f"{kind} leaves a whole model, there is nothing to merge"
    adapter = str(raw["model"].get("adapter") or "")
    if adapter and ("," in adapter or train.get("create_new_adapter")):
        return until, "the new adapter lies over the earlier ones; merge them one after another"
    return jobs, ""
