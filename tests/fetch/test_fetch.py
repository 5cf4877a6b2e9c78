"""pkuslurm fetch against a hub of models on loopback that speaks both hubs' interfaces."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pkuslurm import cli
from pkuslurm import fetch as verb
from pkuslurm.errors import PkuslurmError
from pkuslurm.fetch import place, web
from pkuslurm.preflight.models import check_model, find_model
from tests.conftest import Ended, environment
from tests.fetch.hub import COMMIT, NAME, WEIGHTS, Hub, serving

KEPT = {"config.json", "tokenizer.json", "model.safetensors", ".pkuslurm-fetch.json"}
Fetch = Callable[..., Ended]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as there:
        yield there


@pytest.fixture
def fetch(weird: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fetch:
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "MODELSCOPE_DOMAIN", "PKUSLURM_MODELS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, hub.url)
    monkeypatch.setenv("HOME", str(weird))
    monkeypatch.setenv("PKUSLURM_CACHE", str(weird / "cache"))
    monkeypatch.setattr(web, "PAUSE", 0.01)
    monkeypatch.setattr(verb, "_cache_root", lambda: str(weird / "cache"))  # one test has its own
    monkeypatch.chdir(weird)

    def run(*words: str) -> Ended:
        code = cli.main(["fetch", *words])
        return Ended(code, *capsys.readouterr())

    return run


def part(weird: Path) -> Path:
    return weird / "cache" / "models" / f"{NAME}.part"


@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_a_model_comes_whole_and_is_found(source: str, hub: Hub, weird: Path, fetch: Fetch) -> None:
    ended = fetch(NAME, "--from", source)
    assert ended.code == 0, ended.err
    folder = weird / "cache" / "models" / NAME
    assert ended.out == f"{folder}\n" and {path.name for path in folder.iterdir()} == KEPT
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert find_model(NAME, {"PKUSLURM_CACHE": str(weird / "cache")}) == folder
    assert "left out: 5 files" in ended.err and "3 files, 293.1 KiB" in ended.err and not part(weird).exists()
    record = json.loads((folder / ".pkuslurm-fetch.json").read_text(encoding="utf-8"))
    assert record["revision"] == (COMMIT if source == "huggingface" else "master")
    hub.asked.clear()
    assert fetch(NAME).out == ended.out and not hub.asked  # a second time nothing is asked


def test_group_models_and_a_folder_of_ones_own(weird: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    (weird / "mine").mkdir()
    assert fetch(NAME, "--to", "mine").out == f"{weird / 'mine'}\n"
    refused = fetch(NAME, "--to", "mine")
    assert refused.code == 2 and "a model is there already" in refused.err
    (weird / "notes").mkdir()
    (weird / "notes" / "a.txt").touch()
    assert "it is no whole model" in fetch(NAME, "--to", "notes").err
    (weird / "group").mkdir()
    monkeypatch.setenv("PKUSLURM_MODELS", str(weird / "group"))
    assert fetch(f"https://www.modelscope.cn/models/{NAME}/summary", "--from", "modelscope").code == 0
    check_model(weird / "group" / NAME)


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_broken_connection_is_gone_on_with(ranges: bool, hub: Hub, weird: Path, fetch: Fetch) -> None:
    hub.cuts["model.safetensors"], hub.no_ranges = [100_000, 50_000], not ranges
    assert fetch(NAME).code == 0
    asked = [headers.get("Range") for headers in hub.headers_of("?model.safetensors")]
    assert asked == [None, "bytes=100000-", f"bytes={150_000 if ranges else 50_000}-"]
    check_model(weird / "cache" / "models" / NAME)


def test_a_hub_that_breaks_off_for_ever_is_left_and_gone_on_with(hub: Hub, weird: Path, fetch: Fetch) -> None:
    hub.cuts["model.safetensors"] = [100_000] + [0] * 20
    ended = fetch(NAME)
    assert ended.code == 2 and "the connection breaks off; try again later" in ended.err
    (half,) = part(weird).glob(".part-*")
    assert half.read_bytes() == WEIGHTS[:100_000]
    hub.cuts.clear()
    hub.asked.clear()
    assert fetch(NAME).code == 0
    assert [headers.get("Range") for headers in hub.headers_of("?model.safetensors")] == ["bytes=100000-"]
    assert not hub.headers_of("?config.json")  # what is whole does not come again


@pytest.mark.parametrize(
    ("source", "name", "lie", "words"),
    [
        ("modelscope", "model.safetensors", {"sha256": "0" * 64}, "not what it lists (sha256 "),
        ("huggingface", "tokenizer.json", {"blob": "0" * 40}, "not what it lists (sha1 "),
        ("modelscope", "model.safetensors", {"size": 5}, f"({len(WEIGHTS)} bytes, not 5)"),
    ],
)
def test_what_is_not_as_listed_comes_anew_once(
    source: str, name: str, lie: dict[str, object], words: str, hub: Hub, weird: Path, fetch: Fetch
) -> None:
    hub.lies[name] = lie
    ended = fetch(NAME, "--from", source)
    assert ended.code == 2 and ended.err.splitlines()[-1].startswith(f"pkuslurm: {name}: ") and words in ended.err
    assert len(hub.headers_of(f"?{name}" if source == "modelscope" else f"/{name}?")) == 2
    assert len(hub.files[name]) not in [half.stat().st_size for half in part(weird).iterdir()]
    assert not (weird / "cache" / "models" / NAME).exists()


def test_a_file_that_was_damaged_on_the_way_is_mended(hub: Hub, weird: Path, fetch: Fetch) -> None:
    hub.cuts["model.safetensors"] = [100_000] + [0] * 20
    fetch(NAME)
    (half,) = part(weird).glob(".part-*")
    half.write_bytes(bytes(100_000))
    hub.cuts.clear()
    assert fetch(NAME).code == 0
    assert (weird / "cache" / "models" / NAME / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(("variable", "source"), [("HF_TOKEN", "huggingface"), ("MODELSCOPE_API_TOKEN", "modelscope")])
def test_a_token_goes_to_its_hub_alone(
    variable: str, source: str, hub: Hub, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "secret"
    refused = fetch(NAME, "--from", source)
    assert refused.code == 2 and f"export {variable}=" in refused.err and "(401, Invalid credentials)" in refused.err
    monkeypatch.setenv(variable, "secret")
    with serving(Hub()) as cdn:
        hub.elsewhere = cdn.url
        assert fetch(NAME, "--from", source).code == 0
        assert hub.asked and cdn.asked
        for _, headers in cdn.asked:
            assert "secret" not in str(headers)
        # nor to another hub that a command line names
        assert fetch(NAME, "--from", cdn.url, "--to", "x").code == 0
        assert all("secret" not in str(headers) for _, headers in cdn.asked)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://hub.example")
    assert "a token is not sent over http" in fetch(NAME, "--from", source, "--to", "y").err


@pytest.mark.parametrize(
    ("codes", "code", "words"),
    [
        ([403], 2, "conditions are to be accepted on its page first"),
        ([404], 2, "or try --from huggingface"),
        ([429, 503], 0, ""),
        ([500] * 9, 2, "it answers 500, as told; try again later"),
        ([429] * 9, 2, "too many requests (429)"),
        ([410], 2, "it answers 410, as told"),
    ],
)
def test_what_a_hub_answers_is_said_in_words(codes: list[int], code: int, words: str, hub: Hub, fetch: Fetch) -> None:
    hub.fails["repo/files"] = list(codes)
    ended = fetch(NAME)
    assert ended.code == code and words in ended.err and "Traceback" not in ended.err
    assert not code or len(ended.err.splitlines()) == 1


def test_a_server_error_in_the_middle_of_a_file_is_passed_over(hub: Hub, fetch: Fetch) -> None:
    hub.fails["model.safetensors"] = [502, 416, 503]
    assert fetch(NAME).code == 0


def test_a_redirect_that_is_not_safe_is_refused_at_once(hub: Hub, fetch: Fetch) -> None:
    hub.elsewhere = "ftp://there"
    ended = fetch(NAME)
    assert (
        ended.code == 2
        and "it leads to ftp://there, which is not safe" in ended.err
        and len(hub.headers_of("?model.safetensors")) == 1
    )
    with pytest.raises(PkuslurmError, match="it leads to http://there, which is not safe"):
        plain = urllib.request.Request("https://hub.example/a")
        web._Redirects().redirect_request(plain, io.BytesIO(), 302, "", {}, "http://there/b")


@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_rows_that_are_no_files_are_refused(source: str, hub: Hub, fetch: Fetch) -> None:
    hub.rows = ["config.json"]
    ended = fetch(NAME, "--from", source)
    assert ended.code == 2 and "it lists something else than files, ['config.json']" in ended.err


HOSTILE = ["../escaped.json", "/etc/escaped.json", "a/../../b.json", "a//b.json", "a\\b.json", "a\nb.json", "./c.json"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_cannot_lead_out_of_the_folder(name: str, hub: Hub, weird: Path, fetch: Fetch) -> None:
    hub.files[name] = b"{}"
    before = sorted(weird.parent.rglob("*"))
    ended = fetch(NAME)
    assert ended.code == 2 and "would not lie in the model's folder" in ended.err
    assert sorted(weird.parent.rglob("*")) == before


def test_links_that_somebody_laid_are_not_followed(hub: Hub, weird: Path, fetch: Fetch) -> None:
    hub.files["sub/vocab.json"] = b"{}"
    outside = weird / "outside"
    outside.mkdir()
    part(weird).mkdir(parents=True)
    (part(weird) / "sub").symlink_to(outside)
    ended = fetch(NAME)
    assert ended.code == 2 and "a link leads out" in ended.err and not list(outside.iterdir())


def without(*names: str, **more: bytes) -> Callable[[Hub], None]:
    def change(hub: Hub) -> None:
        for name in names:
            hub.files.pop(name)
        hub.files |= {name.replace("__", "."): data for name, data in more.items()}

    return change


WRONG = [
    (without("model.safetensors"), "its weights are pickles (.bin, .pt)"),
    (without("model.safetensors", "pytorch_model.bin", a__gguf=b"x"), "only GGUF weights"),
    (without("model.safetensors", "config.json", adapter_config__json=b"{}"), "an adapter, not a model"),
    (without("config.json"), "has no config.json"),
    (without(model__safetensors__index__json=b'{"weight_map": {"a": "m-1.safetensors"}}'), "m-1.safetensors: "),
    (without("tokenizer.json"), "no tokenizer there"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_cannot_be_trained_is_refused(change: Callable[[Hub], None], words: str, hub: Hub, fetch: Fetch) -> None:
    change(hub)
    ended = fetch(NAME)
    assert ended.code == 2 and words in ended.err.splitlines()[-1] and not ended.out


def test_shards_of_the_index_and_code_where_it_is_asked_for(hub: Hub, weird: Path, fetch: Fetch) -> None:
    hub.files["m-1.safetensors"] = hub.files.pop("model.safetensors")
    hub.files["consolidated.safetensors"] = b"the same once more"
    hub.files["model.safetensors.index.json"] = b'{"weight_map": {"a": "m-1.safetensors"}}'
    hub.files["config.json"] = b'{"model_type": "qwen3", "auto_map": {"AutoModel": "modeling_qwen.Model"}}'
    code = fetch(NAME, "--code", "--to", "code")
    assert code.code == 0 and "brings code" not in code.err
    assert {path.name for path in (weird / "code").iterdir()} == {
        "config.json", "tokenizer.json", "model.safetensors.index.json", "m-1.safetensors", "modeling_qwen.py",
        ".pkuslurm-fetch.json",
    }  # fmt: skip


@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_code_comes_later_beside_a_model_that_is_there(source: str, hub: Hub, weird: Path, fetch: Fetch) -> None:
    """By the very line that the warning names."""
    hub.files |= {"sub/more.py": b"1", "mine.py": b"theirs"}
    hub.files["config.json"] = b'{"model_type": "qwen3", "auto_map": {"AutoModel": "modeling_qwen.Model"}}'
    first = fetch(NAME, "--from", source, "--to", "a b")
    (line,) = [line for line in first.err.splitlines() if "brings code of its own" in line]
    words = shlex.split(line.partition(", then ")[2].partition(", and model.")[0])
    assert words[1:4] == ["-m", "pkuslurm", "fetch"] and words[-1] == "--code"
    assert not list((weird / "a b").rglob("*.py"))
    (weird / "a b" / "mine.py").write_bytes(b"my own")
    hub.asked.clear()
    later = fetch(*words[4:])
    assert later.code == 0 and later.out == first.out, later.err
    assert {path.name: path.read_bytes() for path in (weird / "a b").rglob("*.py")} == {
        "modeling_qwen.py": b"raise SystemExit", "more.py": b"1", "mine.py": b"my own",
    }  # fmt: skip
    assert not any(path.endswith((".safetensors", "config.json")) for path, _ in hub.asked)
    assert "all code that" in fetch(*words[4:]).err and [path.name for path in weird.iterdir()] == ["a b"]
    (weird / "a b" / "mine.py").unlink()
    record = weird / "a b" / ".pkuslurm-fetch.json"
    record.write_text(record.read_text(encoding="utf-8").replace(f'"{COMMIT}"', '"v1"').replace('"master"', '"v1"'))
    other = fetch(*words[4:], "--revision", "master" if source == "modelscope" else "main")
    assert other.code == 2 and "the model there is revision v1, not" in other.err
    assert not (weird / "a b" / "mine.py").exists()


def test_no_network_says_what_to_copy_where(fetch: Fetch, weird: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        ended = fetch(NAME)
        paged = fetch(f"https://www.modelscope.cn/models/{NAME}/tree/v1%2F2/sub")
    assert paged.err.count(f"pkuslurm fetch {NAME} --revision v1/2 --to Qwen3-0.6B") == 2
    assert f"modelscope download --model {NAME} --local_dir Qwen3-0.6B --revision v1/2" in paged.err
    lines = ended.err.splitlines()
    assert ended.code == 2 and "Connection refused" in lines[-1]
    assert "这台机器连不上" in lines[0] and any(f"pkuslurm fetch {NAME} --to Qwen3-0.6B" in line for line in lines[1:4])
    target = weird / "cache" / "models" / NAME
    assert sum(line.lstrip().startswith(("本机", "here")) and "mkdir -p" in line for line in lines) == 2
    assert any("rsync -a" in line and str(target.name) in line for line in lines) and not target.parent.exists()


@pytest.mark.parametrize("way", ["--from", "HF_ENDPOINT"])
def test_the_other_machine_is_told_of_the_mirror_and_of_the_code(
    way: str, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", url if way == "HF_ENDPOINT" else "https://huggingface.co")
        said = fetch(NAME, "--from", url if way == "--from" else "huggingface", "--revision", "v1", "--code").err
    assert said.count(f"pkuslurm fetch {NAME} --from {url} --revision v1 --code --to Qwen3-0.6B") == 2
    assert said.count(f"HF_ENDPOINT={url} hf download {NAME} --local-dir Qwen3-0.6B --revision v1") == 2


def test_it_is_the_proxy_that_refuses(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://hub.example")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        proxy = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("http_proxy", f"http://me:secret@{proxy}")
        said = fetch(NAME).err
    assert f"pkuslurm: hub.example: the proxy {proxy} (http_proxy): Connection refused" in said
    assert f"经代理 {proxy}" in said and "set https_proxy" not in said and "secret" not in said


def test_proxies_of_the_environment_are_used(hub: Hub, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://hub.example")
    monkeypatch.setenv("http_proxy", hub.url)
    assert fetch(NAME).code == 0
    assert {headers["Host"] for _, headers in hub.asked} == {"hub.example"}
    monkeypatch.setenv("http_proxy", "socks5h://me:secret@127.0.0.1:1080")
    refused = fetch(NAME, "--to", "x").err
    assert "a SOCKS proxy cannot be used" in refused and "secret" not in refused
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert fetch(NAME, "--to", "x", "--from", hub.url).code == 0


def test_too_little_room_is_said_before_anything_comes(
    hub: Hub, weird: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(place.shutil, "disk_usage", lambda _: usage(0, 0, 1000))
    ended = fetch(NAME)
    assert ended.code == 2 and "1000 B are free, 191.0 MiB are needed" in ended.err
    assert not hub.headers_of("?model.safetensors") and not part(weird).exists()


@pytest.mark.skipif(os.getuid() != 0, reason="a small disk of its own needs root")
def test_a_full_disk_stops_it_and_more_room_lets_it_go_on(
    hub: Hub, weird: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = weird / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no tmpfs may be mounted here")
    try:
        monkeypatch.setattr(place, "_SPARE", -10_000_000)
        ended = fetch(NAME, "--to", str(small / "m"))
        assert ended.code == 2 and "no room left for model.safetensors" in ended.err
        subprocess.run(["mount", "-o", "remount,size=2m", str(small)], check=True)
        assert fetch(NAME, "--to", str(small / "m")).code == 0
        assert "Range" in hub.headers_of("?model.safetensors")[-1]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_ctrl_c_ends_it_and_a_second_one_beside_it_is_refused(hub: Hub, weird: Path, fetch: Fetch) -> None:
    """In a process of its own; meanwhile the same model is asked for here."""
    hub.slow = 0.3
    words = [sys.executable, "-m", "pkuslurm", "fetch", NAME]
    env = environment(weird, PKUSLURM_CACHE=str(weird / "cache"), MODELSCOPE_ENDPOINT=hub.url)
    started = subprocess.Popen(words, cwd=weird, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 30
    while not any(half.stat().st_size for half in part(weird).glob(".part-*")) or not hub.headers_of(".safetensors"):
        assert time.monotonic() < end and started.poll() is None
        time.sleep(0.02)
    refused = fetch(NAME)
    assert refused.code == 2 and f"another fetch of it is under way ({socket.gethostname()}, process" in refused.err
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=30)
    assert started.returncode == 130 and "the same command goes on from there" in err and "Traceback" not in err
    hub.slow = 0.0
    assert fetch(NAME).code == 0
    assert hub.headers_of("?model.safetensors")[-1].get("Range")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["Qwen3-0.6B"], "a model's id is wanted, OWNER/NAME"),
        (["../x"], "a model's id is wanted"),
        (["models/小千"], "a model's id is wanted, OWNER/NAME (of A-Z a-z 0-9 . _ -)"),
        (["https://modelscope.cn/models/通义/千问"], "a model's id is wanted"),
        ([NAME, "--from", "https://镜像.example"], "no hub can have this address"),
        (["https://h/../x"], "a model's id is wanted"),
        (["https://huggingface.co/datasets/a/b"], "this is no model's page; only models are fetched"),
        ([NAME, "--from", "https://[x"], "no hub can have this address"),
        ([NAME, "--from", "github"], "--from github: it is modelscope, huggingface, or a mirror's address"),
        ([], "the following arguments are required: MODEL"),
        ([NAME, "more"], "not understood"),
    ],
)
def test_slips_are_one_line(words: list[str], message: str, fetch: Fetch) -> None:
    ended = fetch(*words)
    assert ended.code == 2 and message in ended.err and len(ended.err.splitlines()) == 1


def test_a_token_that_was_copied_from_a_page_of_words(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "你的令牌")
    ended = fetch(NAME)
    assert ended.code == 2 and "MODELSCOPE_API_TOKEN: it is no token" in ended.err


def test_a_presets_name_stands_for_its_model(fetch: Fetch) -> None:
    assert "Qwen/Qwen2.5-1.5B-Instruct: not on 127.0.0.1" in fetch("qwen2.5-1.5b-instruct").err
