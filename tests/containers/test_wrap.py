"""Whole commands, for each runtime and each accelerator."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pkuslurm import containers
from pkuslurm.containers import RUNTIMES, Container, environment, outermost, passed, refuse_splitting, stop, wrap
from pkuslurm.errors import PkuslurmError

ARGV = ["python3", "-m", "torch.distributed.run", "/opt/我 的/payload", "train"]
NAMES = ["CANARY_TOKEN", "MASTER_ADDR", "PKUSLURM_TREE"]
OWN = ["/data/北大 模型", "/home/a/runs", "/opt/pkuslurm"]
NPU = ["/dev/davinci0", "/dev/davinci1", "/dev/davinci_manager", "/usr/local/Ascend/driver", "/etc/hccn.conf"]
IMAGE = "/images/llm.img"
GO_IN = 'export HOME="$1"; cd "$2" || exit; shift 2; '
CANN = (
    "for f in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/cann/set_env.sh; do "
    '[ -r "$f" ] && . "$f" && break; done; d=/usr/local/Ascend/driver/lib64; '
    'export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$d/driver:$d/common:$d"; '
)
DEAF = "trap '' USR1 USR2; "
PLACE = ["sh", "/cache/home", "/home/a/runs/1", *ARGV]
INSIDE = {
    "cpu": ["sh", "-c", f'{GO_IN}{DEAF}exec "$@"', *PLACE],
    "cuda": ["sh", "-c", f'{GO_IN}{DEAF}exec "$@"', *PLACE],
    "npu": ["bash", "-c", f'{GO_IN}{CANN}{DEAF}exec "$@"', *PLACE],
}
FILLED_UP = (
    "if [ -r /ch/environment ]; then while IFS= read -r line; do n=${line%%=*}; "
    'case $n in "$line" | "" | [0-9]* | *[!A-Za-z0-9_]*) continue ;; PATH) ;; '
    '*) eval "s=\\${$n+x}"; [ -z "$s" ] || continue ;; esac; export "$line"; done </ch/environment; fi; '
)


def container(runtime: str, accelerator: str, **more: object) -> Container:
    known = Container(runtime, IMAGE, accelerator, (), (), "/cache/home", "/home/a/runs/1", name="run-train-1-0")
    return replace(known, user="1001:100", groups=("27", "1000"), node="n1", cpus="8", **more)  # type: ignore[arg-type]


def mounts(accelerator: str) -> list[str]:
    return OWN + (NPU if accelerator == "npu" else [])


def each(option: str, values: list[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def expected(runtime: str, accelerator: str) -> list[str]:
    places, npu, inside = mounts(accelerator), accelerator == "npu", INSIDE[accelerator]
    files = [path for path in places if not path.startswith("/dev/")]
    both = [f"{path}:{path}" for path in files]
    by_name = ["--env", "CANARY_TOKEN", "--env", "MASTER_ADDR", "--env", "PKUSLURM_TREE"]
    devices = each("--device", ["/dev/davinci0", "/dev/davinci1", "/dev/davinci_manager"]) if npu else []
    nv = ["--nv"] if accelerator == "cuda" else []
    if runtime in ("apptainer", "singularity"):
        return [runtime, "exec", "--no-home", "--writable-tmpfs", *nv, *each("--bind", places), IMAGE, *inside]
    if runtime == "charliecloud":
        driver = ["--bind", "/usr/local/Ascend/driver", "--bind", "/etc/hccn.conf"] if npu else []
        binds = ["--bind", "/data", "--bind", "/home", "--bind", "/opt/pkuslurm", *driver]
        script = inside[2].replace(GO_IN, GO_IN + FILLED_UP)
        return ["ch-run", *binds, IMAGE, "--", inside[0], "-c", script, *inside[3:]]
    common = ["run", "--rm", "--name", "run-train-1-0", "--network", "host", "--ipc", "host"]
    common += ["--entrypoint", ""]
    if runtime == "docker":
        gpus = ["--gpus", "all"] if accelerator == "cuda" else []
        own = ["--init", "--user", "1001:100", "--group-add", "27", "--group-add", "1000", *gpus]
        return ["docker", *common, *own, *devices, *each("--volume", both), *by_name, IMAGE, *inside]
    if runtime == "podman":
        more = {"npu": ["--group-add", "keep-groups"], "cuda": ["--device", "nvidia.com/gpu=all"], "cpu": []}
        own = ["--security-opt", "label=disable", "--userns", "keep-id", *more[accelerator]]
        return ["podman", *common, *own, *devices, *each("--volume", both), *by_name, IMAGE, *inside]
    if runtime == "enroot":
        return ["enroot", "start", "--rw", *each("--mount", places), *by_name, IMAGE, *inside]
    assert runtime == "pyxis"
    return [
        *("srun", "--overlap", "--nodes=1", "--ntasks=1", "--nodelist=n1", "--cpus-per-task=8", "--cpu-bind=none"),
        *("--export=ALL", "--input=none", "--unbuffered", f"--container-image={IMAGE}"),
        f"--container-mounts={','.join(f'{path}:{path}' for path in places)}",
        "--container-env=CANARY_TOKEN,MASTER_ADDR,PKUSLURM_TREE",
        *("--container-writable", "--no-container-mount-home", "--no-container-entrypoint", *inside),
    ]


@pytest.mark.parametrize("accelerator", ["cpu", "npu", "cuda"])
@pytest.mark.parametrize("runtime", [name for name in RUNTIMES if name != "none"])
def test_the_whole_command(runtime: str, accelerator: str) -> None:
    made = wrap(container(runtime, accelerator), ARGV, NAMES, mounts(accelerator))
    assert made == expected(runtime, accelerator)
    script = made[made.index("-c") + 1]
    for shell in ("bash", "sh"):
        checked = subprocess.run([shell, "-n", "-c", script], capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_without_a_container_nothing_changes() -> None:
    assert wrap(container("none", "npu"), ARGV, NAMES, OWN) == ARGV
    assert environment(container("none", "npu"), {"A": "1"}, []) == {"A": "1"}


def test_what_only_a_node_knows() -> None:
    """Slurm's GPUs, a charliecloud that makes mount points, root's podman, a training that ends by itself at TERM."""
    gpus = wrap(container("docker", "cuda", gpus=("2", "3")), ARGV, [], [])
    assert gpus[gpus.index("--gpus") + 1] == '"device=2,3"'
    gpus = wrap(container("podman", "cuda", gpus=("2", "3")), ARGV, [], [])
    assert [word for word in gpus if word.startswith("nvidia")] == ["nvidia.com/gpu=2", "nvidia.com/gpu=3"]
    overlaid = wrap(container("charliecloud", "cpu", overlay=True), ARGV, [], OWN)
    binds = ["--bind", "/data/北大 模型", "--bind", "/home/a/runs", "--bind", "/opt/pkuslurm"]
    assert overlaid[: 3 + len(binds)] == ["ch-run", "--write-fake", *binds, IMAGE]
    root = wrap(replace(container("podman", "npu"), user="0:0"), ARGV, [], [])
    assert "keep-id" not in root
    saving = wrap(container("docker", "npu", deaf_to=("USR1", "USR2", "TERM")), ARGV, [], [])
    quick = wrap(container("docker", "cpu", deaf_to=()), ARGV, [], [])
    assert "trap" not in quick[quick.index("-c") + 1]
    assert "trap '' USR1 USR2 TERM; exec \"$@\"" in saving[saving.index("-c") + 1]


def test_which_variables_go_in() -> None:
    """Ours, a scheduler's, a library's settings; not the node's own paths, which the image has of its own."""
    env = {"PATH": "/node", "PYTHONPATH": "/node", "LD_LIBRARY_PATH": "/node", "CUDA_HOME": "/node", "HOME": "/h"}
    env |= {"ASCEND_HOME_PATH": "/node", "VIRTUAL_ENV": "/node", "MY_SECRET": "no", "HF_HOME": "/node", "LANG": "zh_CN"}
    inside = {"TOKEN": "s3cret", "NODE_RANK": "0", "HCCL_IF_IP": "10.0.0.1", "ASCEND_RT_VISIBLE_DEVICES": "0,1"}
    inside |= {"CUDA_VISIBLE_DEVICES": "0", "GLOO_SOCKET_IFNAME": "eth0", "USER": "a", "https_proxy": "http://p:1"}
    given = env | inside
    names = sorted({*inside, "PKUSLURM_TREE"})
    for runtime in RUNTIMES:
        # mounted one by one, the cards of a container of docker's count from 0
        own = [name for name in names if runtime not in ("docker", "podman") or name != "ASCEND_RT_VISIBLE_DEVICES"]
        assert passed(given, ["TOKEN"], container(runtime, "npu")) == own, runtime
    assert "CUDA_VISIBLE_DEVICES" not in passed(given, [], container("docker", "cuda", gpus=("2",)))
    assert "CUDA_VISIBLE_DEVICES" in passed(given, [], container("docker", "cpu", gpus=("2",))), "none is meant"
    assert "CUDA_VISIBLE_DEVICES" in passed(given, [], container("enroot", "cuda", gpus=("2",))), (
        "it has the node's all"
    )
    assert "CUDA_VISIBLE_DEVICES" in passed(given, [], container("apptainer", "cuda", gpus=("2",)))


