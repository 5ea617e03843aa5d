"""The checks of ds4 doctor: on this machine, on made-up ones, with a fake driver, and where a check breaks down."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
from fake_driver import build_fake_driver, run_with_fake_driver

from ds4 import doctor
from ds4.doctor import Check, Report, diagnose
from ds4.errors import CudaError, Ds4Error


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_fake_driver(tmp_path_factory.mktemp("driver"))


def with_driver(library, code: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run Python ``code`` on the fake driver."""
    return run_with_fake_driver(library, "-c", code, log="/dev/null", **{"capability": "9.0", **settings})


def child(*names: str) -> str:
    """Code of diagnose()'s child process with these checks, whatever they need."""
    return (
        f"from ds4 import doctor\ndoctor.CHECKS = {{name: (doctor.CHECKS[name][0], ()) for name in {names}}}\n"
        "doctor._main()"
    )


def findings(output: str) -> dict[str, dict]:
    """The checks that a child process printed, by name."""
    lines = [json.loads(line) for line in output.splitlines()]
    return {line["name"]: line for line in lines if "name" in line}


def test_this_machine():
    report = diagnose()
    names = [check.name for check in report.checks]
    assert len(names) == len(set(names))
    assert {"python", "torch", "packages", "driver", "nvrtc", "headers", "compile", "cache", "kernels", "g++"} <= set(
        names
    )
    by_name = {check.name: check for check in report.checks}
    assert by_name["compile"].status == "ok"
    assert by_name["compile"].facts["bytes"] > 1000
    assert all("\n" not in check.text and check.text for check in report.checks)
    assert report.ok == all(check.status != "missing" for check in report.checks)


def test_a_gpu_that_the_driver_shows(library):
    found = findings(with_driver(library, child("driver", "gpus", "compile")).stdout)
    assert found["driver"]["status"] == "ok"
    assert found["driver"]["facts"]["cuda"] == "13.0"
    gpu = found["gpu 0"]
    assert gpu["status"] == "ok"
    assert gpu["text"] == "Fake GPU, 60.0 of 100.0 GB free, sm_90a"
    assert gpu["facts"]["memory_bytes"] == 100_000_000_000
    assert gpu["facts"]["free_bytes"] == 60_000_000_000
    assert gpu["facts"]["compute_capability"] == "9.0"
    assert found["compile"]["facts"]["architecture"] == "sm_90a"


@pytest.mark.parametrize(
    ("settings", "check", "name", "text"),
    [
        ({"capability": "7.5"}, "gpus", "gpu 0", "Fake GPU, .*7.5, ds4's kernels support 8.0"),
        ({"version": "12080"}, "nvrtc", "nvrtc", r"13.\d is newer than the driver, CUDA 12.8; install a driver"),
        ({"fail": "cuInit=803"}, "driver", "driver", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH.*restart"),
        (
            {"fail": "cuMemGetInfo=2"},
            "gpus",
            "gpus",
            "asking for the free memory of GPU 0 .Fake GPU.: CUDA_ERROR_OTHER",
        ),
    ],
)
def test_what_is_wrong_with_a_gpu_is_said(library, settings, check, name, text):
    done = with_driver(library, child(check), **settings)
    assert done.returncode == 0, done.stderr
    found = findings(done.stdout)
    assert found[name]["status"] == "missing"
    assert re.search(text, found[name]["text"])


def test_a_driver_that_hangs_ends_in_a_line(library):
    code = (
        "import json, dataclasses\nfrom ds4.doctor import diagnose\nprint(json.dumps(dataclasses.asdict(diagnose(3))))"
    )
    done = with_driver(library, code, hang="cuInit")
    last = json.loads(done.stdout)["checks"][-1]
    assert last["name"] == "driver"
    assert last["status"] == "missing"
    assert last["text"].startswith("no answer within 3 s; ")


def break_down(monkeypatch, code: str, time_limit_s: float = 20) -> Report:
    """The report where the child process runs ``code``."""

    def popen(command, **fields):
        return real([sys.executable, "-c", code], **fields)

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    return diagnose(time_limit_s)


def test_a_check_that_crashes_ends_in_a_line(monkeypatch):
    begun = 'import os\nprint(\'{"begins": "compile"}\', flush=True)\n'
    report = break_down(monkeypatch, begun + "os.kill(os.getpid(), 11)")
    assert report.checks == [Check("compile", "missing", "the check broke down: exit code -11")]
    assert not report.ok


def test_a_child_that_hangs_does_not_stay(monkeypatch):
    found = '{"name": str(os.getpid()), "status": "ok", "text": "pid", "facts": {}}'
    report = break_down(
        monkeypatch, f"import json, os, time\nprint(json.dumps({found}), flush=True)\ntime.sleep(60)", 1
    )
    pid, end = report.checks
    assert end.text.startswith("no answer within 1 s")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.name), 0)


