"""The merge: LLaMA-Factory's export, its proof, and that ``merged`` is never half there."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.payload import __main__ as entry
from pkuslurm.payload import export, merge, merge_files, models, shares
from tests.payload import small_models
from tests.payload.small_models import KINDS, Flow, merge_job, start

WEIRD = "a 'quoted\" $(touch x) 我的 模型"
# torch, transformers and peft warn of their own affairs as they are imported
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def flows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Flow]:
    folder = tmp_path_factory.mktemp("flows") / WEIRD
    folder.mkdir()
    return small_models.make_flows(folder)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter that pass the checks of their files; nothing can load them."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text('{"tie_word_embeddings": false}')
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    return base, adapter


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- what it makes


@pytest.mark.real
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_proved(flows: dict[str, Flow], kind: str) -> None:
    flow = flows[kind]
    facts = flow.result("merge")
    in_files = [name for file in models.weight_files(flow.merged) for name in models.read_header(file)]
    assert facts["mode"] == "merge"
    assert facts["tensors"] == facts["equal"] == len(in_files) > 19
    assert facts["max_abs_diff"] == 0.0
    assert facts["config"] == "base"
    assert (flow.merged / "config.json").read_bytes() == (flow.base / "config.json").read_bytes()
    assert facts["dtype"] == {"llama": "bfloat16", "qwen2": "float32"}[kind]
    assert facts["bytes"] == sum(len(content) for content in tree(flow.merged).values())
    assert facts["versions"]["llamafactory"]
    assert set(facts["seconds"]) >= {"stream", "proof"}
    assert facts["way"] == "stream"
    assert [file.name for file in models.weight_files(flow.merged)] == [
        file.name for file in models.weight_files(flow.base)
    ]


@pytest.mark.real
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_is_the_base_s_byte_for_byte(flows: dict[str, Flow], kind: str) -> None:
    flow = flows[kind]
    names = flow.result("merge")["tokenizer_files"]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(names)
    assert [file.name for file in merge_files.tokenizer_files(flow.merged)] == names
    for name in names:
        assert (flow.merged / name).read_bytes() == (flow.base / name).read_bytes()


@pytest.mark.real
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_temporary_stays(flows: dict[str, Flow], kind: str) -> None:
    assert not [entry.name for entry in flows[kind].run.iterdir() if entry.name.startswith(".merged")]
    readable = flows[kind].merged.stat().st_mode & 0o666
    assert {file.stat().st_mode & 0o666 for file in flows[kind].merged.iterdir()} == {readable}


@pytest.mark.real
def test_a_full_fine_tune_is_linked(flows: dict[str, Flow], tmp_path: Path) -> None:
    base = flows["llama"].base
    trained = tmp_path / "adapter"
    shutil.copytree(base, trained)
    (trained / "checkpoint-3").mkdir()
    (trained / "checkpoint-3" / "optimizer.pt").write_bytes(b"x")
    (trained / "training_args.bin").write_bytes(b"x")
    (trained / "tokenizer_config.json").write_text("{}")
    job = merge_job(tmp_path / "run", base, trained, finetuning_type="full", model_name_or_path=str(trained))
    ended = start(job)
    assert ended.returncode == 0, ended.stderr
    merged = tmp_path / "run" / "merged"
    facts = json.loads((tmp_path / "run" / "results" / "merge.json").read_text())
    assert facts["mode"] == "copy"
    assert tree(merged) == tree(base)
    weights = models.weight_files(merged)
    assert len(weights) == 3
    assert all(file.samefile(trained / file.name) for file in weights)


# --- the proof


@pytest.fixture
def saved(tmp_path: Path) -> tuple[dict[str, Any], Callable[..., Path]]:
    """Expected tensors, the last tied to the first, and a function that writes a folder of them with changes."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    embedding = torch.randn(4, 3)
    expected = {"embed": embedding, "layer.weight": torch.randn(3, 3), "head": embedding}

    def write(change: dict[str, Any] | None = None, without: tuple[str, ...] = ("head",)) -> Path:
        tensors = {name: tensor.clone().bfloat16() for name, tensor in expected.items() if name not in without}
        save_file(tensors | (change or {}), tmp_path / "model.safetensors")
        return tmp_path

    return expected, write


@pytest.mark.real
def test_prove_rounds_to_the_file(saved: tuple[dict[str, Any], Callable[..., Path]]) -> None:
    expected, write = saved
    assert models.prove(expected, write()) == models.Proof(2, 2, 0.0, "bfloat16")
    # either name of a tied tensor will do, and both if they are equal
    assert models.prove(expected, write(without=("embed",))).tensors == 2
    assert models.prove(expected, write(without=())).tensors == 3


