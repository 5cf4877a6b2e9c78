"""What is wrong with a model folder, in one line; and where a hub id is found. The weights are a few bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import command
from pkuslurm.preflight.models import check_model, find_model, no_model

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"
INDEX = '{"weight_map": {"a": "model-1.safetensors"}}'


def safetensors(file: Path, cut: int = 0) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    whole = len(header).to_bytes(8, "little") + header + bytes(16)
    file.write_bytes(whole[: len(whole) - cut])


def whole(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    safetensors(folder / "model.safetensors")
    return folder


def parent(folder: Path) -> None:
    folder.rename(folder.with_name("inner"))
    folder.mkdir()
    folder.with_name("inner").rename(folder / "Qwen2.5")


def two(folder: Path) -> None:
    parent(folder)
    whole(folder / "Llama")


def hugging_face_cache(folder: Path) -> None:
    parent(folder)
    (folder / "snapshots").mkdir()
    (folder / "Qwen2.5").rename(folder / "snapshots" / "0a1b")


def adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/m/qwen"}', encoding="utf-8")
    safetensors(folder / "adapter_model.safetensors")


def only(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        (folder / name).write_bytes(b"weights")

    return change


def weights(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)

    return change


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8") and None


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


TORN = [
    (without("config.json"), "no config.json there"),
    (parent, "the model is one folder deeper; give model.path={folder}/Qwen2.5"),
    (two, "holds several models (Llama, Qwen2.5)"),
    (hugging_face_cache, "give model.path={folder}/snapshots/0a1b"),
    (adapter, "an adapter, not a model; give its base, model.path=/m/qwen"),
    (adapter, "pipeline=infer infer.adapter={folder}"),
    (only("model-q4.gguf"), "model-q4.gguf is a GGUF file"),
    (only("consolidated.00.pth"), "author's own form"),
    (write("config.json", "{'model_type': 'qwen2'}"), "config.json is not the JSON of a model"),
    (write("config.json", "[1]"), "an object with keys is wanted"),
    (write("config.json", '{"hidden_size": 4}'), "names no model_type"),
    (write("config.json", LFS), "config.json is git-lfs's note"),
    (without("model.safetensors"), "no *.safetensors there"),
    (weights("pytorch_model.bin"), "weights in .bin are pickles"),
    (weights("model.gguf"), "only GGUF weights are there"),
    (weights("consolidated.00.pth"), "only consolidated*.pth is there"),
    (write("model.safetensors", LFS), "run `git lfs pull`"),
    (write("model.safetensors", ""), "is cut short"),
    (lambda folder: safetensors(folder / "model.safetensors", cut=1), "is cut short"),
    (write("model.safetensors.index.json", INDEX), "model-1.safetensors is missing"),
    (without("tokenizer.json"), "no tokenizer there"),
    (write("tokenizer.json", LFS), "git-lfs's note"),
]  # fmt: skip


@pytest.mark.parametrize(("break_it", "message"), TORN, ids=[message for _, message in TORN])
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, break_it: Callable[[Path], None], message: str) -> None:
    folder = whole(tmp_path / "模型 (1)")
    break_it(folder)
    with pytest.raises(PkuslurmError) as caught:
        check_model(folder)
    assert message.format(folder=folder) in str(caught.value)
    assert str(caught.value).startswith("model.path") and "\n" not in str(caught.value)


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "tokenizer.model", "vocab.json", "qwen.tiktoken"])
def test_a_whole_model_passes(tmp_path: Path, tokenizer: str) -> None:
    folder = whole(tmp_path / "m")
    (folder / "tokenizer.json").rename(folder / tokenizer)
    check_model(folder)


def test_a_consolidated_copy_beside_the_shards_is_not_looked_at(tmp_path: Path) -> None:
    folder = whole(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(INDEX, encoding="utf-8")
    (folder / "consolidated.safetensors").write_bytes(b"half")
    check_model(folder)


NAME = "Qwen/Qwen2.5-1.5B-Instruct"
PLACES = [
    ({"PKUSLURM_MODELS": "m"}, f"m/{NAME}"),
    ({"PKUSLURM_MODELS": "m"}, "m/Qwen2.5-1.5B-Instruct"),
    ({"SCOW_AI_MODEL_PATH": "m/Qwen2.5-1.5B-Instruct"}, "m/Qwen2.5-1.5B-Instruct"),
    ({"MODELSCOPE_CACHE": "s"}, "s/models/Qwen/Qwen2___5-1___5B-Instruct"),
    ({"MODELSCOPE_CACHE": "s"}, "s/Qwen/Qwen2___5-1___5B-Instruct"),
    ({"MODELSCOPE_CACHE": "s"}, "s/hub/models/Qwen/Qwen2___5-1___5B-Instruct"),
    ({"HOME": "h"}, "h/.cache/modelscope/hub/models/Qwen/Qwen2___5-1___5B-Instruct"),
    ({"HOME": "h"}, "h/.cache/modelscope/models/Qwen--Qwen2.5-1.5B-Instruct/snapshots/master"),
    ({"MODELSCOPE_CACHE": "s"}, "s/models/Qwen--Qwen2.5-1.5B-Instruct/snapshots/v1"),
    ({"HOME": "h"}, f"h/.cache/pkuslurm/models/{NAME}"),
    ({"PKUSLURM_CACHE": "c"}, f"c/models/{NAME}"),
    ({"HOME": "h"}, "h/.cache/huggingface/hub/models--Qwen--Qwen2.5-1.5B-Instruct/snapshots/ab"),
    ({"HF_HOME": "f"}, "f/hub/models--Qwen--Qwen2.5-1.5B-Instruct/snapshots/ab"),
    ({"HF_HUB_CACHE": "f"}, "f/models--Qwen--Qwen2.5-1.5B-Instruct/snapshots/ab"),
]


@pytest.mark.parametrize(("environ", "place"), PLACES, ids=[place for _, place in PLACES])
def test_a_hub_id_is_found_where_models_are_kept(tmp_path: Path, environ: dict[str, str], place: str) -> None:
    folder = whole(tmp_path / place)
    found = find_model(NAME, {name: str(tmp_path / value) for name, value in environ.items()})
    assert found is not None and found.samefile(folder)


def test_an_existing_folder_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole(tmp_path / "m" / NAME)
    near = whole(tmp_path / NAME)
    assert find_model(NAME, {"PKUSLURM_MODELS": str(tmp_path / "m")}) == near.resolve()


def test_the_snapshot_of_main_is_taken_and_not_the_last_in_order(tmp_path: Path) -> None:
    repository = tmp_path / "models--Qwen--Qwen2.5-1.5B-Instruct"
    main = whole(repository / "snapshots" / "1111")
    whole(repository / "snapshots" / "ffff")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1111", encoding="utf-8")
    assert find_model(NAME, {"HF_HUB_CACHE": str(tmp_path)}) == main


def test_a_broken_download_is_passed_over_but_found_if_there_is_no_other(tmp_path: Path) -> None:
    environ = {"MODELSCOPE_CACHE": str(tmp_path / "s"), "HF_HUB_CACHE": str(tmp_path / "f")}
    half = whole(tmp_path / "s" / "models" / "Qwen" / "Qwen2___5-1___5B-Instruct")
    safetensors(half / "model.safetensors", cut=3)
    assert find_model(NAME, environ) == half
    good = whole(tmp_path / "f" / "models--Qwen--Qwen2.5-1.5B-Instruct" / "snapshots" / "ab")
    assert find_model(NAME, environ) == good


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ("LLM-Research/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("LLM-Research/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("ZhipuAI/GLM-4-9B-0414", "THUDM/GLM-4-9B-0414"),
    ],
)
def test_the_other_hubs_owner_is_the_same_model(tmp_path: Path, asked: str, kept: str) -> None:
    folder = whole(tmp_path / kept)
    assert find_model(asked, {"PKUSLURM_MODELS": str(tmp_path)}) == folder


def test_without_home_nothing_is_found_and_nothing_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    assert find_model(NAME, {}) is None and "looked in" not in no_model(NAME, {})
    assert find_model("~nobody-of-that-name/model", {}) is None
    assert find_model("x" * 5000, {}) is None


def test_of_a_name_that_is_nowhere_the_nearest_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole(tmp_path / "models" / "小千问")
    said = no_model("models/小千", {})
    assert f"no such folder ({tmp_path}/models/小千)" in said and "; did you mean models/小千问?" in said
    assert no_model("./models/小千", {}).split(";")[1] == " did you mean models/小千问?"
    assert "modles is missing already; did you mean models?" in no_model("modles/a/小千", {})
    for name in ("models/小千", "models/b", "通义/千问", "a/b/c", "./a"):
        assert "fetch" not in no_model(name, {}), "no hub has it, or it is a folder's name"
    assert no_model(NAME, {"HOME": "/h"}).endswith(f"get it with: {command('fetch', NAME)}")
