"""Into an image that has LLaMA-Factory: the bundle by PYTHONPATH, `make setup` over it. Nothing there is changed."""

from __future__ import annotations

import ensurepip
import errno
import os
import runpy
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPO, environment
from tests.standin_run import standin

# LLaMA-Factory brings omegaconf itself
OURS = ("hydra", "submitit", "cloudpickle", "pkuslurm", "_pkuslurm", "__editable__")


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pip, as ensurepip would unpack it."""
    place = tmp_path_factory.mktemp("pip")
    (wheel,) = Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(place)
    return place


def image(place: Path, hidden: tuple[str, ...] = OURS, pip: Path | None = None) -> Path:
    """The python of an environment that has what this one has, without ``hidden``."""
    venv.create(place, symlinks=True)
    (packages,) = place.glob("lib/python3.*/site-packages")
    for entry in pip.iterdir() if pip else ():
        (packages / entry.name).symlink_to(entry)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith((*hidden, "pip", "__pycache__")) and not (packages / entry.name).exists():
            (packages / entry.name).symlink_to(entry)
    return place / "bin" / "python"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("a bundle 包")
    for _ in range(2):  # the second time over the first
        made = subprocess.run(
            ["make", "-s", "bundle", f"PY={sys.executable}", f"DIR={place}"], cwd=REPO, capture_output=True, text=True
        )
        assert made.returncode == 0 and "hydra-core 1." in made.stderr, made.stderr
        assert f"export PYTHONPATH={shlex.quote(str(place))}; python" in made.stderr, "it is typed as it is printed"
    assert not list(place.rglob("*.so")) and [entry.name for entry in place.iterdir()] == ["pkuslurm"]
    return place


def surroundings(home: Path, **more: str) -> dict[str, str]:
    """Without our sources; bytecode is written, so that each module is compiled once."""
    env = environment(home)
    return {name: value for name, value in env.items() if name not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")} | more


def ask(python: Path, home: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = surroundings(home, **more)
    return subprocess.run([str(python), *words], cwd=home, env=env, capture_output=True, encoding="utf-8")


def test_a_run_in_an_image_by_the_bundle(bundle: Path, tmp_path: Path, weird: Path) -> None:
    """All of ours is real, from launch to the report; the training is stood in for."""
    python = image(tmp_path / "image")
    more = {"PYTHONPATH": str(bundle), "PKUSLURM_CACHE": str(weird / "cache"), "OMP_NUM_THREADS": "1", "LC_ALL": "C"}
    assert "No module named 'hydra'" in ask(python, weird, "-c", "import hydra", **more).stderr
    words = ("here=true", "nodes=2", "cluster.accelerator=cpu", f"cluster.python={standin(tmp_path)}")
    ran = ask(python, weird, "-m", "pkuslurm.launch", *words, **more)
    assert ran.returncode == 0, ran.stderr
    assert (Path(ran.stdout.splitlines()[-1]) / "report.html").is_file()
    status = ask(python, weird, "-m", "pkuslurm", "status", "--json", **more)
    assert '"state": "COMPLETED"' in status.stdout


# what LLaMA-Factory 0.9.4 brought with it when it came out
IMAGE = {"omegaconf": "2.3.0", "antlr4-python3-runtime": "4.9.3", "PyYAML": "6.0.3", "rich": "14.2.0"} | {
    "packaging": "25.0",
    "typing-extensions": "4.15.0",
}


def test_pip_install_beside_0_9_4_changes_nothing() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(requires("hydra-core") or []), *(requires("submitit") or [])]
    asked = [Requirement(one) for one in wanted]
    checked = [one for one in asked if one.name in IMAGE and not (one.marker and "extra" in str(one.marker))]
    assert {one.name for one in checked} >= {"omegaconf", "antlr4-python3-runtime", "PyYAML", "rich", "packaging"}
    assert [str(one) for one in checked if IMAGE[one.name] not in one.specifier] == []


WHERE = "import pkuslurm, hydra, omegaconf, yaml; print(*[m.__file__ for m in (hydra, omegaconf, yaml)], sep='\\n')"


def test_what_the_image_has_is_not_hidden(bundle: Path, tmp_path: Path) -> None:
    """hydra, omegaconf, antlr4 are all the image's, or all ours; a training, which starts without us, sees its own."""
    whole = image(tmp_path / "whole", hidden=("pkuslurm", "_pkuslurm", "__editable__"))
    told = ask(whole, tmp_path, "-c", WHERE, PYTHONPATH=str(bundle)).stdout.splitlines()
    assert len(told) == 3 and all(str(bundle) not in file for file in told)
    half = image(tmp_path / "half", hidden=(*OURS, "omegaconf", "antlr4"))
    (packages,) = (tmp_path / "half").glob("lib/python3.*/site-packages")
    for name in ("omegaconf", "antlr4"):  # of other versions, which do not fit
        (packages / f"{name}.py").write_text("OTHER = True\n", encoding="utf-8")
    told = ask(half, tmp_path, "-c", WHERE, PYTHONPATH=str(bundle)).stdout.splitlines()
    assert [str(bundle) in file for file in told] == [True, True, False]
    plain = "import antlr4, omegaconf; print(omegaconf.OTHER, antlr4.OTHER)"
    assert ask(half, tmp_path, "-c", plain, PYTHONPATH=str(bundle)).stdout == "True True\n"


