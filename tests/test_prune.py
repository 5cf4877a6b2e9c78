"""prune frees the disk and loses nothing: what is proved stays proved, what cannot be made again stays."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pkuslurm import cli, prune
from pkuslurm.read import pruned, status, values
from pkuslurm.rundir import RunDir, write_json, write_text
from pkuslurm.worker import marker
from tests.read.fake_run import KINDS, alive, complete, edit, finished, gone, make, mark, state

CACHED = "0123456789abcdef01234567"


@pytest.fixture
def run(weird: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A complete run: checkpoints, data that is linked to the cache, a base, what a killed merge left."""
    monkeypatch.setenv("HOME", str(weird))
    monkeypatch.setenv("XDG_STATE_HOME", str(weird / "state"))
    monkeypatch.setenv("PKUSLURM_RUN_ROOT", str(weird / "runs"))
    monkeypatch.setenv("PKUSLURM_CACHE", str(weird / "cache"))
    made = finished(weird / "runs")
    for step in (30, 60):
        write_text(made.adapter / f"checkpoint-{step}" / "optimizer.pt", "o" * 5000)
    write_text(made.path / ".merged.tmp-x1" / "model.safetensors", "half")
    write_text(made.merge_yaml, "finetuning_type: lora\n")
    write_text(weird / "base" / "config.json", "{}")
    edit(made.job("merge"), payload={"base": str(weird / "base")})
    cached = weird / "cache" / "tokenized" / CACHED / "data" / "state.json"
    cached.parent.mkdir(parents=True)
    os.link(made.data / "state.json", cached)
    write_text(cached.parents[1] / "facts.json", "{}")
    write_text(weird / "cache" / "models" / "tiny-1" / "config.json", "{}")
    return made


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def states(run: RunDir) -> dict[str, str]:
    return {job.kind: job.state for job in status.read(run.path).jobs}


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert cli.main(["prune", "--json", *arguments]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_alone_it_only_shows(run: RunDir, weird: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(weird)
    assert cli.main(["prune"]) == 0
    told = capsys.readouterr().out
    assert tree(weird) == before
    assert all(word in told for word in ("checkpoint-30", "checkpoint-60", ".merged.tmp-x1", "nothing was removed"))
    assert "not listed: 1 folder whose removal alone frees nothing\n" in told, "the cache has it too"
    items = asked(capsys)["items"]
    assert isinstance(items, list) and "tokenized data" in [item["what"] for item in items]
    assert "kept: adapters, full weights, answers, reports, logs, proofs" in told and "merged model  " not in told


def test_with_yes_only_that_goes(run: RunDir, weird: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(run.path)
    found = asked(capsys, "--yes")
    assert found["removed"] is True and found["bytes"] == 2 * 5000 + 4, "what the cache links to is not freed"
    gone_now = before.keys() - tree(run.path).keys()
    assert gone_now == {
        *("adapter/checkpoint-30/optimizer.pt", "adapter/checkpoint-60/optimizer.pt"),
        *("data/state.json", ".merged.tmp-x1/model.safetensors"),
    }
    kept = tree(run.path)
    assert {name: kept[name] for name in before.keys() - gone_now} == {
        name: before[name] for name in before.keys() - gone_now
    }
    assert states(run) == dict.fromkeys(KINDS, "COMPLETED") and status.read(run.path).state == "COMPLETED"
    prepare = status.read(run.path).job("prepare")
    assert prepare is not None and prepare.reason == "its tokenized data was pruned"
    assert marker.doubt(run, run.run_id, "train") is None, "merge can be run again"
    assert asked(capsys, "--yes")["items"] == []


def test_a_merged_model_goes_only_if_asked_and_is_said(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    asked(capsys, "--yes", "--merged")
    assert not run.merged.exists() and states(run) == dict.fromkeys(KINDS, "COMPLETED")
    merge = status.read(run.path).job("merge")
    assert merge is not None and "merged model pruned" in (merge.reason or "")
    assert cli.main(["status", str(run.path)]) == 0 and "merged model pruned" in capsys.readouterr().out
    # the worker would make it again, and does not take it for done
    assert marker.doubt(run, run.run_id, "merge") is not None
    # made again, as another attempt: a proof of its own, which nothing excuses
    complete(run, "merge")
    mark(run, "merge", run.merged / "model.safetensors", attempt=2)
    state(run, "merge", "COMPLETED", attempt=2)
    (run.merged / "model.safetensors").unlink()
    assert states(run)["merge"] == "FAILED"


def test_a_merged_model_stays_where_it_could_not_be_made_again(
    run: RunDir, weird: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (weird / "base" / "config.json").unlink()
    asked(capsys, "--yes", "--merged")
    assert (run.merged / "model.safetensors").is_file()


def test_what_is_left_of_a_pruned_part_is_still_looked_at(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    asked(capsys, "--yes", "--merged")
    write_text(run.merged / "model.safetensors", "something else")
    assert states(run)["merge"] == "FAILED"
    assert pruned.read(run)["merged"]["attempt"] == 1


@pytest.mark.parametrize("kind", ["train", "merge", "infer"])
def test_other_losses_are_not_excused(run: RunDir, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked(capsys, "--yes")
    part = {"train": run.adapter / "adapter_model.safetensors", "infer": run.answers}
    part.get(kind, run.merged / "model.safetensors").unlink()
    assert states(run)[kind] == "FAILED"


UNTOUCHED: dict[str, Callable[[RunDir], object]] = {
    "it is FAILED": lambda run: state(run, "infer", "FAILED", attempt=2),
    "it is RUNNING": lambda run: (
        edit(run.run_json, launcher=alive()),
        run.done("infer").unlink(),
        state(run, "infer", "RUNNING", attempt=2, **alive()),
    ),
    "its launcher has not said that it ended": lambda run: edit(run.run_json, launcher=gone()),
    "it is UNKNOWN": lambda run: run.run_json.write_text("{", encoding="utf-8"),
    "it belongs to another user": lambda run: None,
}


@pytest.mark.parametrize("why", UNTOUCHED)
def test_other_runs_are_never_touched(
    run: RunDir, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    UNTOUCHED[why](run)
    if "another user" in why:
        monkeypatch.setattr(os, "getuid", lambda: run.path.stat().st_uid + 1)
    before = tree(run.path)
    found = asked(capsys, "--yes", "--merged", "--cache", "--older", "0")
    assert tree(run.path) == before and found["items"] == []
    assert isinstance(found["kept"], list) and found["kept"][0]["why"] == why
    assert cli.main(["prune"]) == 0
    assert f"\nleft alone: 1 run: {why.removeprefix('it is ')}\n" in capsys.readouterr().out
    assert cli.main(["prune", str(run.path), "--yes"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and tree(run.path) == before


def test_a_run_that_begins_meanwhile_is_left_alone(run: RunDir) -> None:
    candidates, _ = prune.of_runs([run.path], 0.0, False)
    items = prune.measured(candidates)
    edit(run.run_json, launcher=alive())
    before = tree(run.path)
    assert set(prune.remove(items).values()) == {"its launcher has not said that it ended"} and tree(run.path) == before


def test_links_lead_nowhere(run: RunDir, weird: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(weird / "mine" / "thesis.txt", "x")
    (run.adapter / "checkpoint-90").symlink_to(weird / "mine")
    (run.path / "data").rename(weird / "elsewhere")
    (run.path / "data").symlink_to(weird / "elsewhere")
    asked(capsys, "--yes")
    assert (weird / "mine" / "thesis.txt").is_file() and (weird / "elsewhere" / "state.json").is_file()


def test_older(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    ended = status.read(run.path).jobs[-1].finished
    days = (time.time() - (values.unix(ended) or 0)) / 86400
    assert asked(capsys, "--older", str(max(days, 0) + 1))["items"] == []
    assert cli.main(["prune", "--older", "-1"]) == 2


def old(folder: Path, monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """Time goes on; a file's ctime cannot be set."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + days * 86400)


def test_the_cache_goes_when_nothing_links_to_it(
    run: RunDir, weird: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cached = weird / "cache" / "tokenized" / CACHED
    assert not any("cached" in str(item) for item in [asked(capsys, "--cache")["items"]]), "it was used just now"
    old(cached, monkeypatch, 8)
    found = asked(capsys, "--cache", "--yes")
    assert not cached.exists() and (weird / "cache" / "models" / "tiny-1" / "config.json").is_file()
    assert found["bytes"] == 2 * 5000 + 4 + 16000 + 2, "the data is freed by the last of its two links"


def test_a_cache_that_a_run_still_uses_stays(
    run: RunDir, weird: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run.run_json, launcher=gone())  # a run that is not pruned keeps its link
    old(weird, monkeypatch, 30)
    asked(capsys, "--cache", "--yes")
    assert (weird / "cache" / "tokenized" / CACHED / "data" / "state.json").is_file()


def test_a_killed_prune_leaves_a_proved_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, _ = prune.of_runs([run.path], 0.0, True)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prune.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune.remove([item for item in prune.measured(candidates) if item.what == "merged model"])
    monkeypatch.undo()
    assert states(run) == dict.fromkeys(KINDS, "COMPLETED")
    left = [path for what, path, _ in prune.of_runs([run.path], 0.0, False)[0] if what == "left over"]
    assert any(path.name.startswith(".merged.pruned-") for path in left)


def test_checkpoints_that_were_moved_aside_go_too(run: RunDir) -> None:
    (run.path / "bad-checkpoints" / "checkpoint-30").mkdir(parents=True)
    found = prune.of_runs([run.path], 0.0, False)[0]
    assert ("left over", run.path / "bad-checkpoints" / "checkpoint-30", run.path) in found


def test_a_run_without_merge(weird: Path) -> None:
    made = make(weird)
    document = json.loads(made.run_json.read_text(encoding="utf-8"))
    document["jobs"] = {kind: document["jobs"][kind] for kind in ("prepare", "train")}
    write_json(made.run_json, document | {"launcher": None})
    for kind in ("prepare", "train"):
        complete(made, kind)
    found, skipped = prune.of_runs([made.path], 0.0, True)
    assert [what for what, *_ in found] == ["tokenized data"] and skipped == {}
