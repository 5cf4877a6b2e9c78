"""Every command in the READMEs is a command that exists; both READMEs name the same ones."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pkuslurm.cli import HELPS, _parser
from pkuslurm.compose import compose, compose_sweep
from tests.conftest import REPO


def commands(name: str) -> list[str]:
    text = (REPO / name).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    inline = re.findall(r"`((?:\.venv/bin/|make )[^`]+)`", text)
    return [line.strip() for line in [*blocks.splitlines(), *inline] if line.strip()]


ALL = sorted({line for name in ("README.md", "README.en.md") for line in commands(name)})


@pytest.mark.parametrize("line", ALL)
def test_every_command_of_the_readme_exists(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    # a user's own, for from_yaml; tests/test_yaml_runs.py runs such ones
    (tmp_path / "my_train.yaml").write_text("model_name_or_path: m\nstage: sft\ndo_train: true\ndataset: d\n")
    monkeypatch.chdir(tmp_path)
    if words[0] == "make":
        makefile = (REPO / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[1]}:.*##", makefile, re.MULTILINE)
        if words[1] in HELPS:  # a verb
            # `make test` runs this, and a make below a make would tell its folder
            line = ["make", "-n", "--no-print-directory", *words[1:], "PY=python"]
            made = subprocess.run(line, cwd=REPO, capture_output=True, text=True)
            _parser().parse_args(shlex.split(made.stdout.splitlines()[-1])[3:])
        return
    if words[0] == "sbatch":
        script = next(word for word in words if word.endswith(".sbatch"))
        assert (REPO / script).is_file()  # tests/cluster/test_real.py submits it
        return
    assert words[:2] == [".venv/bin/python", "-m"]
    if words[2] == "pkuslurm.launch":
        if "-m" in words[3:]:
            compose_sweep([word for word in words[3:] if word != "-m"])
        else:
            compose(words[3:])
    else:
        assert words[2] == "pkuslurm"
        _parser().parse_args(words[3:])


def test_the_defaults_that_the_readmes_show_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = {
        re.findall(r"```yaml\n(.*?)```", (REPO / name).read_text(encoding="utf-8"), re.DOTALL)[0]
        for name in ("README.md", "README.en.md")
    }
    (tmp_path / "defaults.yaml").write_text(shown, encoding="utf-8")
    monkeypatch.setenv("PKUSLURM_CONF", str(tmp_path))
    config = compose(["nodes=2"]).config
    assert (config.cluster.executor, config.cluster.partition, config.run_root) == ("slurm", "npu", "/data/me/runs")


def test_both_languages_show_the_same_commands() -> None:
    shape = [[re.split("prompts=| RUN=", line)[0] for line in commands(name)] for name in ("README.md", "README.en.md")]
    assert shape[0] == shape[1]
