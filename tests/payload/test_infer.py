"""The answers: what is asked, in which order, and what is made of it."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.payload import answers, infer, models
from pkuslurm.payload.token_ids import compare_ids
from tests.payload import small_models
from tests.payload.small_models import KINDS, PROMPTS, TEMPLATES, Flow, infer_job, merge_job, start

WEIRD = "a 'quoted\" $(touch x) 我的 模型"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def flows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Flow]:
    folder = tmp_path_factory.mktemp("flows") / WEIRD
    folder.mkdir()
    return small_models.make_flows(folder)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that passes for a model of 6 numbers."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 12)
    return folder


# --- real models


@pytest.mark.real
def test_code_beside_a_model_is_run_neither_by_merge_nor_by_infer(flows: dict[str, Flow], tmp_path: Path) -> None:
    """*.py that a tokenizer's and, of those that are asked, a model's config names; pickles beside the adapter."""
    flow, canary = flows["llama"], tmp_path / "ran"
    base, adapter, run = (tmp_path / name for name in ("base", "adapter", "run"))
    shutil.copytree(flow.base, base)
    shutil.copytree(flow.adapter, adapter)
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        (adapter / name).write_bytes(f"cos\nmkdir\n(V{canary}\ntR.".encode())  # a pickle that makes the folder
    named(base, canary, "tokenizer_config.json", {"AutoTokenizer": ["tokenization_evil.Evil", None]})
    ended = start(merge_job(run, base, adapter, export_size=1))
    assert ended.returncode == 0 and not canary.exists(), ended.stderr
    for folder in (base, run / "merged"):
        named(
            folder, canary, "config.json", {"AutoConfig": "model_evil.Evil", "AutoModelForCausalLM": "model_evil.Evil"}
        )
    ended = start(infer_job(run, TEMPLATES["llama"], run / "merged", base, adapter))
    assert ended.returncode == 0 and not canary.exists(), ended.stderr
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert answers == flow.answers()


def named(folder: Path, canary: Path, file: str, auto_map: dict[str, Any]) -> None:
    """Code that makes ``canary``, and a config that asks for it."""
    for name in ("model_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n", encoding="utf-8")
    known = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps(known | {"auto_map": auto_map}), encoding="utf-8")


@pytest.mark.real
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_plain_transformers(flows: dict[str, Flow], kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flow = flows[kind]
    tokenizer = AutoTokenizer.from_pretrained(flow.merged)
    answers = flow.answers()
    # the template chatml also stops at the begin of a turn, which no file of the model says
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"] if kind == "llama" else ["<|im_end|>"])
    for folder, column in ((flow.merged, "tuned"), (flow.base, "base")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        plain = []
        for prompt in PROMPTS:
            messages = [{"role": "user", "content": prompt["prompt"]}]
            if prompt["system"]:
                messages.insert(0, {"role": "system", "content": prompt["system"]})
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
            )
            made = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=stops)
            plain.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
        assert [answer[column] for answer in answers] == plain
    assert len({answer["tuned"] for answer in answers}) > 3


@pytest.mark.real
@pytest.mark.parametrize("kind", KINDS)
def test_facts(flows: dict[str, Flow], kind: str) -> None:
    flow = flows[kind]
    facts, answers = flow.result("infer"), flow.answers()
    assert [answer["prompt"] for answer in answers] == [prompt["prompt"] for prompt in PROMPTS]
    assert [answer["passed"] for answer in answers] == [True, False, None, None, None]
    assert [set(answer) - {"prompt", "base", "tuned", "passed"} for answer in answers] == [
        {"system"} if prompt["system"] else set() for prompt in PROMPTS
    ]
    assert any(answer["base"] != answer["tuned"] for answer in answers)
    assert (facts["prompts"], facts["passed"], facts["dtype"]) == (5, 1, "float32")
    assert facts["token_ids_equal"] == [5, 5]
    equal, of = facts["adapter_merged_equal"]
    assert of == 5
    assert len(facts["differences"]) == 5 - equal
    if kind == "qwen2":
        # an fp32 merge is not rounded
        assert equal == 5
        assert facts["max_logit_diff"] < 1e-3
    assert facts["max_logit_diff"] < 1
    lines = (flow.run / "infer.err").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("base ")] == ["base 2/5", "base 4/5", "base 5/5"]


@pytest.mark.real
def test_a_tuned_model_alone(flows: dict[str, Flow], tmp_path: Path) -> None:
    flow = flows["qwen2"]
    job = infer_job(tmp_path, TEMPLATES["qwen2"], flow.merged, None, None)
    job["payload"]["default_system"] = "Be brief."
    ended = start(job)
    assert ended.returncode == 0, ended.stderr
    facts = json.loads((tmp_path / "results" / "infer.json").read_text(encoding="utf-8"))
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert facts["adapter_merged_equal"] is None
    assert facts["max_logit_diff"] is None
    assert facts["token_ids_equal"] == [5, 5] and facts["template_difference"] is None
    assert {answer["base"] for answer in answers} == {None}
    # the system prompt of the training counts where a prompt has none of its own
    theirs = flow.answers()
    assert [one["tuned"] == other["tuned"] for one, other in zip(answers, theirs, strict=True)][3]
    assert answers != theirs


# --- refusals


def test_refusals(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(job: dict[str, Any]) -> str:
        with pytest.raises(SystemExit) as raised:
            infer.main(job)
        assert raised.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    run = tmp_path / "run"
    job = infer_job(run, "qwen", model, None, None)
    job["payload"]["prompts"] = [{"prompt": "hi", "system": None, "expect": "(北大"}]
    assert "(北大" in refused(job)
    assert "tuned" in refused(infer_job(run, "qwen", tmp_path / "none", None, None))
    assert "base" in refused(infer_job(run, "qwen", model, tmp_path / "none", None))
    assert "adapter_config.json" in refused(infer_job(run, "qwen", model, model, model))


def test_three_models_are_asked_from_two_loads(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is freed before the merged folder is loaded, which is asked as any other program would find it."""
    done: list[str] = []

    class Loaded:
        def eval(self) -> Loaded:
            return self

    class Asker:
        ids, dtype, tokenizer = [[1]], "float32", types.SimpleNamespace(decode=str)

        def __init__(self, payload: dict[str, Any], tuned: Path, base: Path | None) -> None:
            pass

        def load(self, folder: Path) -> Loaded:
            done.append(f"load {folder.name}")
            return Loaded()

        def ask(self, loaded: Loaded, name: str) -> answers.Answers:
            done.append(f"ask {name}")
            return answers.Answers([name])

        def saved_ids(self) -> list[list[int] | None]:
            return [[1]]

    def over(loaded: Loaded, folder: Path) -> Loaded:
        done.append("adapter")
        return loaded

    shutil.copytree(model, tmp_path / "merged")
    peft = types.SimpleNamespace(PeftModel=types.SimpleNamespace(from_pretrained=over))
    monkeypatch.setitem(sys.modules, "peft", peft)
    monkeypatch.setattr(infer, "Asker", Asker)
    monkeypatch.setattr(infer, "check_adapter", lambda name, folder: Path(folder))
    monkeypatch.setattr(infer, "free_memory", lambda: done.append("free"))
    job = infer_job(tmp_path / "run", "qwen", tmp_path / "merged", model, tmp_path / "adapter")
    job["payload"]["prompts"] = [{"prompt": "hi"}]
    infer.main(job)
    assert done == ["load model", "ask base", "adapter", "ask adapter", "free", "load merged", "ask tuned"]


