"""What others can put before us: pickles, code beside models, templates, names and texts that shells, pages and
terminals would obey. Nothing of it runs, and nothing of it is obeyed."""

from __future__ import annotations

import ast
import json
import os
import pickle
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pkuslurm import cli
from pkuslurm.rundir import write_json
from tests import standin_run, verify
from tests.conftest import REPO, WEIRD
from tests.conftest import run as command
from tests.preflight.test_models import safetensors
from tests.read import fake_run, fake_sweep
from tests.read.test_report import VOID, Page
from tests.standin_run import Made

READING = ("status", "logs", "report", "prune")
# to shells, and to whatever splits a line at blanks, quotes or line ends
SHELL = "a$(touch pwned)`touch pwned`;touch pwned|touch pwned\ntouch pwned #'\"--help"
# C0, C1 (CSI, OSC), direction, invisible, separators; and elements of a page
OBEYED = "\x1b]0;owned\x07\x1b[2J\x9b31m\x9d0;x\x9c\u202egpj.exe\u2066\u200b\u2028\x7f\r<script>alert(1)</script>"


class Canary:
    """Whoever unpickles it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """In a hostile folder, with hostile words wherever words can stand, under umask 000."""
    folder = tmp_path_factory.mktemp("planted") / WEIRD
    folder.mkdir()
    rows = [{"instruction": SHELL + OBEYED, "input": "", "output": "</script><img src=x onerror=alert(2)>"}]
    (folder / "rows.json").write_text(json.dumps(rows * 8), encoding="utf-8")
    asked = folder / "asked.jsonl"
    asked.write_text(json.dumps({"prompt": SHELL + OBEYED, "expect": None}) + "\n", encoding="utf-8")
    words = ["name=$(touch pwned)`touch pwned`;touch pwned", f'dataset.path="{escaped(folder / "rows.json")}"']
    run = standin_run.make(folder, *words, f'infer.prompts="{escaped(asked)}"', umask=0)
    assert run.ended.code == 0, run.ended.err
    return run


def escaped(path: Path) -> str:
    return str(path).replace('"', '\\"')


def test_words_do_nothing_in_shells_and_terminals(made: Made) -> None:
    assert not [path for path in made.cwd.rglob("*") if path.name.startswith("pwned")]
    assert not verify.terminal(made.ended.out + made.ended.err)
    for verb in READING:
        ended = made.verb(verb, made.path)
        assert ended.code == 0 and not verify.terminal(ended.out + ended.err), (verb, ended)
    assert not list(made.cwd.rglob("pwned*"))
    page = Page((made.path / "report.html").read_text(encoding="utf-8"))
    assert not page.tags & {"script", "img"} and "touch pwned" in page.words


def test_nobody_else_can_read_it_under_umask_000(made: Made) -> None:
    """The run, and the lists in the user's state directory."""
    for path in (made.path, *made.path.rglob("*"), made.cwd / "state" / "pkuslurm"):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
            assert not mode & 0o077, (path, oct(mode))
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    for file in (made.cwd / "state" / "pkuslurm").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_a_planted_pickle_is_not_read(made: Made, tmp_path: Path) -> None:
    """Where submitit, the trainer and the hub would look for one; by verbs that have something to do."""
    run, canary = made.path, tmp_path / "ran"
    places = ("logs/.slurm/1_0_result.pkl", "logs/.slurm/1_submitted.pkl", "adapter/training_args.bin")
    places += (
        "adapter/adapter_model.bin",
        "adapter/optimizer.pt",
        "adapter/value_head.bin",
        "merged/pytorch_model.bin",
    )
    places += ("adapter/checkpoint-3/optimizer.pt", "adapter/checkpoint-3/rng_state_0.pth", "results/infer.pkl")
    with standin_run.kept(run):
        for name in places:
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_bytes(pickle.dumps(Canary(canary)))
        (run / "done" / "infer.json").unlink()
        for verb in ("retry", "cancel", *READING):
            ended = made.verb(verb, run)
            assert ended.code == 0, (verb, ended)
        assert (run / "done" / "infer.json").exists(), "retry has done it again"
        for kind in ("merge", "infer"):
            before = (run / "done" / f"{kind}.json").read_bytes()
            ended = made.verb(kind, run, "--force")
            assert ended.code == 0 and (run / "done" / f"{kind}.json").read_bytes() != before, ended
    assert not canary.exists()
    pickle.loads((run / places[0]).read_bytes())
    assert canary.is_dir(), "it would have run"
    for name in places:
        (run / name).unlink(missing_ok=True)  # merge has put another folder in the place of its own


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    """modeling_*.py that config.json asks for, a chat template that reaches for the system: at launch both are data.

    Of merge and infer: tests/payload/test_infer.py.
    """
    model, canary = tmp_path / "model", tmp_path / "ran"
    model.mkdir()
    auto = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "auto_map": auto}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (model / f"{name}.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n", encoding="utf-8")
    evil = "{{ cycler.__init__.__globals__.os.mkdir('" + str(canary) + "') }}"
    tokenizer = {"chat_template": evil, "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (model / "tokenizer.json").write_text("{}", encoding="utf-8")
    safetensors(model / "model.safetensors")
    made = standin_run.make(tmp_path, f"model.path={model}", "model.template=qwen")
    assert made.ended.code == 0 and not canary.exists(), made.ended
    for more in (["model.template=qwen"], ["model.template=qwen", "model.trust_remote_code=true"]):
        ended = command([f"model.path={model}", "dry_run=true", *more], tmp_path, made.env)
        assert ended.code == 0 and not canary.exists(), ended
        assert ("\ntrust_remote_code: true\n" in ended.out) == (len(more) > 1), "what LLaMA-Factory is told"


def test_a_chat_template_cannot_reach_the_system(tmp_path: Path) -> None:
    """Of a model, be it from a GGUF file: what renders it where it is asked lets it call nothing."""
    from jinja2.exceptions import SecurityError
    from transformers.utils.chat_template_utils import render_jinja_template

    canary = tmp_path / "ran"
    evil = "{{ cycler.__init__.__globals__.os.mkdir('" + str(canary) + "') }}"
    with pytest.raises(SecurityError):
        render_jinja_template(conversations=[[{"role": "user", "content": "a"}]], chat_template=evil)
    assert not canary.exists()


PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
# where a byte code cache is made: it writes .pyc as Python does
ALLOWED = {("payload/bytecode.py", "marshal")}


def sources() -> Iterator[tuple[str, ast.AST]]:
    for file in sorted((REPO / "pkuslurm").rglob("*.py")):
        yield file.relative_to(REPO / "pkuslurm").as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def test_nothing_of_ours_unpickles_or_calls_a_shell() -> None:
    found = set()
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [one.name for one in node.names] + [getattr(node, "module", None) or ""]
                found |= {(name, module) for module in modules if module.partition(".")[0] in PICKLES}
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                words = {(one.arg, ast.unparse(one.value)) for one in node.keywords}
                risky = called in (
                    "eval",
                    "exec",
                    "os.system",
                    "os.popen",
                    "torch.load",
                    "pickle.loads",
                    "yaml.unsafe_load",
                )
                risky |= ("shell", "True") in words
                risky |= called == "yaml.load" and "Safe" not in ast.unparse(node) and "Loader" not in ast.unparse(node)
                found |= {(name, called)} if risky else set()
    assert found <= ALLOWED, found - ALLOWED


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a verb prints, in this process."""
    for name in ("HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def type_it(*words: str | Path) -> str:
        cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert "bug of ours" not in err and not verify.terminal(out + err), (words, out, err)
        return out + err

    return type_it


def poisoned(value: object, key: str = "") -> object:
    """Every text of a JSON value that is only shown, with what a terminal or a page would obey."""
    kept = (
        "state",
        "kind",
        "run_id",
        "sweep_id",
        "executor",
        "path",
        "started",
        "finished",
        "created",
        "host",
        "sha256",
    )
    if isinstance(value, dict):
        return {name: poisoned(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return value if key in ("parents", "members", "pipeline") else [poisoned(one, key) for one in value]
    return OBEYED + value if isinstance(value, str) and key not in (*kept, "job_id", "key", "config") else value


def poison(folder: Path) -> None:
    for file in folder.rglob("*.json"):
        if not {"done", "data"} & {*file.parts}:
            write_json(file, poisoned(json.loads(file.read_text(encoding="utf-8"))))
    for file in folder.rglob("logs/*.log"):
        file.write_text(OBEYED * 3, encoding="utf-8")


@pytest.mark.parametrize("end", ["COMPLETED", "FAILED", "RUNNING"])
def test_no_verb_obeys_what_a_run_says(tmp_path: Path, typed: Callable[..., str], end: str) -> None:
    run = fake_run.finished(tmp_path / "runs", name=OBEYED)
    if end != "COMPLETED":
        run.done("train").unlink()
        fake_run.state(run, "train", end, reason="why", **(fake_run.alive() if end == "RUNNING" else {}))
    endpoint = {"host": "h", "port": 1, "models": ["base"], "attempt": 1, "engine": {"name": "e"}, "notes": ["n"]}
    write_json(run.endpoint, endpoint | {"host": "h" + OBEYED})
    document = json.loads(run.run_json.read_text(encoding="utf-8"))
    document["jobs"]["serve"] = {"job_id": "1", "first_attempt": 1, "parents": []}
    write_json(run.run_json, document)
    alive = fake_run.alive() | {"state": "RUNNING", "attempt": 1, "job_id": "1", "nodes": [OBEYED], "reason": OBEYED}
    write_json(run.state("serve"), alive)
    poison(run.path)
    edited = json.loads(run.run_json.read_text(encoding="utf-8"))
    assert OBEYED in edited["settings"][0]["origin"]
    told = "".join(typed(verb, run.path) for verb in READING)
    told += typed("runs", "--run-root", run.path.parent) + typed("report", run.path, "--export")
    assert "\\x1b" in told and "\\u202e" in told
    for name in ("report.html", "report-export.html"):
        check_page((run.path / name).read_text(encoding="utf-8"))


def test_no_verb_obeys_what_a_sweep_says(tmp_path: Path, typed: Callable[..., str]) -> None:
    home = fake_sweep.example(tmp_path / "runs", 5, steps=6)
    poison(home.path)
    told = "".join(typed(verb, home.path) for verb in READING) + typed("runs", "--run-root", tmp_path / "runs")
    assert "\\x1b" in told
    check_page((home.path / "report.html").read_text(encoding="utf-8"))
    table = (home.path / "leaderboard.csv").read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    assert not verify.terminal(table)


def check_page(source: str) -> None:
    """Nothing of the data is an element, an attribute or a script, and a policy stands against what is."""
    page = Page(source)
    assert not page.tags & {"script", "img", "iframe", "object", "embed", "link"} - VOID | page.tags & {"script", "img"}
    assert not {name for name in page.names if name.startswith("on")} and "default-src 'none'" in source
    assert not verify.terminal(source.replace("\r\n", "\n"))
