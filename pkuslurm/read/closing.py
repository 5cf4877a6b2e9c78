"""The end of a run on the screen: the answers side by side, the report's path, the next command to try."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from pkuslurm.paths import command
from pkuslurm.read import asking, present, rules, status
from pkuslurm.rundir import RunDir, read_json, read_jsonl


def closing(run: RunDir, stream: TextIO) -> bool | None:
    """Print it; returns whether the expectations were met (None: there were none, or infer did not complete)."""
    now = status.read(run.path)
    answers = list(read_jsonl(run.answers))
    infer = now.job("infer")
    if answers and infer is not None and infer.state == "COMPLETED":
        print(file=stream)
        present.answers(answers, stream)
    print(file=stream)
    if run.report.exists():
        print(f"report   {present.safe(run.report)}", file=stream)
    show_model(run, now, stream)
    if infer is not None and infer.state == "COMPLETED":
        found = asking.read(read_json(run.result("infer")) or {})
        if found is not None and found.warning is not None:
            print(f"warning  {present.safe(found.warning)}", file=stream)
    if now.passed is False:
        payload = (read_json(run.job("infer")) or {}).get("payload")
        wanted = payload.get("expected_by") if isinstance(payload, dict) else None
        by = present.safe(wanted or "infer.expect")
        print(f"passed   NO: not every answer is as {by} wants it (exit code 1)", file=stream)
    for name, line in _next(run, now):
        print(f"{name:<8} {line}", file=stream)
    return now.passed


def show_model(run: RunDir, now: status.RunStatus, stream: TextIO) -> None:
    """Where the model is that can be used as it is, and what PKU's platform is told to answer with it."""
    model = run.whole_model
    if model is None or now.state != "COMPLETED":
        return
    print(f"model    {present.safe(model)}", file=stream)
    if now.document.get("executor") == "meet":
        print(f"NextChat {present.safe(form(model))}", file=stream)


def form(model: Path) -> str:
    """What is filled into the form of PKU's NextChat application."""
    return f"挂载点 {model}   环境变量 SCOW_AI_MODEL_PATH={model}   1 张卡 (mount point, variable, one card)"


def _next(run: RunDir, now: status.RunStatus) -> list[tuple[str, str]]:
    def typed(*words: str) -> str:
        return present.safe(command(*words))

    name = now.run_id
    if now.state == "COMPLETED" and now.job("infer"):
        asks = [("next", typed("infer", name, "prompts=[你会做什么？]", "expect=null"))]
        return [*asks, ("talk", typed("serve", name))] if run.whole_model is not None else asks
    if now.state == "COMPLETED":
        return [("next", typed("status", name))]
    logs = typed("logs", name)
    if now.state in (*rules.BROKEN, "CANCELLED"):
        return [("next", typed("retry", name)), ("logs", logs)]
    return [("next", logs)]
