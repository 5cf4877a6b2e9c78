"""Settings: each with the value, the default and whoever set it."""

from __future__ import annotations

from pathlib import Path

from pkuslurm.compose import compose, show


def test_settings_name_their_origin() -> None:
    origins = {item.key: item.origin for item in compose(["experiment=tutorial10", "train.max_samples=5"]).settings}
    assert origins["cluster.gres"] == "cluster=ascend"
    assert origins["train.max_samples"] == "command line"
    assert origins["nodes"] == "experiment=tutorial10"
    assert "train.cutoff_len" in origins and "train.save_steps" not in origins


def test_a_default_of_another_model_is_no_change() -> None:
    keys = {item.key for item in compose(["model.path=/m", "dataset.path=/d.json"]).settings}
    assert "model.path" in keys and not any(key.startswith("train.") for key in keys)


def test_nothing_typed_nothing_shown() -> None:
    assert show(compose([]).settings) == ""


def test_a_setting_is_shown_in_one_line() -> None:
    default = compose([]).config.train["learning_rate"]
    shown = show(compose(["train.learning_rate=5e-5", "nodes=2", "infer.expect=null"]).settings)
    assert f"train.learning_rate = 5e-05  (default {default}; command line)\n" in shown
    assert "nodes = 2  (default 1; command line)\n" in shown
    assert "infer.expect = null  (default 北大|北京大学|PKU; command line)\n" in shown


def test_a_yaml_is_compared_with_no_preset_that_would_never_have_applied(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    text = "model_name_or_path: m\ntemplate: qwen\ndataset: d\noutput_dir: o\nlearning_rate: 0.005\n"
    file.write_text(text, encoding="utf-8")
    found = {item.key: (item.default, item.origin) for item in compose([f"from_yaml={file}", "nodes=2"]).settings}
    assert found["train.learning_rate"] == (None, str(file)), "the demo's rate is nobody's default here"
    assert found["nodes"] == (1, "command line")
    assert {origin for _, origin in found.values()} == {"command line", str(file)}