def test_a_child_that_cannot_even_start_ends_in_a_line(monkeypatch):
    report = break_down(monkeypatch, "import nowhere")
    (check,) = report.checks
    assert check == Check("start", "missing", "the check broke down: ModuleNotFoundError: No module named 'nowhere'")


def test_other_output_is_ignored(monkeypatch):
    good = json.dumps({"name": "a", "status": "ok", "text": "b", "facts": {}})
    report = break_down(
        monkeypatch, f"print('hello'); print('[1]'); print('{{\"name\": 1}}'); print('{good}'); print('{{')"
    )
    assert report.checks == [Check("a", "ok", "b")]
    assert report.ok


def test_no_finding_is_no_success():
    assert not Report([]).ok
    assert Report([Check("a", "ok", ""), Check("b", "note", "")]).ok
    assert not Report([Check("a", "ok", ""), Check("b", "missing", "")]).ok


def run_checks(monkeypatch, capsys, checks) -> dict[str, dict]:
    """The findings of made-up checks, run as the child process runs them."""
    monkeypatch.setattr(doctor, "CHECKS", checks)
    doctor._main()
    return findings(capsys.readouterr().out)


def test_errors_become_findings_and_what_depends_on_them_is_left_out(monkeypatch, capsys):
    def fail(error):
        def check():
            raise error

        return check

    found = run_checks(
        monkeypatch,
        capsys,
        {
            "user": (fail(Ds4Error("install it")), ()),
            "cuda": (fail(CudaError("broken")), ()),
            "bug": (fail(OSError("libcudnn.so: cannot open")), ()),
            "after": (lambda: [Check("after", "ok", "never seen")], ("bug",)),
            "after that": (lambda: [Check("after that", "ok", "never seen")], ("after",)),
            "apart": (lambda: [Check("apart", "ok", "seen")], ()),
        },
    )
    assert {name: line["text"] for name, line in found.items()} == {
        "user": "install it",
        "cuda": "broken",
        "bug": "OSError: libcudnn.so: cannot open; install ds4 again",
        "apart": "seen",
    }
    assert all(line["status"] == ("ok" if name == "apart" else "missing") for name, line in found.items())


def test_every_check_depends_on_earlier_ones_only():
    seen: set[str] = set()
    for name, (_, needs) in doctor.CHECKS.items():
        assert set(needs) <= seen, name
        seen.add(name)


@pytest.mark.parametrize(("version", "status"), [(None, "missing"), ("13.0", "ok")])
def test_torch_with_and_without_cuda(monkeypatch, version, status):
    import torch

    monkeypatch.setattr(torch.version, "cuda", version)
    (check,) = doctor.check_torch()
    assert check.status == status
    assert check.facts["cuda"] == version
    assert torch.__version__ in check.text


def test_a_missing_package_says_what_to_install(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    (check,) = doctor.check_packages()
    assert check == Check("packages", "missing", "cuda-core is not installed; pip install 'ds4[gpu]'")


def test_the_cache_and_where_it_cannot_be(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "ds4" / "kernels"
    (check,) = doctor.check_cache()
    assert (check.status, check.facts["files"], check.facts["writable"]) == ("ok", 0, True)
    folder.mkdir(parents=True)
    (folder / "a.cubin").write_bytes(bytes(1_500_000))
    (folder / "other").write_bytes(bytes(100))
    (check,) = doctor.check_cache()
    assert check.text == f"{folder}, 1 kernels, 1.5 MB"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "a.cubin"))
    (check,) = doctor.check_cache()
    assert check.status == "note"
    assert check.text.endswith("cannot be written; make it writable or set XDG_CACHE_HOME")


def test_no_compiler_is_only_a_note(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (check,) = doctor.check_cxx()
    assert check.status == "note"


def test_operations_without_a_kernel_for_this_gpu(monkeypatch, tmp_path):
    import toy_operation

    from ds4 import engine
    from ds4.kernels import arch, registry

    monkeypatch.setattr(engine, "resolve_device", lambda device: device)
    monkeypatch.setattr(arch, "device_facts", lambda index: arch.DeviceFacts(0, "GPU", (9, 0), 1, 1, 1, 1, 1))
    operation = toy_operation.operation(tmp_path)
    monkeypatch.setattr(registry, "all_operations", lambda: [operation])
    (check,) = doctor.check_kernels()
    assert (check.status, check.text) == ("ok", "1 operations for sm_90a")
    monkeypatch.setattr(arch, "device_facts", lambda index: arch.DeviceFacts(0, "GPU", (12, 1), 1, 1, 1, 1, 1))
    object.__setattr__(operation.entries[0], "architectures", ("sm_90a",))
    (check,) = doctor.check_kernels()
    assert (check.status, check.text) == ("missing", "none for sm_121a of toy; use --device cpu")