@pytest.mark.parametrize(("runtime", "prefix"), [("apptainer", "APPTAINERENV_"), ("singularity", "SINGULARITYENV_")])
def test_the_images_own_variables_are_overruled(runtime: str, prefix: str) -> None:
    given = {"TOKEN": "s3cret", "PATH": "/bin", "HOME": "/h", "PYTHONPATH": "/node", "SLURM_PROCID": "1"}
    made = environment(container(runtime, "cpu"), given, ["PKUSLURM_TREE", "TOKEN"])
    kept = {"TOKEN": "s3cret", "PATH": "/bin", "HOME": "/h", "SLURM_PROCID": "1"}
    assert made == kept | {f"{prefix}TOKEN": "s3cret"}
    assert not any("s3cret" in word for word in wrap(container(runtime, "cpu"), ARGV, ["TOKEN"], OWN))


def test_a_client_keeps_what_leads_it_to_its_daemon() -> None:
    given = {"DOCKER_HOST": "unix:///run/d", "PYTHONPATH": "/node", "HOME": "/h"}
    for runtime in ("docker", "podman"):
        assert environment(container(runtime, "cpu"), given, []) == given
    for runtime in ("charliecloud", "enroot", "pyxis"):
        assert environment(container(runtime, "cpu"), given, []) == {"HOME": "/h"}