@pytest.mark.real
def test_prove_sees_one_changed_number(saved: tuple[dict[str, Any], Callable[..., Path]]) -> None:
    expected, write = saved
    changed = expected["layer.weight"].clone().bfloat16()
    changed[1, 1] += 0.5
    with pytest.raises(models.Unequal, match=r"layer\.weight \(off by up to 0\.5\).*1 of 2") as raised:
        models.prove(expected, write({"layer.weight": changed}))
    assert not raised.value.names
    changed[1, 1] = float("nan")
    with pytest.raises(models.Unequal, match=r"layer\.weight \(it has numbers that are not finite"):
        models.prove(expected, write({"layer.weight": changed}))
    with pytest.raises(models.Unequal, match=r"head .*1 of 3"):
        models.prove(expected, write({"head": expected["head"].bfloat16() * 2}, without=()))


@pytest.mark.real
def test_prove_sees_names_and_shapes(saved: tuple[dict[str, Any], Callable[..., Path]]) -> None:
    expected, write = saved
    with pytest.raises(models.Unequal, match=r"layer\.weight is missing"):
        models.prove(expected, write(without=("head", "layer.weight")))
    with pytest.raises(models.Unequal, match="embed is missing"):
        models.prove(expected, write(without=("head", "embed")))
    with pytest.raises(models.Unequal, match="more of the file is left over"):
        models.prove(expected, write({"more": expected["embed"].clone()}))
    with pytest.raises(models.Unequal, match=r"shape \[3\] instead of \[3, 3\]"):
        models.prove(expected, write({"layer.weight": expected["layer.weight"][0].clone()}))
    folder = write()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"embed": "model.safetensors"}}))
    with pytest.raises(models.Unequal, match=r"layer\.weight: the index"):
        models.prove(expected, folder)
    index.write_text(json.dumps({"weight_map": {"embed": "model-2.safetensors"}}))
    with pytest.raises(models.Unequal, match="weights are missing"):
        models.prove(expected, folder)


@pytest.mark.real
def test_a_tampered_merge_is_not_proved(flows: dict[str, Flow], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    flow = flows["llama"]
    folder = tmp_path / "merged"
    shutil.copytree(flow.merged, folder)
    whole = {name: tensor for file in models.weight_files(folder) for name, tensor in load_file(file).items()}
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    assert export._prove(flow.base, flow.adapter, folder, "cpu", False).equal == 20
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][5, 5] += 0.25
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(models.Unequal, match=f"{name}.*1 of 20"):
        export._prove(flow.base, flow.adapter, folder, "cpu", False)
    # the base alone in place of the merged model
    with pytest.raises(models.Unequal, match="14 of 20"):
        export._prove(flow.base, flow.adapter, flow.base, "cpu", False)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(models.Unequal, match=f"{name} is missing"):
        export._prove(flow.base, flow.adapter, folder, "cpu", False)
    with pytest.raises(models.Unequal, match=f"{name} is missing"):
        models.load_whole(folder)


@pytest.mark.real
def test_every_adapter_tensor_is_used(flows: dict[str, Flow], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    flow = flows["llama"]
    adapter = tmp_path / "adapter"
    shutil.copytree(flow.adapter, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    more = name.replace("layers.0", "layers.7")
    save_file(tensors | {more: tensors[name].clone()}, adapter / "adapter_model.safetensors")
    with pytest.raises(models.Unequal, match=f"{more} is not used"):
        export._prove(flow.base, adapter, flow.merged, "cpu", False)
    del tensors[name]
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(models.Unequal, match=f"{name} is missing"):
        export._prove(flow.base, adapter, flow.merged, "cpu", False)


# --- a merge that ends early


def fake_merge(error: BaseException | None) -> Callable[..., dict[str, Any]]:
    def merged(args: Any, base: Path, adapter: Path, folder: Path, trust: bool, seconds: Any) -> dict[str, Any]:
        (folder / "model.safetensors").write_bytes(b"new")
        if error:
            raise error
        return {"mode": "merge"}

    return merged


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt(), models.Unequal("tensor a.b is off")])
@pytest.mark.parametrize("existing", [False, True])
def test_an_ended_merge_leaves_merged_as_it_was(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    existing: bool,
) -> None:
    run = tmp_path / "run"
    job = merge_job(run, *folders)
    if existing:
        (run / "merged").mkdir()
        (run / "merged" / "old").write_bytes(b"old")
    before = tree(run)
    monkeypatch.setattr(merge, "_merge", fake_merge(error))
    unequal = isinstance(error, models.Unequal)
    with pytest.raises(SystemExit if unequal else type(error)) as raised:
        merge.main(job)
    assert tree(run) == before
    assert sorted(entry.name for entry in run.iterdir()) == (["merge.yaml", "merged"] if existing else ["merge.yaml"])
    if unequal:
        assert raised.value.code == 1  # type: ignore[union-attr]
        assert "tensor a.b is off" in capsys.readouterr().err.splitlines()[-1]