def test_yaml_without_its_compiled_part(bundle: Path, tmp_path: Path) -> None:
    python = image(
        tmp_path / "image",
        hidden=(*OURS, "omegaconf", "antlr4", "yaml", "_yaml", "PyYAML", "pyyaml", "rich", "llamafactory"),
    )
    dry = ask(python, tmp_path, "-m", "pkuslurm.launch", "dry_run=true", PYTHONPATH=str(bundle))
    assert dry.returncode == 0 and str(bundle / "pkuslurm" / "conf") in dry.stdout, dry.stderr
    told = "import pkuslurm, yaml; print(yaml.__with_libyaml__, yaml.__file__)"
    assert ask(python, tmp_path, "-c", told, PYTHONPATH=str(bundle)).stdout.startswith(f"False {bundle}")
    # that image has no LLaMA-Factory either: what is told to be done works without a Makefile
    found = ask(python, tmp_path, "-m", "pkuslurm", "doctor", PYTHONPATH=str(bundle)).stdout.splitlines()
    refused = ask(python, tmp_path, "-m", "pkuslurm.launch", "here=true", PYTHONPATH=str(bundle)).stderr
    assert "cluster.python=" in found[-1] and "is here" not in found[-1]
    assert "has no LLaMA-Factory; name one that has it: cluster.python=" in refused and "make" not in refused, refused
    runs = ask(python, tmp_path, "-m", "pkuslurm", "runs", PYTHONPATH=str(bundle)).stdout
    assert "-m pkuslurm launch" in runs and "make" not in runs, runs


REFUSED = [("", "which folder?"), ("taken", "is no bundle"), ("file", "is a file"), ("file/x", "Not a directory")]


@pytest.mark.parametrize(("folder", "words"), [*REFUSED, ("/proc/nope", "No such file")])
def test_a_folder_that_is_not_right_is_refused(folder: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "taken" / "pkuslurm").mkdir(parents=True)
    (tmp_path / "file").touch()
    given = str(tmp_path / folder) if folder else ""
    made = subprocess.run([sys.executable, str(REPO / ".ci" / "bundle"), given], capture_output=True, text=True)
    assert made.returncode == 2 and words in made.stderr and len(made.stderr.splitlines()) == 1


def test_the_old_bundle_stays_where_the_new_one_cannot_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = runpy.run_path(str(REPO / ".ci" / "bundle"))
    (tmp_path / "pkuslurm" / "_bundled").mkdir(parents=True)
    rename = Path.rename

    def fails(path: Path, to: Path) -> Path:
        if path.name == ".pkuslurm.new":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fails)
    monkeypatch.setattr(sys, "argv", ["bundle", str(tmp_path)])
    assert program["main"]() == 2 and capsys.readouterr().err.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["pkuslurm"] and (
        tmp_path / "pkuslurm" / "_bundled"
    ).is_dir()