def test_only_a_daemon_must_be_told_to_stop() -> None:
    assert {runtime: stop(container(runtime, "cpu")) for runtime in RUNTIMES} == dict.fromkeys(RUNTIMES) | {
        "docker": ["docker", "rm", "--force", "run-train-1-0"],
        "podman": ["podman", "rm", "--force", "run-train-1-0"],
    }


@pytest.mark.parametrize(
    ("runtime", "path", "character"),
    [
        ("apptainer", "/data/a,b", ","),
        ("singularity", "/data/a:b", ":"),
        ("docker", "/data/a:b", ":"),
        ("podman", "/data/a:b", ":"),
        ("charliecloud", "/data/a:b", ":"),
        ("enroot", "/data/a b", " "),
        ("pyxis", "/data/a,b", ","),
    ],
)
def test_a_path_that_would_be_split_is_refused_in_words(runtime: str, path: str, character: str) -> None:
    with pytest.raises(PkuslurmError) as refused:
        refuse_splitting(runtime, ["/data", path])
    assert str(refused.value) == (
        f"container.runtime={runtime}: it splits paths at {character!r}, and {path} has one; "
        "give a path without it, or choose another runtime"
    )
    refuse_splitting(runtime, ["/data/北大", "/data/模型"])
    refuse_splitting("none", [path])


def test_what_lies_below_another_one_is_not_named() -> None:
    assert outermost(["/a/b", "/a", "/a/b/c", "/ab", "/a"]) == ["/a", "/ab"]
    assert containers.around("/data/my/a.json") == "/data/my"
    assert containers.around("/etc/a.json") == "/etc/a.json", "the image's /etc stays"


def test_charliecloud_fills_up_from_the_image(tmp_path: Path) -> None:
    """PATH is the image's; what is set stays; what is no variable is passed over."""
    file = tmp_path / "environment"
    lines = ["PATH=/image/bin:/usr/bin:/bin", "OURS=theirs", "EMPTY=theirs", "NEW=it's $HOME; `id` = x", "not a line"]
    file.write_text("\n".join([*lines, "a-b=1", "2=3", "=4"]) + "\n", encoding="utf-8")
    made = wrap(container("charliecloud", "cpu"), ["/usr/bin/env"], [], [])
    words = made[made.index("--") + 1 :]
    words = [word.replace("/ch/environment", str(file)).replace("/home/a/runs/1", str(tmp_path)) for word in words]
    env = {"PATH": os.environ["PATH"], "OURS": "ours", "EMPTY": ""}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines())
    wanted = {"PATH": "/image/bin:/usr/bin:/bin", "OURS": "ours", "EMPTY": "", "NEW": "it's $HOME; `id` = x"}
    assert {name: seen[name] for name in wanted} == wanted
    assert seen["HOME"] == "/cache/home" and seen["PWD"] == str(tmp_path)
    assert not {"a-b", "2", "not a line"} & set(seen)


def test_canns_variables_come_before_what_is_there(tmp_path: Path) -> None:
    """Its script reads what nobody has set; a PYTHONPATH of the user's stays behind CANN's."""
    toolkit = tmp_path / "ascend-toolkit"
    toolkit.mkdir()
    (toolkit / "set_env.sh").write_text(
        "export PYTHONPATH=/cann:$PYTHONPATH LD_LIBRARY_PATH=/cann/lib:$LD_LIBRARY_PATH$UNSET\n", encoding="utf-8"
    )
    made = wrap(container("apptainer", "npu"), ["env"], [], [])
    words = made[made.index("bash") :]
    words = [word.replace("/usr/local/Ascend", str(tmp_path)).replace("/home/a/runs/1", "/") for word in words]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": "/mine"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines())
    driver = f"{tmp_path}/driver/lib64"
    assert seen["PYTHONPATH"] == "/cann:/mine"
    assert seen["LD_LIBRARY_PATH"] == f"/cann/lib::{driver}/driver:{driver}/common:{driver}"