def test_a_merge_replaces_the_last_one(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    job = merge_job(run, *folders)
    (run / "merged").mkdir()
    (run / "merged" / "old").write_bytes(b"old")
    (run / ".merged.tmp-killed").mkdir()
    (run / ".merged.tmp-killed" / "half").write_bytes(b"half")
    (run / ".merged.old-killed").mkdir()
    monkeypatch.setattr(merge, "_merge", fake_merge(None))
    merge.main(job)
    assert tree(run / "merged") == {"model.safetensors": b"new"}
    assert sorted(entry.name for entry in run.iterdir()) == ["merge.yaml", "merged", "results"]
    assert json.loads((run / "results" / "merge.json").read_text())["bytes"] == 3


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    (tmp_path / ".merged.old-1").mkdir()
    (tmp_path / ".merged.old-1" / "old").write_bytes(b"old")
    (tmp_path / ".merged.tmp-1").mkdir()
    merge_files.clean(tmp_path / "merged")
    assert tree(tmp_path) == {"merged/old": b"old"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]


def test_a_failed_rename_puts_the_old_one_back(tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "old").write_bytes(b"old")
    with pytest.raises(OSError):
        merge_files.swap(tmp_path / ".merged.tmp-absent", merged)
    assert tree(tmp_path) == {"merged/old": b"old"}


@pytest.mark.parametrize("other", [False, True])
def test_a_folder_outside_of_the_run_is_the_run_s_once_its_link_says_so(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: bool
) -> None:
    """Killed right after the swap, it is taken up again; a link to another folder does not make it ours."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    job = merge_job(run, *folders)
    job["payload"] |= {"merged": str(outside), "link": str(run / "merged")}
    monkeypatch.setattr(merge, "_merge", fake_merge(None))
    if other:
        (run / "merged").symlink_to(tmp_path / "another")
        outside.mkdir()
        (outside / "theirs").write_bytes(b"theirs")
        with pytest.raises(SystemExit):
            merge.main(job)
        assert tree(outside) == {"theirs": b"theirs"} and (run / "merged").readlink() == tmp_path / "another"
        return

    def killed(temporary: Path, merged: Path) -> None:
        merge_files.swap(temporary, merged)
        os._exit(9)

    if (process := os.fork()) == 0:
        merge.swap = killed
        merge.main(job)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    merge.main(job)
    assert tree(run / "merged") == {"model.safetensors": b"new"}


def test_somebody_else_s_folder_that_came_meanwhile_is_not_overwritten(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    job = merge_job(run, *folders)
    job["payload"] |= {"merged": str(outside), "link": str(run / "merged")}

    def merged(*_: Any) -> dict[str, Any]:
        outside.mkdir()
        (outside / "theirs").write_bytes(b"theirs")
        return {}

    monkeypatch.setattr(merge, "_merge", merged)
    with pytest.raises(SystemExit):
        merge.main(job)
    assert tree(outside) == {"theirs": b"theirs"} and not (run / "merged").is_symlink()


def test_of_a_full_disk_one_share_tells_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the first one says."""

    def one() -> None:
        raise ValueError("not a tensor")

    def two() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/merged/model.safetensors")

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(OSError, match="No space left on device: '/runs/merged/model") as told:
        shares.in_shares(lambda: [one, two])
    assert told.value.errno == errno.ENOSPC
    with pytest.raises(shares.Failed, match="not a tensor"):
        shares.in_shares(lambda: [one, one])


@pytest.mark.parametrize("full", [False, True])
def test_words_of_a_full_disk_name_the_run_only_where_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full: bool
) -> None:
    """NCCL's are of /dev/shm."""
    nccl = "ncclSystemError: Error while creating shared memory segment: No space left on device"

    def failing(job: dict[str, Any]) -> None:
        raise RuntimeError(nccl)

    file = tmp_path / "jobs" / "merge.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"run_dir": str(tmp_path), "payload": {}}))
    entry._register(Path(entry.__file__).parent)
    parts = {name: importlib.import_module(f"{entry.PACKAGE}.{name}") for name in ("files", "merge")}
    monkeypatch.setattr(parts["merge"], "main", failing)
    monkeypatch.setattr(parts["files"], "lack", lambda folder: f"{folder}: No space left on device" if full else None)
    with pytest.raises(SystemExit) as ended:
        entry.main(["merge", str(file)])
    said = capsys.readouterr().err
    assert "Traceback" in said and nccl in said
    assert ended.value.code == (2 if full else 1)
    assert (f"pkuslurm: merge: {tmp_path}: No space left on device ({nccl})" in said) == full


# --- refusals