# --- the parts


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_batches_are_sorted_and_their_order_restored(size: int) -> None:
    lengths = [5, 1, 4, 1, 3, 9, 2]
    seen: list[int] = []
    reports: list[int] = []

    def batch(indices: Sequence[int]) -> list[str]:
        assert 1 <= len(indices) <= size
        seen.extend(indices)
        return [f"answer {index}" for index in indices]

    assert infer.in_batches(lengths, size, batch, reports.append) == [f"answer {index}" for index in range(7)]
    assert [lengths[index] for index in seen] == sorted(lengths)
    assert reports[-1] == 7
    assert infer.in_batches([], size, batch) == []


def test_expectations() -> None:
    assert answers.passes(None, "anything") is None
    assert answers.passes("北大|PKU", "我是北大的助手") is True
    assert answers.passes("^PKU$", "PKU!") is False
    # searched, not matched; and text is no pattern
    assert answers.passes("b", "abc") is True
    assert answers.passes(r"\(a\)", "(a)") is True
    assert answers.count_passed([{"passed": None}]) is None
    assert answers.count_passed([{"passed": False}, {"passed": None}]) == 0
    assert answers.count_passed([{"passed": True}, {"passed": False}]) == 1


def test_answer_lines() -> None:
    prompts = [{"prompt": "a", "system": "s", "expect": "x"}, {"prompt": "b", "system": None}, {"prompt": "c"}]
    assert answers.answer_lines(prompts, None, ["x", "y", "z"]) == [
        {"prompt": "a", "system": "s", "base": None, "tuned": "x", "passed": True},
        {"prompt": "b", "base": None, "tuned": "y", "passed": None},
        {"prompt": "c", "base": None, "tuned": "z", "passed": None},
    ]
    assert [line["base"] for line in answers.answer_lines(prompts, ["1", "2", "3"], ["x", "y", "z"])] == ["1", "2", "3"]


