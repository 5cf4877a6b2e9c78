"""Golden dry runs, compared whole: what is printed is what would be written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pkuslurm.launch import main
from tests.render.golden import compare, dry_run, installed_elsewhere  # noqa: F401  # a fixture

CASES = {
    "demo": ["nodes=2"],
    "tutorial10": ["experiment=tutorial10"],
    "ascend": ["cluster=ascend", "nodes=2"],
    "full": [
        "model.path=/models/mine",
        "model.template=llama3",
        "dataset.path=/data/我的 data.json",
        "train.finetuning_type=full",
        "infer.prompts=[你好]",
        "cluster=slurm",
    ],
    "nvidia": ["cluster=nvidia", "nodes=2"],
    "scow": ["cluster=scow", "nodes=2", "cluster.setup=[source /opt/env.sh]"],
}
# what a container puts before the payload's command
for _cluster, _runtime in (
    *(("ascend", runtime) for runtime in ("apptainer", "docker", "pyxis")),
    *(("nvidia", runtime) for runtime in ("apptainer", "enroot")),
):
    _image = "hiyouga/llamafactory:0.9.4-npu-a2" if _runtime in ("docker", "pyxis") else "/images/lf.sif"
    CASES[f"{_cluster}-{_runtime}"] = [
        *(f"cluster={_cluster}", "nodes=2", f"container={_runtime}", f"container.image={_image}"),
        "container.llamafactory=0.9.4",
    ]
# what real sites want to be asked for
SITES = ("hkust-gz-hpc4", "sjtu-910b3", "haicgu", "pku-weiming2", "sjtu-siyuan", "tacc-vista")
CASES |= {f"site-{name}": [f"cluster={name}", "nodes=2"] for name in SITES}


@pytest.mark.parametrize("name", CASES)
def test_dry_run_is_golden(name: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> None:
    compare(name, CASES[name], capsys, request)


def test_the_tutorials_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """Every line of the tutorial's two YAMLs that changes what is computed, by name."""
    text = dry_run(["experiment=tutorial10"], capsys)
    train = yaml.safe_load(text.split("# file train.yaml\n")[1].split("# file ")[0])
    tutorial = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "dataset": "identity",
        "template": "qwen",
        "cutoff_len": 1024,
        "max_samples": 1000,
        "num_train_epochs": 20.0,
        "learning_rate": 1.0e-4,
        "lr_scheduler_type": "cosine",
    }
    assert {key: train[key] for key in tutorial} == tutorial
    assert not {"logging_dir", "trust_remote_code"} & set(train)
    merge = yaml.safe_load(text.split("# file merge.yaml\n")[1].split("# file ")[0])
    exported = {"template": "qwen", "export_size": 5, "export_device": "auto", "export_legacy_format": False}
    assert {key: merge[key] for key in exported} == exported
    assert "trust_remote_code" not in merge
    assert "--nnodes 2 " in text and "--nproc_per_node 2 " in text
    assert "NODE_RANK <- SLURM_PROCID" in text
    assert "logging_dir" in text and "trust_remote_code" in text, "what is left out is said"


def test_a_dry_run_writes_nothing_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import subprocess

    def forbidden(*arguments: object, **more: object) -> None:
        raise AssertionError(f"a dry run started {arguments}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", forbidden)
    assert main(["nodes=2", "dry_run=true"]) == 0
    assert "RUN_ID" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_still_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dry_run=true", "nodez=2"]) == 2
    assert capsys.readouterr().err.startswith("pkuslurm: nodez: no such key")


@pytest.mark.parametrize(
    ("given", "signal"),
    [
        (["cluster.time=2:00:00"], "USR2@120"),
        (["cluster.time=2"], "USR2@30"),
        (["cluster.time=1", "resume.signal_seconds=50"], "USR2@50"),
        ([], "USR2@120"),
    ],
)
def test_a_warning_leaves_time_for_the_job_itself(
    given: list[str], signal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"#SBATCH --signal={signal}\n" in dry_run(["cluster=ascend", "model=tiny", *given], capsys)


@pytest.mark.parametrize(
    ("more", "by"),
    [
        ([], "the column expect of {}"),
        (["infer.expect=北大"], "infer.expect or the column expect of {}"),
    ],
)
def test_a_column_of_expectations_is_named(
    more: list[str], by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the end of a run says where an answer is not as expected."""
    file = tmp_path / "asked.csv"
    file.write_text("prompt,expect\n你是谁,PKU\n", encoding="utf-8")
    text = dry_run(["model=tiny", *([] if more else ["infer.expect=null"]), f"infer.prompts={file}", *more], capsys)
    assert f'"expected_by": "{by.format(file)}"' in text