def test_an_old_python_is_told_so(tmp_path: Path) -> None:
    """As an old one would read it: no newer syntax, and one line before anything else is imported."""
    text = (REPO / "pkuslurm" / "__init__.py").read_text(encoding="utf-8")
    played = f"import sys; sys.version_info = (3, 9, 2); sys.argv = ['x']; __file__ = 'x'; exec({text!r})"
    ended = subprocess.run([sys.executable, "-c", played], capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert ended.returncode == 2 and "3.9，需要 3.11" in ended.stderr and len(ended.stderr.splitlines()) == 1


def checkout(place: Path) -> Path:
    """What `make setup` reads, and no more; the sources are ours."""
    for name in (".ci", ".constraints"):
        (place / name).mkdir(parents=True)
        for file in (REPO / name).iterdir():
            (place / name / file.name).symlink_to(file)
    (place / ".ci" / "setup").unlink()
    (place / ".ci" / "setup").write_bytes((REPO / ".ci" / "setup").read_bytes())
    (place / ".ci" / "setup").chmod(0o755)
    for name in ("pyproject.toml", "pkuslurm", "conf", "sbatch"):
        (place / name).symlink_to(REPO / name)
    return place


def test_make_setup_in_an_image_installs_over_it(pip: Path, tmp_path: Path) -> None:
    """With an index that does not answer: nothing is wanted of it, since all is there."""
    python = image(tmp_path / "image", hidden=("pkuslurm", "_pkuslurm", "__editable__"), pip=pip)
    place = checkout(tmp_path / "a clone")
    env = surroundings(tmp_path, PYTHON=str(python), PIP_INDEX_URL="http://127.0.0.1:9/", PIP_RETRIES="0")
    for _ in range(2):
        made = subprocess.run([".ci/setup", "train"], cwd=place, env=env, capture_output=True, encoding="utf-8")
        assert made.returncode == 0, made.stderr
    assert not made.stderr  # a second time nothing is to do
    there = "import importlib.util as u, pkuslurm, yaml; from importlib.metadata import version as v\n"
    there += "print(pkuslurm.__file__, v('llamafactory'), bool(u.find_spec('llamafactory').origin))"
    told = subprocess.run([".venv/bin/python", "-c", there], cwd=place, env=env, capture_output=True, text=True)
    assert told.stdout.startswith(f"{place}/pkuslurm") and "0.9." in told.stdout and "True" in told.stdout, told.stderr
    (above,) = (place / ".venv").glob("lib/python3.*/site-packages")
    assert [entry.name for entry in above.iterdir()] == ["pkuslurm-and-the-image.pth"]


def test_what_would_change_the_image_is_not_installed(pip: Path, tmp_path: Path) -> None:
    python = image(tmp_path / "image", pip=pip)
    place = checkout(tmp_path / "clone")
    env = surroundings(tmp_path, PYTHON=str(python), PIP_INDEX_URL="http://127.0.0.1:9/", PIP_RETRIES="0")
    made = subprocess.run([".ci/setup", "train"], cwd=place, env=env, capture_output=True, encoding="utf-8")
    assert made.returncode == 2 and "make bundle DIR=" in made.stderr and not (place / ".venv").exists()


PIP = """\
#!/bin/bash
[ "$1 $2" = "config list" ] && cat <<'END'
global.index-url='https://mirror.example/simple'
:env:.index-url='https://me:secret@near.example/simple'
global.trusted-host='far.example'
install.trusted-host='near.example'
global.extra-index-url='\\nhttps://a.example/simple\\nhttps://b.example/simple'
END
"""


def test_uv_is_told_what_pip_is_configured_with(tmp_path: Path) -> None:
    place = checkout(tmp_path / "clone")
    programs = tmp_path / "bin"
    programs.mkdir()
    uv = f"#!/bin/bash\nenv | grep '^UV_' | sort >{tmp_path}/told\nmkdir -p .venv/bin\n"
    for name, text in {"pip": PIP, "uv": uv, "python3": "#!/bin/bash\nexit 1\n"}.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    env = environment(tmp_path, PATH=f"{programs}:{os.environ['PATH']}")
    env = {name: value for name, value in env.items() if not name.startswith(("UV_", "PIP_"))}
    made = subprocess.run([".ci/setup", "base"], cwd=place, env=env, capture_output=True, encoding="utf-8")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "told").read_text(encoding="utf-8").splitlines() == [
        "UV_DEFAULT_INDEX=https://me:secret@near.example/simple",
        "UV_INDEX=https://a.example/simple https://b.example/simple",
        "UV_INDEX_STRATEGY=unsafe-best-match",
        "UV_INSECURE_HOST=near.example",
    ]
    assert "secret" not in made.stderr and "https://…@near.example" in made.stderr
    env["UV_DEFAULT_INDEX"] = "https://own.example/simple"  # what is said to uv itself wins
    (place / ".venv" / ".installed-base").unlink()
    subprocess.run([".ci/setup", "base"], cwd=place, env=env, capture_output=True, check=True)
    assert "UV_DEFAULT_INDEX=https://own.example/simple" in (tmp_path / "told").read_text(encoding="utf-8")


UV = """\
#!/bin/bash
if [ "$1" = venv ]; then
    [ ! -e .venv ] || exit 9
    mkdir -p .venv/bin && ln -s /bin/true .venv/bin/python
elif [ ! -e uv-works ]; then
    touch .venv/half
    kill -TERM $PPID
    sleep 0.2
fi
"""


def test_a_setup_that_was_ended_is_begun_anew_and_a_verb_makes_none(tmp_path: Path) -> None:
    place = checkout(tmp_path / "clone")
    (place / "Makefile").symlink_to(REPO / "Makefile")
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(UV, encoding="utf-8")
    uv.chmod(0o755)
    env = surroundings(tmp_path, PATH=f"{uv.parent}:/usr/bin:/bin", PYTHON="/bin/false")

    def make(*words: str) -> tuple[int, str]:
        made = subprocess.run(["make", "-s", *words], cwd=place, env=env, capture_output=True, encoding="utf-8")
        return made.returncode, made.stderr

    for verbs in (("status", "cancel", "report", "retry", "merge", "infer", "serve", "chat"), ("status",)):
        for verb in verbs:
            code, err = make(verb)
            assert code == 2 and err.startswith("no .venv yet: make setup\n"), (verb, err)
        assert make("setup")[0] != 0 and (place / ".venv" / "half").exists()
    (place / "uv-works").touch()
    (place / ".venv-unfinished").write_text("999999999\n", encoding="utf-8")  # it has ended
    code, err = make("setup")
    assert code == 0 and not (place / ".venv" / "half").exists() and not (place / ".venv-unfinished").exists(), err
    assert make("status") == (0, "")
