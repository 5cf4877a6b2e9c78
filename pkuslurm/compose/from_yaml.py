"""from_yaml: a LLaMA-Factory YAML's keys as ours, between the presets and what is typed.

Read as LLaMA-Factory reads it: 1e-4 is a number, ``${…}`` and ``~`` stay as they are written, a relative path begins
where one stands. What it does not say keeps LLaMA-Factory's own default, so no preset of a model, of data or of a
training is mixed in unless it is typed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pkuslurm.compose import presets
from pkuslurm.compose.quoting import parsed
from pkuslurm.config.checks import CARRIED, OWNED
from pkuslurm.config.llamafactory import names
from pkuslurm.config.parse import show
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import command
from pkuslurm.preflight.nearest import nearest_to

KEY = "from_yaml"
# Groups of which no preset may be mixed in, and their choices that say nothing.
NEUTRAL = {"train": "auto", "dataset": "custom", "model": "custom"}
# LLaMA-Factory's keys that have a place of their own here.
OF_MODEL = {"model_name_or_path": "path", "template": "template", "adapter_name_or_path": "adapter"}
OF_DATASET = ("dataset", "dataset_dir", "eval_dataset", "media_dir")
# By these a YAML is told from an export's and from one to chat with.
_TRAINS = {"output_dir", "do_train", "do_eval", "do_predict", "dataset", "eval_dataset", "learning_rate"}
# What else people have as YAML.
_OTHERS = {
    "distributed_type": ", it is accelerate's own configuration",
    "export_dir": ", it is an export YAML",
    "model": ", it is of LLaMA-Factory's new trainer (v1), which is not run here",
}
# Megatron's, which LLaMA-Factory takes with USE_MCA=1 alone.
_MEGATRON = re.compile(
    r"\w+_model_parallel_size|context_parallel_size|sequence_parallel|moe_\w+|recompute_\w+|\w+_fusion|"
    r"use_distributed_optimizer|overlap_\w+|virtual_pipeline_\w+|account_for_\w+|export_hf_on_finish"
)
# Of lists and mappings in each other; LLaMA-Factory's own examples have four.
_DEPTH = 30
# LLaMA-Factory hands these to open() and to transformers, neither of which knows ~.
_PATHS = ("model_name_or_path", "adapter_name_or_path", "dataset_dir", "media_dir", "deepspeed", "export_dir")


@dataclass(frozen=True)
class Given:
    """``name``: the file as it was typed; ``content``: its keys; ``values``: as ours, nested; ``choices``: of the
    groups that were not typed; ``notes``: one line for each key that is not taken as it stands.
    """

    name: str
    content: Mapping[str, Any]
    values: Mapping[str, Any]
    choices: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def chosen(self) -> list[str]:
        return [f"{group}={choice}" for group, choice in self.choices.items()]


def given(typed: Sequence[str]) -> Given | None:
    """What the file that ``typed`` (overrides in Hydra's grammar) names says; None where it names none.

    Raises PkuslurmError, in one line, for what is no train YAML (of pipeline=merge: no export YAML).
    """
    said = {item.lstrip("+~").partition("=")[0]: item.partition("=")[2] for item in typed}
    read = parsed(said.get(KEY, "null"))
    name = None if read is None else read.value()
    if name is None:
        return None
    name = str(name)
    content = _read(name)
    if said.get("pipeline", "").strip("'\"") == "merge":
        return _Export(name, content, said).given()
    return _Train(name, content, said).given()


def _read(name: str) -> dict[str, Any]:
    """The file's keys, as LLaMA-Factory would get them."""
    file = Path(name).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise PkuslurmError(f"{KEY}={name}: it is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        near = nearest_to(file.absolute(), name)
        raise PkuslurmError(f"{KEY}={name}: it cannot be read ({error.strerror}){near}") from None
    try:
        # OmegaConf's loader, which LLaMA-Factory uses: 1e-4 is a number, a key that is there twice is refused
        content = json.loads(text) if file.suffix == ".json" else yaml.load(text, Loader=presets.yaml_loader())
    except yaml.YAMLError as error:
        raise PkuslurmError(f"{KEY}={presets.not_yaml(error, name)}") from None
    except RecursionError:
        raise PkuslurmError(f"{KEY}={name}: it is nested too deeply for arguments of LLaMA-Factory's") from None
    except (ValueError, LookupError, AttributeError) as error:  # the last two: PyYAML's, of !!bool x and !!timestamp x
        wrong = f"JSON ({error})" if file.suffix == ".json" else "YAML (a value is not of the type !!… before it)"
        raise PkuslurmError(f"{KEY}={name}: it is not {wrong}") from None
    if not isinstance(content, dict) or not content:
        what = "nothing" if content in (None, {}) else "a list" if isinstance(content, list) else "one text"
        raise PkuslurmError(f"{KEY}={name}: it holds {what}; LLaMA-Factory's arguments are wanted, key: value")
    odd = next((key for key in content if not isinstance(key, str)), None)
    if odd is not None:
        raise PkuslurmError(f"{KEY}={name}: {show(odd)} is no key of LLaMA-Factory's")
    for key, value in content.items():
        if not _is_plain(value):
            wanted = "a text, a number, true, false, null, or a list or mapping of them"
            raise PkuslurmError(f"{KEY}={name}: {key}={show(value)}: {wanted} is wanted")
    return content


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether ``value`` can be written down again: no set, no bytes, no half character, nothing that holds itself."""
    if depth > _DEPTH:
        return False
    if isinstance(value, dict):
        return all(isinstance(key, str | int | float) and _is_plain(item, depth + 1) for key, item in value.items())
    if isinstance(value, list):
        return all(_is_plain(item, depth + 1) for item in value)
    if isinstance(value, str):
        return not any("\ud800" <= letter <= "\udfff" for letter in value)
    return value is None or isinstance(value, int | float)


class _Mapped:
    """What both kinds of YAML have in common."""

    def __init__(self, name: str, content: Mapping[str, Any], said: Mapping[str, str]) -> None:
        self.name, self.content, self.said = name, content, said
        self.file = Path(name).name
        self.notes: list[str] = []

    def not_taken(self, key: str, why: str) -> None:
        self.notes.append(f"{self.file}: {key}: not taken; {why}")

    def typed(self, *keys: str) -> str | None:
        """Which of these keys or groups is typed, if one is."""
        return next((key for key in keys if self.said.get(key, "null").strip("'\"") not in ("null", "auto")), None)

    def model(self) -> dict[str, Any]:
        """model.*; a model that is typed as a preset, or is made here, is another than the YAML's."""
        other = self.typed("model", "model.make")
        values = {}
        for key, ours in OF_MODEL.items():
            value = self.content.get(key)
            if value is None:
                continue
            if isinstance(value, list):
                value = ",".join(map(str, value))
            if other is None:
                values[ours] = value
            elif f"model.{ours}" not in self.said:
                self.not_taken(key, f"{other}={self.said[other]} is typed")
        if self.content.get("trust_remote_code") is True and "model.trust_remote_code" not in self.said:
            why = "it runs Python code that comes with the model; type model.trust_remote_code=true where you trust it"
            self.not_taken("trust_remote_code", why)
        return values

    def owned(self, key: str, value: Any) -> bool:
        """Whether a run decides ``key`` itself; said, unless the YAML says nothing by it."""
        if key not in OWNED:
            return False
        if key not in OF_MODEL and key != "trust_remote_code" and value not in (None, False):
            way = OWNED[key]
            self.not_taken(key, way.removeprefix("nothing: ") if way.startswith("nothing: ") else f"here it is {way}")
        return True

    def finished(self, values: dict[str, Any]) -> Given:
        for key in _PATHS:
            value = self.content.get(key)
            if isinstance(value, str) and value.startswith("~/") and not Path(value).exists():
                raise PkuslurmError(f"{self.name}: {key}={value}: LLaMA-Factory knows no ~; write the whole path")
        choices = {group: choice for group, choice in NEUTRAL.items() if self.typed(group) is None}
        return Given(self.name, self.content, _literal(values), choices, tuple(self.notes))


class _Train(_Mapped):
    def given(self) -> Given:
        self._is_one()
        values: dict[str, Any] = {"model": self.model(), "dataset": {}, "train": {}}
        if (group := self.typed("train")) is not None:
            raise PkuslurmError(
                f"train={self.said[group]}: {self.name} says how it is trained; leave one out, or type single keys: "
                "train.lora_rank=16"
            )
        self._datasets(values)
        megatron = [key for key in self.content if _MEGATRON.fullmatch(key) and key not in names("train")]
        if megatron:
            values["train"]["use_mca"] = True
            self.not_taken(", ".join(megatron), "these are Megatron's")
        for key, value in self.content.items():
            if key in megatron:
                continue
            if key in CARRIED or (key not in OF_DATASET and not self.owned(key, value)):
                values["train"][key] = value
        if values["train"].setdefault("do_train", False) is True:  # as every run of ours
            del values["train"]["do_train"]
        if not {"report_to", "train.report_to"} & {*self.content, *self.said}:
            values["train"]["report_to"] = "none"
            self.notes.append(f"{self.file} says nothing of report_to: none (LLaMA-Factory may take all that is there)")
        if self.content.get("template") is None and not self.typed("model", "model.template"):
            self.notes.append(f"{self.file} says nothing of template: told by the model's files")
        return self.finished(values)

    def _is_one(self) -> None:
        keys = set(self.content)
        if "model_name_or_path" not in keys and not self.typed("model", "model.path", "model.make"):
            what = next((what for key, what in _OTHERS.items() if key in keys), "")
            raise PkuslurmError(f"{KEY}={self.name}: it names no model (model_name_or_path){what}; give a train YAML")
        if keys & _TRAINS:
            return
        if "export_dir" in keys:
            merge = command("merge", "--from-yaml", self.name)
            raise PkuslurmError(f"{KEY}={self.name}: it is an export YAML (export_dir); write: {merge}")
        if "model_name_or_path" in keys and "stage" not in keys:
            raise PkuslurmError(
                f"{KEY}={self.name}: it is a YAML to chat with (no data, no output_dir); write pipeline=infer "
                f"model.path={show(self.content['model_name_or_path'])} infer.adapter=… infer.prompts=[…]"
            )

    def _datasets(self, values: dict[str, Any]) -> None:
        """dataset.* and train.eval_dataset; the names are entries of one dataset_info.json."""
        there = [key for key in OF_DATASET if self.content.get(key) is not None]
        if (other := self.typed("dataset", "dataset.path")) is not None:
            for key in there:
                self.not_taken(key, f"{other}={self.said[other]} is typed")
            return
        trained, held_out = (self._names(key) for key in ("dataset", "eval_dataset"))
        if trained or held_out:
            values["dataset"]["path"] = self.content.get("dataset_dir", "data")
        if trained:
            values["dataset"]["name"] = ",".join(trained)
        if held_out:
            values["train"]["eval_dataset"] = ",".join(held_out)
        if (folder := self.content.get("media_dir")) is not None:
            values["dataset"]["media_dir"] = folder

    def _names(self, key: str) -> list[str]:
        value = self.content.get(key)
        listed = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
        if value is not None and not all(isinstance(one, str) and one.strip() for one in listed or [""]):
            raise PkuslurmError(f"{self.name}: {key}={show(value)}: names of datasets are wanted, with commas between")
        return [one.strip() for one in listed]


class _Export(_Mapped):
    def given(self) -> Given:
        if self.content.get("export_dir") is None:
            hint = f"; it trains: launch from_yaml={self.name}" if set(self.content) & _TRAINS else ""
            raise PkuslurmError(f"{KEY}={self.name}: it is no export YAML, which has export_dir{hint}")
        # what LLaMA-Factory takes where it is not said; our own default uses a device
        merge = {"export_device": "cpu"}
        for key, value in self.content.items():
            if key == "export_dir" or not self.owned(key, value):
                merge[key] = value
        return self.finished({"model": self.model(), "merge": merge})


def _literal(value: Any) -> Any:
    """``value`` as OmegaConf gives it back: a ${ is text for LLaMA-Factory, which resolves none."""
    if isinstance(value, Mapping):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
