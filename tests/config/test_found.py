"""The LLaMA-Factory of an interpreter is found by its files: venv, overlay, system packages, conda, editable, links."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pkuslurm.config.llamafactory import snapshot, to_json
from pkuslurm.config.schema import Config
from pkuslurm.errors import PkuslurmError
from pkuslurm.preflight.arguments import extract, keys_of
from pkuslurm.preflight.llamafactory import check_deepspeed, deepspeed_config, installed, look, packages_of


def packages(prefix: Path, python: str = "python3.11") -> Path:
    folder = prefix / "lib" / python / "site-packages"
    folder.mkdir(parents=True)
    return folder


def program(prefix: Path, target: Path | None = None, name: str = "python") -> Path:
    file = prefix / "bin" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if target is None:
        file.write_text("#!/bin/sh\n", encoding="utf-8")
    else:
        file.symlink_to(target)
    return file


def venv(prefix: Path, base: Path, system: bool = False) -> Path:
    python = program(prefix, base)
    settings = f"home = {base.parent}\ninclude-system-site-packages = {'true' if system else 'false'}\n"
    (prefix / "pyvenv.cfg").write_text(settings, encoding="utf-8")
    return python


def test_a_venv_is_not_left_by_its_link(weird: Path) -> None:
    base = program(weird / "base", name="python3.11")
    packages(weird / "base")
    python = venv(weird / "venv", base)
    own = packages(weird / "venv")
    assert packages_of(str(python)) == [own]


def test_an_overlay_counts_before_what_it_lies_over(weird: Path) -> None:
    base = program(weird / "base", name="python3.11")
    below = packages(weird / "venv")
    python = venv(weird / "overlay", base)
    own = packages(weird / "overlay")
    (own / "below.pth").write_text(f"# over\nimport nothing\n{below}\n/no/such/folder\n", encoding="utf-8")
    assert packages_of(str(python)) == [own, below]


def test_system_packages_of_a_venv_that_wants_them(weird: Path) -> None:
    base = program(weird / "base", name="python3.11")
    system = packages(weird / "base")
    python = venv(weird / "venv", base, system=True)
    own = packages(weird / "venv")
    assert packages_of(str(python)) == [own, system]


def test_conda_and_a_link_from_elsewhere(weird: Path) -> None:
    conda = program(weird / "envs" / "lf", name="python3.12")
    own = packages(weird / "envs" / "lf", "python3.12")
    packages(weird / "envs" / "lf", "python3.9")
    assert packages_of(str(conda)) == [own]
    link = program(weird / "home", conda, name="py")
    assert packages_of(str(link)) == [own]


def test_editable_installations(weird: Path) -> None:
    base = program(weird / "base", name="python3.11")
    python = venv(weird / "venv", base)
    own = packages(weird / "venv")
    (weird / "src" / "llamafactory").mkdir(parents=True)
    (own / "__editable__.llamafactory-0.9.4.pth").write_text(
        "import __editable___llamafactory_0_9_4_finder; x()\n", encoding="utf-8"
    )
    mapping = {"llamafactory": str(weird / "src" / "llamafactory")}
    (own / "__editable___llamafactory_0_9_4_finder.py").write_text(
        f"MAPPING: dict[str, str] = {mapping!r}\n", encoding="utf-8"
    )
    assert packages_of(str(python)) == [own, weird / "src"]


def test_nothing_there_is_nothing_known(weird: Path) -> None:
    assert packages_of(str(weird / "no" / "python")) == []
    assert packages_of(str(program(weird / "base"))) == []
    assert keys_of([]) is None
    half = packages(weird / "half")
    (half / "llamafactory").mkdir()
    (half / "llamafactory" / "__init__.py").touch()
    assert keys_of([half]) is None


def small_installation(folder: Path, version: str) -> None:
    """Source in the shape of LLaMA-Factory's and transformers', with everything that types are written with."""
    files = {
        "transformers/__init__.py": '__version__ = "9.1.0"\n',
        "transformers/training_args.py": (
            "class OptimizerNames(ExplicitEnum):\n    ADAM = 'adam'\n    SGD = 'sgd'\n"
            "class TrainingArguments:\n"
            "    optim: Union[OptimizerNames, str] = field(default='adam')\n"
            "    rate: float = field(default=5e-5)\n"
            "    steps: Optional[int] = field(default=None)\n"
            "    extra: Optional[Union[dict, str]] = None\n"
            "    config: Optional[SomethingElse] = None\n"
            "    hidden: int = field(init=False, default=3)\n"
        ),
        "transformers/training_args_seq2seq.py": "",
        "transformers/trainer_utils.py": "",
        "transformers/debug_utils.py": "",
        "llamafactory/__init__.py": "",
        "llamafactory/extras/env.py": f'VERSION = "{version}"\n',
        "llamafactory/extras/constants.py": "class Engine(str, Enum):\n    HF = 'huggingface'\n",
        "llamafactory/hparams/training_args.py": "",
        "llamafactory/hparams/model_args.py": (
            "class ModelArguments:\n    engine: Engine = field(default=Engine.HF)\n    names: 'str | None' = None\n"
        ),
        "llamafactory/hparams/data_args.py": (
            "class DataArguments:\n"
            "    way: Literal['a', 'b'] | None = field(default=None)\n"
            "    targets: str = field(default='all')\n"
            "    def __post_init__(self):\n        self.targets = split_arg(self.targets)\n"
        ),
        "llamafactory/hparams/finetuning_args.py": "",
        "llamafactory/hparams/generating_args.py": "",
        "llamafactory/data/template.py": "register_template(name='mine')\n",
    }
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def test_a_version_without_snapshot_is_read_from_its_source(weird: Path) -> None:
    folder = packages(weird / "venv")
    small_installation(folder, "1.2.3")
    keys = keys_of([folder])
    assert keys is not None
    assert keys.version == "LLaMA-Factory 1.2.3 (transformers 9.1)"
    assert to_json(keys) == {
        "transformers": "9.1.0",
        "train": {
            "config": {"types": []},
            "engine": {"types": ["str"], "choices": ["huggingface"], "default": "huggingface"},
            "extra": {"types": ["dict", "str", "null"]},
            "names": {"types": ["str", "null"]},
            "optim": {"types": ["str"], "choices": ["adam", "sgd"], "default": "adam"},
            "rate": {"types": ["float"], "default": 5e-5},
            "steps": {"types": ["int", "null"]},
            "targets": {"types": ["str", "list"], "default": "all"},
            "way": {"types": ["str", "null"], "choices": ["a", "b"]},
        },
        "export": ["engine", "names", "targets", "way"],
        "templates": ["mine"],
    }


def test_a_known_version_with_another_transformers_is_read_from_its_source(weird: Path) -> None:
    folder = packages(weird / "venv")
    small_installation(folder, "0.9.5")
    keys = keys_of([folder])
    assert keys is not None and "optim" in keys.keys and "stage" not in keys.keys


def test_the_snapshot_is_what_is_installed_here() -> None:
    """`python tests/tools/snapshot_keys.py SITE_PACKAGES` writes it anew."""
    folders = packages_of(sys.executable)
    fresh = extract(folders)
    kept = snapshot(fresh.llamafactory)
    assert kept is not None and to_json(kept) == to_json(fresh)
    assert keys_of(folders) is kept


def config(python: str | None, **values: Any) -> Config:
    cluster = SimpleNamespace(accelerator="npu", python=python)
    container = SimpleNamespace(runtime=values.get("runtime", "none"), llamafactory=values.get("version"))
    train = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    dry_run = values.get("dry_run", False)
    return cast(Config, SimpleNamespace(cluster=cluster, container=container, train=train, dry_run=dry_run))


def test_what_is_known_before_a_run(weird: Path) -> None:
    here = look(config(None))
    assert here.keys is not None and here.keys.llamafactory == "0.9.5"
    assert here.installed is not None and "torch" in here.installed
    assert here.accelerator == "npu" and here.zero3
    assert look(config(sys.executable)).keys is here.keys
    assert look(config(None, dry_run=True)).installed is None
    elsewhere = look(config(str(weird / "no" / "python")))
    assert elsewhere.keys is None and elsewhere.installed is None
    image = look(config(None, runtime="apptainer", version="0.9.4"))
    assert image.keys is snapshot("0.9.4") and image.installed is None
    assert look(config(None, runtime="apptainer")).keys is None


def test_distributions_by_name(weird: Path) -> None:
    for name in ("rouge_chinese-1.0.dist-info", "Torch-2.7.1.dist-info", "galore_torch-1.0-py3.11.egg-info"):
        (weird / name).mkdir()
    assert installed([weird]) == {"rouge-chinese": "1.0", "torch": "2.7.1", "galore-torch": "1.0-py3.11"}


def test_deepspeeds_configuration(weird: Path) -> None:
    file, broken = weird / "ds.json", weird / "broken.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}), encoding="utf-8")
    broken.write_text("{", encoding="utf-8")
    assert deepspeed_config(str(file)) == deepspeed_config({"zero_optimization": {"stage": 3}})
    assert deepspeed_config('{"zero_optimization": {"stage": 3}}') == deepspeed_config(str(file))
    assert deepspeed_config(None) is None and deepspeed_config("auto") is None
    check_deepspeed(str(file))
    check_deepspeed(None)
    with pytest.raises(PkuslurmError, match="there is no such file"):
        check_deepspeed(str(weird / "none.json"))
    with pytest.raises(PkuslurmError, match="it must be a JSON object"):
        check_deepspeed(str(broken))
