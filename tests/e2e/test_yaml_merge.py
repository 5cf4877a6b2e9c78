"""merge --from-yaml for real: the demo's adapter by an export YAML into a folder of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pkuslurm.rundir import RunDir
from tests.conftest import Demo, environment, run


@pytest.mark.real
def test_an_export_yaml_is_merged_and_proved(demo: Demo, tmp_path: Path) -> None:
    made = yaml.safe_load(RunDir(demo.path).merge_yaml.read_text(encoding="utf-8"))
    keys = ("model_name_or_path", "adapter_name_or_path", "template")
    text = yaml.safe_dump({key: made[key] for key in keys} | {"export_dir": "出 口/merged", "finetuning_type": "lora"})
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    words = ["merge", "--from-yaml", "my.yaml", "run_root=runs"]
    ended = run(words, tmp_path, environment(tmp_path), module="pkuslurm")
    assert ended.code == 0, ended.err
    folder, where = ended.out.splitlines()
    assert folder == str(tmp_path / "出 口" / "merged") and RunDir(Path(where)).merged.resolve() == Path(folder)
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (Path(folder) / file).read_bytes() == (RunDir(demo.path).merged / file).read_bytes()
    again = run(words, tmp_path, environment(tmp_path), module="pkuslurm")
    assert again.code == 2 and "it is not empty, and nothing is overwritten" in again.err
    forced = run(["merge", where, "--force"], tmp_path, environment(tmp_path), module="pkuslurm")
    assert forced.code == 0, "what the run has made itself it may make again"
