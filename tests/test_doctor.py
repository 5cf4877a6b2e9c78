"""doctor says what is there and what to mend, quickly, wherever it is asked."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from pkuslurm import cli
from pkuslurm.doctor import examine, interpreter, machine, places, site, software
from pkuslurm.doctor.check import Check
from tests.conftest import environment, run

NAMES = [
    "python",
    "pkuslurm",
    "packages",
    "/proc",
    "LLaMA-Factory",
    "devices",
    "cores",
    "memory",
    "Slurm",
    "containers",
]
NAMES += ["run_root", "cache_root", "HOME", "state directory", "umask", "locale", "proxies", "hubs", "loopback"]


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.check: check for check in checks}


def test_json_is_as_the_contract_says(weird: Path) -> None:
    ended = run(["doctor", "--json"], weird, environment(weird), module="pkuslurm")
    found = json.loads(ended.out)
    assert all(list(one) == ["check", "ok", "detail", "remedy"] for one in found)
    assert [name for name in NAMES if name not in {one["check"] for one in found}] == []
    assert all(one["remedy"] for one in found if not one["ok"]), "what is not well has a remedy"
    assert ended.err == "" and ended.code in (0, 1)


def test_it_is_quick_and_loads_nothing_heavy(weird: Path) -> None:
    script = "import sys, time; began = time.monotonic(); from pkuslurm.cli import main; main(['doctor'])\n"
    script += "print([m for m in ('torch', 'transformers', 'llamafactory', 'hydra', 'submitit') if m in sys.modules])\n"
    script += "print(time.monotonic() - began)"
    import subprocess

    done = subprocess.run([sys.executable, "-c", script], cwd=weird, env=environment(weird), capture_output=True)
    *_, modules, seconds = done.stdout.decode().splitlines()
    assert modules == "[]" and float(seconds) < 5.0, "1.5 s are meant; a busy machine may take longer"


def test_without_home_in_a_c_locale_in_a_folder_that_cannot_be_written(weird: Path) -> None:
    env = environment(weird, LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    for name in ("HOME", "XDG_STATE_HOME"):
        env.pop(name)
    ended = run(["doctor"], Path("/proc"), env, module="pkuslurm")
    assert ended.code in (0, 1) and ended.err == "", ended
    if os.geteuid():
        assert ended.code == 1 and "missing: run_root" in ended.out.splitlines()[-1]
    assert "✓" not in ended.out and "set HOME" in ended.out and "PYTHONUTF8=1" in ended.out
    assert "/proc/runs: " in ended.out


def test_a_python_that_has_no_llamafactory(tmp_path: Path) -> None:
    bare = interpreter.Python("/bare/python", "3.12.1", "cpython-312", (str(tmp_path),), "/bare")
    (check,) = software.training(bare, None, {})
    assert not check.ok and "cluster.python=" in (check.remedy or "")
    (check,) = software.training("no such file", "/no/python", {})
    assert not check.ok and check.needed and "/no/python" in check.detail


def installed(site_packages: Path, name: str, version: str, *requires: str) -> None:
    folder = site_packages / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {one}" for one in requires)]
    (folder / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def fake_python(site_packages: Path) -> interpreter.Python:
    installed(site_packages, "llamafactory", "0.9.5", "transformers<=5.6.0,>=4.55.0", "torch>=2.4", "jieba")
    installed(site_packages, "transformers", "5.9.0")
    installed(site_packages, "torch", "2.11.0+cpu")
    for package, compiled in (("torch", True), ("transformers", False), ("llamafactory", False)):
        (site_packages / package / "sub").mkdir(parents=True)
        for name in ("__init__", "a", "sub/b"):
            (site_packages / package / f"{name}.py").touch()
        if compiled:
            (site_packages / package / "__pycache__").mkdir()
            (site_packages / package / "__pycache__" / "a.cpython-311.pyc").touch()
            (site_packages / package / "__pycache__" / "__init__.cpython-310.pyc").touch()
    return interpreter.Python("/x y/python", "3.11.9", "cpython-311", (str(site_packages),), "/x y")


def test_versions_and_bytecode_are_read_not_imported(weird: Path) -> None:
    python = fake_python(weird)
    assert interpreter.versions(python, ("torch", "peft", "llamafactory")) == {
        "torch": "2.11.0+cpu",
        "llamafactory": "0.9.5",
    }
    assert interpreter.bytecode(python, software.COMPILED) == (9, 1), "another Python's bytecode is none"
    checks = by_name(list(software.training(python, None, {})))
    assert checks["LLaMA-Factory fits"].detail == "transformers 5.9.0 (wants <=5.6.0,>=4.55.0)"
    assert "'/x y/python' -m compileall" in (checks["bytecode"].remedy or "") and not checks["bytecode"].ok
    assert by_name(list(software.training(python, None, {"PYTHONPYCACHEPREFIX": "/p"})))["bytecode"].ok


def test_devices_without_their_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("davinci0", "davinci11", "davinci_manager", "nvidia0", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert machine.devices(tmp_path) == {"npu": 2, "cuda": 1}
    monkeypatch.setattr(machine, "devices", lambda: {"npu": 2, "cuda": 1})
    checks = by_name(list(software.training(fake_python(tmp_path / "site"), None, {})))
    assert not checks["torch and NPU"].ok and not checks["torch and CUDA"].ok
    assert by_name(list(site.hardware()))["devices"].detail.startswith("2 NPUs, 1 GPU")


def test_another_interpreter_is_asked(weird: Path) -> None:
    found = interpreter.look(sys.executable)
    assert isinstance(found, interpreter.Python) and found.version == sys.version.split()[0]
    script = weird / "no python"
    script.write_text("#!/bin/sh\necho hello\n", encoding="utf-8")
    script.chmod(0o755)
    assert interpreter.look(str(script)) == "it is no Python that answers"
    assert isinstance(interpreter.look(str(weird / "missing")), str)


MOUNTS = r"""22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:31 / /home rw,relatime - nfs4 nas:/home rw
31 30 0:32 / /home/my\040data rw - lustre mds:/x rw
32 22 0:33 / /dev/shm rw - tmpfs tmpfs rw
broken line
"""


def test_file_systems() -> None:
    def kind(path: str) -> str:
        return machine.file_system(Path(path), MOUNTS)

    assert [kind(path) for path in ("/usr", "/dev/shm", "/")] == ["ext4", "tmpfs", "ext4"]
    assert machine.file_system(Path("/nowhere"), "") == "?"


def test_folders(weird: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "file_system", lambda path: "tmpfs")
    (weird / "a file").touch()
    environ = {"HOME": str(weird), "PKUSLURM_RUN_ROOT": str(weird / "a" / "b")}
    checks = by_name(list(places.folders(environ, {"cache_root": f"{weird}/a file/x"})))
    assert not checks["run_root"].ok and "lost at a restart" in checks["run_root"].detail
    assert not checks["cache_root"].ok and "not writable" in checks["cache_root"].detail
    assert not (weird / "a").exists(), "doctor makes nothing"


def test_defaults_of_ones_own(weird: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = weird / ".config" / "pkuslurm" / "conf"
    (own / "cluster").mkdir(parents=True)
    (own / "defaults.yaml").write_text("cluster: mine\nrun_root: /data/runs\n", encoding="utf-8")
    (own / "cluster" / "mine.yaml").write_text("python: /no/such/python\n", encoding="utf-8")
    monkeypatch.chdir(weird)
    environ = {"HOME": str(weird)}
    chosen = places.defaults(environ)
    assert places.text(chosen, "run_root") == "/data/runs" and places.python(environ, chosen) == "/no/such/python"
    assert (
        places.python(environ, {"cluster.python": "/a"})
        == places.python(environ, {"cluster": {"python": "/a"}})
        == "/a"
    )
    assert not by_name(examine(environ))["LLaMA-Factory"].ok
    (own / "defaults.yaml").write_text("{", encoding="utf-8")
    assert places.defaults(environ) == {}


def test_the_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = by_name(list(site.surroundings({"https_proxy": "http://me:secret@proxy:1"})))
    assert not checks["proxies"].ok and "secret" not in checks["proxies"].detail
    assert by_name(list(site.surroundings({"https_proxy": "p", "NO_PROXY": "localhost"})))["proxies"].ok
    hosts = ["127.0.0.1 localhost # n1", "127.0.1.1\tn1.cluster n1", "::1 n2"]
    assert machine.in_hosts("n1", hosts) == "127.0.1.1" and machine.in_hosts("n2", hosts) is None
    monkeypatch.setattr(machine, "own_address", lambda name: "127.0.1.1")
    assert not by_name(list(site.surroundings({})))["host name"].ok


def test_a_controller_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "scontrol"
    fake.write_text("#!/bin/sh\nexec sleep 30\n", encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    began = time.monotonic()
    (tmp_path / "sbatch").write_text("#!/bin/sh\n", encoding="utf-8")
    (tmp_path / "sbatch").chmod(0o755)
    silent = "sbatch is installed, but no cluster answers here; cluster=local works"
    assert by_name(list(site.programs({})))["Slurm"].detail == silent and time.monotonic() - began < 10
    fake.write_text(f"#!/bin/sh\necho scontrol: error: {'long ' * 90} >&2\nexit 1\n", encoding="utf-8")
    checks = by_name(list(site.programs({})))
    assert checks["Slurm"].detail == silent and not checks["Slurm"].ok and "slurmctld" not in checks
    fake.write_text("#!/bin/sh\necho 'Slurmctld(primary) at login is UP'\n", encoding="utf-8")
    assert by_name(list(site.programs({"SLURM_JOB_ID": "7"})))["slurmctld"].ok


def test_the_exit_code_tells_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pkuslurm import doctor

    monkeypatch.setattr(doctor, "examine", lambda *_: [Check("a", True, "x"), Check("b", False, "y", "mend it")])
    assert cli.main(["doctor"]) == 0 and "-> mend it" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda *_: [Check("b", False, "y", "mend it", True)])
    assert cli.main(["doctor"]) == 1 and "missing: b" in capsys.readouterr().out


def test_on_a_terminal_a_line_goes_on_below_its_beginning_and_chinese_is_two_wide() -> None:
    from pkuslurm.doctor import _hanging

    assert (
        _hanging("!  x  ", "/家/我的 文件 夹/runs: 中文 is here", 27)
        == "!  x  /家/我的 文件\n      夹/runs: 中文 is here"
    )
    assert _hanging("!  x  ", "a long line " * 20, 0) == "!  x  " + "a long line " * 20
    assert _hanging("!  x  ", f"{'w' * 90} b", 30) == f"!  x  {'w' * 90}\n      b"
