"""tests/gpu/check.py without a GPU: limits, partial results and exit status, with jobs made here and on the CPU."""

import ast
import json
import re
import time
import zipfile
from pathlib import Path

import pytest
import torch

from tests.gpu import check, mutants, smoke
from tests.gpu.check import COMMANDS, PARTS, Job, pytest_job, python, run_parts

ROOT = Path(__file__).parents[2]
GPU_TESTS = """
import pytest
pytestmark = pytest.mark.gpu
def test_right(): pass
def test_wrong(): assert 1 == 2, "one is not two"
def test_skipped(): pytest.skip("not today")
"""
HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
time.sleep(60)
"""


def quick(name: str, code: str, seconds: float = 30.0) -> Job:
    return python(name, "-S", "-c", code, seconds=seconds)


def run(out: Path, *parts: tuple[str, list[Job], float]) -> dict[str, check.Result]:
    results: list[check.Result] = []
    lazy = [(part, lambda jobs=jobs: iter(jobs), seconds) for part, jobs, seconds in parts]
    run_parts(lazy, out, time.monotonic(), results)
    assert [r["job"] for r in json.loads((out / "summary.json").read_text())] == [r.job for r in results]
    return {result.job: result for result in results}


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_each_command_fits_the_borrowed_machine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.parse(["--help"])
    texts = capsys.readouterr().out, (ROOT / "docs" / "install.md").read_text()
    named = []
    for command in COMMANDS:
        assert len(command) <= 2000
        assert all(command in text for text in texts)
        options = check.parse(command.split()[2:])
        assert sum(PARTS[part] for part in options.parts) + check.GRACE <= 580
        named += options.parts
    assert set(named) == set(PARTS) == set(check.JOBS)


def test_every_file_with_gpu_tests_is_run_once_a_backend(capsys: pytest.CaptureFixture[str]) -> None:
    check.main(["--list", "--parts", "tests,graphs,frameworks"])
    lines = capsys.readouterr().out.splitlines()
    gpu_files = list((ROOT / "tests" / "gpu").glob("test_*.py"))
    for path in gpu_files:
        of_path = [line for line in lines if f"tests/gpu/{path.name}" in line]
        part = {"test_graphs": "graphs", "test_distributed": "frameworks"}.get(path.stem, "tests")
        names = [f"{part}/{path.stem}-{backend}" for backend in ("triton", "cuda", "foreach", "none")]
        if path.stem in ("test_graphs", "test_streams"):
            names += [f"{part}/expandable-{path.stem}-{backend}" for backend in ("triton", "cuda")]
        assert [line.partition(":")[0] for line in of_path] == names
    assert not [line for line in lines if "tests/package/" in line]  # it has none, and a job without a test fails
    for path in (ROOT / "tests").rglob("test_*.py"):
        if "pytest.mark.gpu" in path.read_text() and path not in gpu_files and path.parent != Path(__file__).parent:
            assert any(path.stem in line for line in lines), path


def test_one_backend_of_a_file(tmp_path: Path) -> None:
    job = pytest_job("tests/gpu/test_steps.py", "triton")
    job.command = [*job.command, "--collect-only"]
    assert check.run(job, "tests", tmp_path, 60).state == "passed"
    found = [line for line in (tmp_path / "tests.log").read_text().splitlines() if "test_steps.py::" in line]
    assert found
    assert all("[triton" in line for line in found)


def test_a_job_that_fails_or_hangs_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "GRACE", 0.3)
    jobs = [
        quick("wrong", "import sys; print('figure: 7'); sys.exit('why')"),
        quick("hangs", HANGS, seconds=1.5),
        quick("crashes", "import os; os.abort()"),
        Job("peer", left_out="not installed"),
        quick("right", "print('figure: 3 us')"),
    ]
    found = run(tmp_path, ("smoke", jobs, 60), ("graphs", [quick("late", "print(1)")], 60))
    states = {name: (result.state, result.reason) for name, result in found.items() if name != "all"}
    assert states == {
        "wrong": ("failed", "status 1"),
        "hangs": ("failed", "stopped after 2 s"),
        "crashes": ("failed", "signal 6"),
        "peer": ("left out", "not installed"),
        "right": ("passed", ""),
        "late": ("passed", ""),
    }
    assert found["wrong"].figures == ["7"]
    assert "why" in found["wrong"].failures
    assert found["right"].figures == ["3 us"]
    child = next(line for line in (tmp_path / "smoke.log").read_text().splitlines() if line.startswith("child "))
    assert not is_running(int(child.split()[1]))
    assert found["all"].state == "failed"  # of graphs, which ran no test


def test_what_the_parts_time_does_not_reach_is_said(tmp_path: Path) -> None:
    jobs = [quick("slow", "import time; time.sleep(60)"), quick("never", "print(1)")]
    found = run(tmp_path, ("smoke", jobs, 0.7), ("build", [quick("next", "print(1)")], 30))
    assert found["slow"].state == "failed"
    assert found["never"].state == "not run"
    assert check.failed([found["never"]])
    assert found["next"].state == "passed"


def test_failures_of_pytest_are_named(tmp_path: Path) -> None:
    (tmp_path / "test_fake.py").write_text(GPU_TESTS)
    (tmp_path / "test_empty.py").write_text("")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    no_plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they take seconds to load
    jobs = [pytest_job(str(tmp_path / f"test_{name}.py"), **no_plugins) for name in ("fake", "empty")]
    found = run(tmp_path, ("frameworks", jobs, 60))
    fake = found["test_fake"]
    assert (fake.state, fake.passed, fake.skipped, len(fake.failures)) == ("failed", 1, 1, 1)
    assert "test_wrong" in fake.failures[0]
    assert "one is not two" in fake.failures[0]
    assert found["test_empty"].state == "failed"  # nothing says that it may be empty
    with zipfile.ZipFile(tmp_path / "junit.zip") as archive:
        assert archive.namelist() == ["frameworks-test_fake.xml", "frameworks-test_empty.xml"]


def test_a_log_that_is_too_long_keeps_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "LOG_BYTES", 1000)
    jobs = [quick("long", "print('begin'); print('x' * 9000); print('figure: end')"), quick("next", "print('after')")]
    assert run(tmp_path, ("build", jobs, 30))["long"].figures == ["end"]
    text = (tmp_path / "build.log").read_text()
    assert len(text) < 3000
    assert "begin" in text
    assert text.endswith("after\n")


def test_the_summary_fits_the_end_of_an_output() -> None:
    results = [check.Result("tests", f"job{i}", "failed", failures=["x" * 300] * 50) for i in range(30)]
    text = check.summary(results)
    assert len(text) <= check.SUMMARY_CHARACTERS
    assert all(f"tests/job{i}: failed" in text for i in range(30))


def test_what_is_there_on_the_path_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/carried")
    job = quick("path", "import os; print('figure:', os.environ['PYTHONPATH'], os.environ['FASTSAM_REQUIRE_GPU'])")
    assert run(tmp_path, ("build", [job], 30))["path"].figures == [f"{ROOT}:/carried 1"]


def test_smoke_on_the_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(smoke.NUMEL, "cpu", 10_000)
    smoke.main("cpp", "cpu")
    assert "float64, float32, bfloat16, float16 to the bit" in capsys.readouterr().out


def test_every_mutant_changes_one_place_and_names_its_tests() -> None:
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS)
    for mutant in mutants.MUTANTS:
        source = (ROOT / mutant.path).read_text()
        assert source.count(mutant.old) == 1, mutant.name
        if mutant.path.endswith(".py"):
            ast.parse(source.replace(mutant.old, mutant.new))
        for judge in mutant.judges:
            names = [word for word in re.findall(r"\w+", judge.chosen) if word not in ("and", "or", "not", "cuda")]
            text = (ROOT / judge.path).read_text() + "triton emulated float64 float16"
            assert [name for name in names if name in text], mutant.name


def test_mutants_that_survive_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thing.py").write_text("VALUE = 1\nOTHER = 2\n")
    (tmp_path / "test_thing.py").write_text("import thing\ndef test_value(): assert thing.VALUE == 1\n")
    here, there = (mutants.Judge(kind, "test_thing.py", "value") for kind in ("emulated", "gpu"))
    changes = [
        mutants.Mutant("caught", "thing.py", "VALUE = 1", "VALUE = 3", (here,)),
        mutants.Mutant("missed", "thing.py", "OTHER = 2", "OTHER = 3", (here,)),
        mutants.Mutant("unseen", "thing.py", "VALUE = 1", "VALUE = 3", (there,)),
    ]
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "MUTANTS", changes)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    assert mutants.main([]) == 1
    assert [line.split("  ")[-1].partition(":")[0] for line in capsys.readouterr().out.splitlines()[:3]] == [
        "killed",
        "SURVIVED",
        "not judged",
    ]
    assert mutants.main(["caught", "unseen"]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="no GPU must be here for this")
def test_rehearsal_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The kernels part has to fail here, and to say why."""
    assert check.main(["--parts", "build", "--out", str(tmp_path)]) == 1
    assert "no GPU: torch finds no CUDA device here" in capsys.readouterr().out
    assert check.main(["--device", "cpu", "--parts", "kernels", "--out", str(tmp_path)]) == 1
    states = {r["job"]: r["state"] for r in json.loads((tmp_path / "summary.json").read_text())}
    assert states == {"machine": "passed", "kernels": "failed"}
    assert "no GPU: torch finds no CUDA device" in capsys.readouterr().out
