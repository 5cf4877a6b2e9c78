"""model.template=auto, and templates whose tokens a model lacks. The models are folders of a few small JSON files."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkuslurm.compose import compose
from pkuslurm.config.llamafactory import names, snapshots
from pkuslurm.config.schema import Model
from pkuslurm.errors import PkuslurmError
from pkuslurm.preflight.models import HUB_ID
from pkuslurm.preflight.templates import check_template, choose_template

REPO = Path(__file__).parents[2]
CHATML = "{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
THINKING = CHATML + "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
LLAMA3 = "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + content + '<|eot_id|>' }}"
DEEPSEEK = "{{ '<｜User｜>' + content }}{{ '<｜Assistant｜>' }}"
R1 = "{% set content = content.split('</think>')[-1] %}" + DEEPSEEK
GEMMA = "{{ '<start_of_turn>' + role + '\n' + content + '<end_of_turn>\n' }}"
GLM = "[gMASK]<sop>{{ '<|user|>\n' + content }}{{ '<|assistant|>' }}"


def model(folder: Path, model_type: str, chat: str | None = None, tokens: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    added = {str(number): {"content": token} for number, token in enumerate(tokens)}
    settings: dict[str, Any] = {"added_tokens_decoder": added}
    if chat is not None:
        settings["chat_template"] = chat
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    words = {"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": [{"content": token} for token in tokens]}
    (folder / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("model_type", "chat", "template"),
    [
        ("qwen2", CHATML, "qwen"),
        ("qwen2_moe", CHATML, "qwen"),
        ("qwen3", THINKING, "qwen3"),
        ("qwen3", CHATML, "qwen3_nothink"),
        ("qwen2_5_vl", CHATML, "qwen2_vl"),
        ("qwen2", R1, "deepseekr1"),
        ("llama", R1, "deepseekr1"),
        ("deepseek_v3", DEEPSEEK, "deepseek3"),
        ("llama", LLAMA3, "llama3"),
        ("llama", "{{ '[INST] <<SYS>>\n' + content + ' [/INST]' }}", "llama2"),
        ("mistral", "{{ '[INST] ' + content + ' [/INST]' }}", "mistral"),
        ("mistral", "{{ '[INST]' + content + '[/INST]' }}", "ministral"),
        ("gemma", GEMMA, "gemma"),
        ("gemma2", GEMMA, "gemma2"),
        ("gemma3", GEMMA, "gemma3"),
        ("glm4", GLM, "glm4"),
        ("chatglm", GLM, "glm4"),
        ("internlm2", CHATML, "intern2"),
        ("phi3", "{{ '<|user|>\n' + content + '<|end|>\n<|assistant|>\n' }}", "phi"),
        ("phi3", "{{ '<|' + message['role'] + '|>' + content + '<|end|>' }}", "phi4_mini"),
        ("phi3", "{{ '<|im_start|>user<|im_sep|>' + content + '<|im_end|>' }}", "phi4"),
        ("baichuan", "{{ '<reserved_106>' + content + '<reserved_107>' }}", "baichuan2"),
        ("something_new", CHATML, "chatml"),
    ],
)
def test_chat_template_and_model_type_decide(tmp_path: Path, model_type: str, chat: str, template: str) -> None:
    choice = choose_template(model(tmp_path / "my model", model_type, chat), "my model")
    assert choice.template == template
    assert model_type in choice.why
    assert template in names("templates")


@pytest.mark.parametrize(
    ("model_type", "chat", "candidates"),
    [
        ("llama", CHATML, ["yi", "chatml"]),
        ("qwen3", CHATML + "{% if '</think>' in content %}{% endif %}", ["qwen3", "qwen3_nothink"]),
        ("qwen3", None, ["qwen3", "qwen3_nothink"]),
        ("llama", None, ["default", "llama3"]),
    ],
)
def test_where_several_fit_they_are_named(
    tmp_path: Path, model_type: str, chat: str | None, candidates: list[str]
) -> None:
    folder = model(tmp_path / "mine", model_type, chat, ("<|im_end|>", "<|eot_id|>"))
    with pytest.raises(PkuslurmError, match="several fit") as caught:
        choose_template(folder, "mine")
    message = str(caught.value)
    assert f"candidates are {', '.join(candidates)}" in message
    assert f"write model.template={candidates[0]}" in message and "\n" not in message


def test_where_none_fits_the_reason_is_said(tmp_path: Path) -> None:
    folder = model(tmp_path / "mine", "mamba", "{{ '@@' + content }}")
    with pytest.raises(PkuslurmError, match="model_type mamba, a chat template of no known family"):
        choose_template(folder, "mine")


def test_a_name_that_llama_factory_lists_settles_what_several_fit(tmp_path: Path) -> None:
    assert choose_template(model(tmp_path / "Yi-1.5-6B-Chat", "llama", CHATML), "x").template == "yi"
    plain = model(tmp_path / "hash", "llama", None, ("<|eot_id|>",))
    choice = choose_template(plain, "meta-llama/Llama-3.2-1B-Instruct")
    assert (choice.template, choice.why) == ("llama3", "LLaMA-Factory's for Llama-3.2-1B-Instruct")
    cached = tmp_path / "models--Qwen--Qwen3-4B-Instruct-2507" / "snapshots" / "0f3a"
    assert choose_template(model(cached, "qwen3"), str(cached)).template == "qwen3_nothink"
    assert choose_template(model(tmp_path / "Qwen2___5-7B-Instruct", "qwen2"), "x").template == "qwen"


def test_the_chat_template_wins_over_a_name_that_contradicts_it(tmp_path: Path) -> None:
    assert choose_template(model(tmp_path / "Llama-3.2-1B-Instruct", "qwen2", CHATML), "x").template == "qwen"


def test_a_base_model_of_one_family_takes_its_template_if_it_has_the_tokens(tmp_path: Path) -> None:
    assert choose_template(model(tmp_path / "one", "qwen2", None, ("<|im_end|>",)), "one").template == "qwen"
    with pytest.raises(PkuslurmError, match="no chat template"):
        choose_template(model(tmp_path / "two", "qwen2"), "two")


def test_chat_templates_are_found_in_a_file_of_their_own_and_among_named_ones(tmp_path: Path) -> None:
    folder = model(tmp_path / "a", "qwen2")
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    assert choose_template(folder, "a").template == "qwen"
    folder = model(tmp_path / "b", "llama")
    named = [{"name": "tool_use", "template": CHATML}, {"name": "default", "template": LLAMA3}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    assert choose_template(folder, "b").template == "llama3"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("llama3", "has no <|eot_id|>; model.template=qwen fits"),
        ("chatglm3", "has no <|user|>"),
        ("gemma", "has no <end_of_turn>"),
    ],
)
def test_a_template_whose_tokens_the_model_lacks_is_refused(tmp_path: Path, template: str, message: str) -> None:
    folder = model(tmp_path / "qwen", "qwen2", CHATML, ("<|im_start|>", "<|im_end|>"))
    with pytest.raises(PkuslurmError) as caught:
        check_template(folder, template)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_markers_that_become_plain_text_are_a_warning(tmp_path: Path) -> None:
    folder = model(tmp_path / "qwen", "qwen2", CHATML, ("<|im_start|>", "<|im_end|>"))
    (warning,) = check_template(folder, "deepseek3")
    assert "<｜User｜> <｜Assistant｜>" in warning and "plain text" in warning


@pytest.mark.parametrize("template", ["qwen", "chatml", "default", "llama2", "a name that nobody knows"])
def test_a_template_that_fits_is_quiet(tmp_path: Path, template: str) -> None:
    folder = model(tmp_path / "qwen", "qwen2", CHATML, ("<|im_start|>", "<|im_end|>"))
    assert check_template(folder, template) == []


def test_tokens_of_the_vocabulary_itself_count(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "llama", LLAMA3)
    for vocabulary in ({"<|eot_id|>": 1, "<|start_header_id|>": 2, "<|end_header_id|>": 3}, [["<|eot_id|>", -1.0]]):
        words = {"model": {"vocab": vocabulary}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
        assert len(check_template(folder, "llama3")) == (0 if isinstance(vocabulary, dict) else 1)


def test_a_tokenizer_that_cannot_be_read_here_is_not_judged(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "llama", LLAMA3)
    (folder / "tokenizer.json").unlink()
    assert check_template(folder, "qwen") == []


def test_the_table_says_what_the_installed_llama_factory_does() -> None:
    """Regenerate with tests/tools/snapshot_templates.py when this fails."""
    spec = find_spec("llamafactory")
    assert spec is not None and spec.submodule_search_locations is not None, "make test installs it"
    sys.path.insert(0, str(REPO / "tests" / "tools"))
    try:
        from snapshot_templates import read_models, read_templates
    finally:
        sys.path.pop(0)
    from importlib.metadata import version

    table = json.loads((REPO / "pkuslurm" / "preflight" / "templates.json").read_text(encoding="utf-8"))
    installed = version("llamafactory")
    assert installed in table["versions"]
    folder = Path(next(iter(spec.submodule_search_locations)))
    for name, facts in read_templates(folder).items():
        known = table["templates"][name]
        assert installed in known["versions"], name
        if known["versions"][-1] == installed:
            assert {key: known[key] for key in facts} == facts, name
    assert read_models(folder).items() <= table["models"].items()


PRESETS = sorted(
    file for file in (REPO / "conf" / "model").glob("*.yaml") if file.stem not in ("auto", "custom", "tiny")
)


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_a_preset_has_a_hub_id_the_template_that_llama_factory_lists_for_it_and_settings(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    assert text.startswith("# @package _global_\n") and len(text.splitlines()) <= 12
    assert set(values) == {"model", "train"} and set(values["model"]) <= set(Model.__dataclass_fields__)
    path, template = values["model"]["path"], values["model"]["template"]
    assert HUB_ID.fullmatch(path)
    assert path.rpartition("/")[2].lower().removeprefix("meta-") == file.stem
    assert all(template in version.templates for version in snapshots())
    table = json.loads((REPO / "pkuslurm" / "preflight" / "templates.json").read_text(encoding="utf-8"))
    assert table["models"][path.rpartition("/")[2].lower()] == template
    # a template for thinking models, and answers without thoughts
    assert ("enable_thinking" in values["train"]) == table["templates"][template]["thinking"]
    assert 1e-5 <= compose([f"model={file.stem}"]).config.train["learning_rate"] <= 2e-4
    assert values["train"]["per_device_train_batch_size"] * values["train"]["gradient_accumulation_steps"] == 8


def test_both_snapshots_tell_of_the_same_templates() -> None:
    table = json.loads((REPO / "pkuslurm" / "preflight" / "templates.json").read_text(encoding="utf-8"))["templates"]
    for version in snapshots():
        assert version.templates == {name for name, facts in table.items() if version.llamafactory in facts["versions"]}
