"""tests/gpu/check.py without a GPU: limits, partial results and exit status, with jobs made here and on the CPU."""

import ast
import json
import re
import time
from pathlib import Path

import pytest
import torch

from tests.gpu import check, mutants, smoke
from tests.gpu.check import COMMANDS, SECONDS, Job, marked, python

ROOT = Path(__file__).parents[2]
GPU_TESTS = """
import pytest
pytestmark = pytest.mark.gpu
def test_right(): pass
@pytest.mark.parametrize("how", ["by chance - or not"])
def test_wrong(how): assert 1 == 2, "one is not two"
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


def run(out: Path, jobs: list[Job], seconds: float = 60, processes: int = 2) -> dict[str, check.Result]:
    results: list[check.Result] = []
    check.run(jobs, processes, time.monotonic() + seconds, out / "first.log", results.append)
    return {result.job: result for result in results}


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def listed(call: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert check.main([call, "--list"]) == 0
    return capsys.readouterr().out.splitlines()


def test_both_calls_fit_the_fifteen_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(["--help"])
    texts = capsys.readouterr().out, (ROOT / "docs" / "install.md").read_text()
    assert "fifteen minutes" in texts[0]
    for command in COMMANDS:
        assert len(command) <= 2000
        assert all(command in text for text in texts)
    starts, most_a_call = 2 * 120, 600
    assert sum(SECONDS.values()) + starts <= 15 * 60
    assert all(seconds + check.GRACE < most_a_call for seconds in SECONDS.values())
    alone, _ = check.first(Path("out"))
    assert sum(job.seconds for job in alone if job.name != "build") < SECONDS["first"]
    figures = sum(job.seconds for job in alone if job.name in ("bench", "kernels"))
    assert figures <= 150


def test_every_file_with_gpu_tests_is_run_once_a_backend(capsys: pytest.CaptureFixture[str]) -> None:
    lines = listed("first", capsys)
    for path in (ROOT / "tests").rglob("test_*.py"):
        of_path = [line.partition(":")[0] for line in lines if re.search(rf"\b{path.stem}\.py|tests/kernels ", line)]
        if path.parent.name == "gpu":
            stem = path.stem.removeprefix("test_")
            names = [f"{stem}-{backend}" for backend in ("triton", "cuda", "others")]
            assert [name for name in of_path if name.startswith(stem)] == names
        elif "pytest.mark.gpu" in path.read_text() and path.parent != Path(__file__).parent:
            assert of_path, path
    assert not [line for line in lines if "tests/package/" in line]  # it has none, and a job without a test fails


def test_one_backend_of_a_file(tmp_path: Path) -> None:
    job = marked("steps", "tests/gpu/test_steps.py", "--collect-only", backend="triton")
    assert run(tmp_path, [job])["steps"].state == "passed"
    found = [line for line in (tmp_path / "first.log").read_text().splitlines() if "test_steps.py::" in line]
    assert found
    assert all("[triton" in line for line in found)


def test_a_job_that_fails_or_hangs_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "GRACE", 0.3)
    jobs = [
        quick("wrong", "import sys; print('figure: 7'); sys.exit('why')"),
        quick("hangs", HANGS, seconds=1.5),
        quick("crashes", "import os; os.abort()"),
        quick("right", "print('figure: 3 us')"),
    ]
    found = run(tmp_path, jobs)
    assert {name: (result.state, result.reason) for name, result in found.items()} == {
        "wrong": ("failed", "status 1"),
        "hangs": ("failed", "stopped after 2 s"),
        "crashes": ("failed", "signal 6"),
        "right": ("passed", ""),
    }
    assert found["wrong"].figures[0] == "7"
    assert "why" in found["wrong"].figures
    assert found["right"].figures == ["3 us"]
    child = next(line for line in (tmp_path / "first.log").read_text().splitlines() if line.startswith("child "))
    assert not is_running(int(child.split()[1]))


def test_what_the_time_does_not_reach_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "GRACE", 0.3)
    jobs = [quick("slow", "import time; time.sleep(60)"), quick("never", "print(1)")]
    found = run(tmp_path, jobs, seconds=1.0, processes=1)
    assert (found["slow"].state, found["never"].state) == ("failed", "not run")


@pytest.mark.parametrize(("processes", "seconds", "state"), [(2, 60, "passed"), (1, 0.5, "failed")])
def test_jobs_run_together(tmp_path: Path, processes: int, seconds: float, state: str) -> None:
    """The first waits for the third, which one process at a time never reaches."""
    done = f"pathlib.Path({str(tmp_path / 'done')!r})"
    waits = f"import pathlib, time\nend = time.time() + {seconds}\nwhile time.time() < end and not {done}.exists(): "
    waits += f"time.sleep(0.05)\nassert {done}.exists()"
    jobs = [quick("first", waits, 90), quick("second", "1"), quick("third", f"import pathlib; {done}.touch()")]
    found = run(tmp_path, jobs, processes=processes)
    assert [found[job.name].state for job in jobs] == [state, "passed", "passed"]


def test_failures_of_pytest_are_named_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("fake", GPU_TESTS), ("empty", "")):
        (tmp_path / f"test_{name}.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\naddopts = -ra\n")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # plugins take seconds to load
    monkeypatch.setattr(check, "ROOT", tmp_path)
    jobs = [marked(name, f"test_{name}.py") for name in ("fake", "empty")]
    found = run(tmp_path, [*jobs, marked("may be", "test_empty.py", may_be_empty=True)])
    fake = found["fake"]
    assert (fake.state, fake.passed, len(fake.red)) == ("failed", 1, 1)
    assert "test_wrong" in fake.red[0]
    assert "one is not two" in fake.red[0]
    assert found["empty"].state == "failed"  # nothing says that it may be empty
    assert found["may be"].state == "no tests"
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps([vars(result) for result in found.values()]))
    again = next(job for job in check.second(summary)[1] if job.name == "again-fake")
    result = run(tmp_path, [again])["again-fake"]
    assert (result.passed, result.red) == (0, fake.red)


def test_a_log_that_is_too_long_keeps_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "LOG_BYTES", 1000)
    jobs = [quick("long", "print('x' * 9000); print('figure: end')"), quick("next", "print('after')")]
    assert run(tmp_path, jobs, processes=1)["long"].figures == ["end"]
    text = (tmp_path / "first.log").read_text()
    assert len(text) < 2000
    assert text.endswith("after\n")


def test_all_jobs_fit_the_end_of_an_output(capsys: pytest.CaptureFixture[str]) -> None:
    results = [check.Result(f"job{i}", "failed", red=["x" * 300] * 50) for i, _ in enumerate(listed("first", capsys))]
    text = "\n".join(map(str, results))
    assert len(text) <= 12_000
    assert all(f"job{i}: failed" in text for i in range(len(results)))


def test_what_is_there_on_the_path_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/carried")
    job = quick("path", "import os; print('figure:', os.environ['PYTHONPATH'], os.environ['FASTSAM_REQUIRE_GPU'])")
    assert run(tmp_path, [job])["path"].figures == [f"{ROOT}:/carried 1"]


@pytest.mark.parametrize(("call", "nothing"), [("first", "find_spec"), ("second", "which")])
def test_what_is_not_installed_is_said_before_anything_runs(
    call: str, nothing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, nothing, lambda name: None)
    assert check.main([call, "--out", str(tmp_path / "out")]) == 2
    assert "not installed: " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


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
    assert check.main(["first", "--out", str(tmp_path), "--processes", "2"]) == 1
    assert "no GPU: torch finds no CUDA device here" in capsys.readouterr().out
    assert [r["job"] for r in json.loads((tmp_path / "summary.json").read_text())] == ["machine"]