def refused(job: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as raised:
        merge.main(job)
    assert raised.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("pkuslurm: ")
    return last


def test_refusals(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = folders
    run = tmp_path / "run"
    assert "export_quantization_bit 4" in refused(merge_job(run, base, adapter, export_quantization_bit=4), capsys)
    assert "resize_vocab" in refused(merge_job(run, base, adapter, resize_vocab=True), capsys)
    assert "no config.json" in refused(merge_job(run, tmp_path / "none", adapter), capsys)
    comma = tmp_path / "a,b"
    shutil.copytree(adapter, comma)
    assert "comma" in refused(merge_job(run, base, comma), capsys)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "code when read" in refused(merge_job(run, base, adapter), capsys)
    (adapter / "adapter_model.bin").unlink()
    assert "no adapter_model.safetensors" in refused(merge_job(run, base, adapter), capsys)
    (adapter / "adapter_config.json").unlink()
    assert "no adapter_config.json" in refused(merge_job(run, base, adapter), capsys)
    job = merge_job(run, base, adapter)
    (run / "merge.yaml").write_text("- no mapping")
    assert "keys and values" in refused(job, capsys)
    (run / "merge.yaml").unlink()
    assert "cannot be read" in refused(job, capsys)
    assert not list(run.iterdir())


@pytest.mark.real
def test_a_tied_embedding_in_the_adapter_is_refused(flows: dict[str, Flow], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    name = "base_model.model.lm_head.lora_A.weight"
    save_file({name: torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SystemExit):
        export.refuse_tied(flows["llama"].base, tmp_path)
    export.refuse_tied(flows["qwen2"].base, tmp_path)


# --- the parts


def test_export_args(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    given = {"export_device": "auto", "export_dir": "/elsewhere", "export_legacy_format": True, "export_size": 2}
    kept = dict(given)
    (base / "config.json").write_text('{"torch_dtype": "float32"}')
    made = export.export_args(given, base, adapter, tmp_path, accelerator=False)
    assert given == kept
    assert made["export_device"] == "cpu"
    assert made["infer_dtype"] == "float32"
    assert made["export_dir"] == str(tmp_path)
    assert made["export_legacy_format"] is False
    assert made["export_size"] == 2
    # LLaMA-Factory decides where there is an accelerator, unless the export is on CPU
    assert "infer_dtype" not in export.export_args(given, base, adapter, tmp_path, accelerator=True)
    on_cpu = given | {"export_device": "cpu"}
    assert export.export_args(on_cpu, base, adapter, tmp_path, accelerator=True)["infer_dtype"] == "float32"
    asked = on_cpu | {"infer_dtype": "bfloat16"}
    assert export.export_args(asked, base, adapter, tmp_path, accelerator=True)["infer_dtype"] == "bfloat16"


def test_put_tokenizer(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "folder"
    base.mkdir()
    folder.mkdir()
    (base / "tokenizer_config.json").write_text('{"chat_template": null}')
    (base / "vocab.json").write_bytes(b"base")
    for name in ("tokenizer.json", "vocab.json", "chat_template.jinja", "generation_config.json", "config.json"):
        (folder / name).write_bytes(b"exported")
    assert merge_files.put_tokenizer(base, folder) == "template"
    assert tree(folder) == tree(base) | {"chat_template.jinja": b"exported", "config.json": b"exported"}
    (base / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert merge_files.put_tokenizer(base, folder) == "base"
    assert tree(folder) == tree(base) | {"config.json": b"exported"}


@pytest.mark.real
def test_put_config(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "folder"
    base.mkdir()
    folder.mkdir()
    # as transformers 4 and 5 write the same model
    old = {"model_type": "llama", "rope_theta": 1e6, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    new = {"model_type": "llama", "rope_parameters": rope, "dtype": "bfloat16", "tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(old))
    (folder / "config.json").write_text(json.dumps(new))
    assert merge_files.put_config(base, folder, False) == "base"
    assert tree(folder) == tree(base)
    (folder / "config.json").write_text(json.dumps(new | {"dtype": "float32"}))
    assert merge_files.put_config(base, folder, False) == "base"
    assert json.loads((folder / "config.json").read_text()) == old | {"torch_dtype": "float32"}
    changed = json.dumps(new | {"vocab_size": 7})
    (folder / "config.json").write_text(changed)
    assert merge_files.put_config(base, folder, False) == "export"
    assert (folder / "config.json").read_text() == changed


def test_link_falls_back_to_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"1")

    def no_link(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", no_link)
    merge_files.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"1"
    assert not (tmp_path / "b").samefile(tmp_path / "a")


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.float16"}, "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({}, "float16"),
    ],
)
def test_model_dtype(tmp_path: Path, config: dict[str, Any], dtype: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    header = json.dumps({"a": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 12)
    assert models.model_dtype(tmp_path) == dtype
    assert models.count_parameters(tmp_path) == 6