def test_write_lines(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text("old")
    lines = [{"prompt": "a\n\u2028\u2029\x85b", "tuned": '北大 "\\" \ud800'}, {"prompt": "2"}]
    answers.write_lines(file, lines)
    text = file.read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == lines
    assert "北大" in text
    assert [entry.name for entry in tmp_path.iterdir()] == ["answers.jsonl"]


def test_compare_without_an_adapter() -> None:
    merged = answers.Answers(["x"])
    assert answers.compare([{"prompt": "a"}], None, merged)["adapter_merged_equal"] is None


def test_compare_ids() -> None:
    """Letters are tokens here."""

    def compared(asked: str, saved: str | None) -> dict[str, Any]:
        ids = [ord(letter) for letter in saved] if saved is not None else None
        asked_ids = [ord(letter) for letter in asked]
        return compare_ids([{"prompt": "q"}] * 2, [[1], asked_ids], [[1], ids], lambda part: "".join(map(chr, part)))

    alike = {"token_ids_equal": [2, 2], "token_ids": [True, True], "template_difference": None}
    assert compared("<u>q", "<u>q") == alike
    assert compared("<u>q", None) == {
        "token_ids_equal": [1, 2],
        "token_ids": [True, None],
        "template_difference": None,
    }
    for asked, saved, training, other in (
        ("<s>be Qwen</><u>q", "<u>q", "<s>be Qwen</>", ""),
        ("<u>q", "<s>x</><u>q", "", "<s>x</>"),
        ("<u>q<a>", "<u>q<a>\n", "", "\n"),
        ("[u]q", "<u>q", "[u]", "<u>"),
        ("aa", "a", "a", ""),
    ):
        found = compared(asked, saved)
        assert found["token_ids"] == [True, False]
        assert found["template_difference"] == {"prompt": "q", "training": training, "saved": other}


@pytest.mark.real
def test_compare_logits() -> None:
    import torch

    adapter = answers.Answers(["x", "y"], {0: torch.tensor([1.0, 2.0]), 1: torch.tensor([0.0, 0.0])})
    merged = answers.Answers(["x", "z"], {0: torch.tensor([1.0, 2.5]), 1: torch.tensor([0.0, 0.25])})
    facts = answers.compare([{"prompt": "a"}, {"prompt": "b"}], adapter, merged)
    assert facts["adapter_merged_equal"] == [1, 2]
    assert facts["max_logit_diff"] == 0.5
    assert facts["differences"] == [{"prompt": "b", "adapter": "y", "merged": "z"}]


def test_fp32_where_it_fits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infer, "available_memory", lambda device: 2 << 30)
    assert infer.choose_dtype([model], model, "cpu") == "float32"
    monkeypatch.setattr(infer, "available_memory", lambda device: 1 << 30)
    assert infer.choose_dtype([model], model, "cpu") == "bfloat16"


def test_available_memory_counts_the_cgroup(tmp_path: Path) -> None:
    assert 0 < models.available_memory("cpu") < 1 << 50
    job = tmp_path / "slurm" / "job_1"
    job.mkdir(parents=True)
    (job / "memory.max").write_text("max\n")
    (tmp_path / "slurm" / "memory.max").write_text("1000\n")
    (tmp_path / "slurm" / "memory.current").write_text("700\n")
    (tmp_path / "slurm" / "memory.stat").write_text("anon 5\ninactive_file 200\n")
    assert list(models._cgroup(tmp_path, "/slurm/job_1", "memory.max", "memory.current")) == [500]
