"""The rule of conftest.py: under CI=true a skip or xfail must have an allowed reason."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest_plugins = ["pytester"]
Run = Callable[..., str]

CASES = """
import pytest

def test_runs(): pass

@pytest.mark.skip("no GPU with capability 9.0")
def test_allowed_mark(): pass

def test_allowed_framework(): pytest.skip("composer is not installed: make composer-check")

@pytest.mark.skip("later")
def test_refused_mark(): pass

def test_refused_call(): pytest.skip("later")

def test_refused_unknown_target(): pytest.skip("make everything-check")

@pytest.mark.xfail(reason="known bug")
def test_refused_xfail(): assert False
"""


@pytest.fixture
def run_pytest(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that runs the file it is given beside conftest.py, in this process, and gives what pytest says."""
    pytester.mkdir("tests")
    Path("tests", "conftest.py").write_text((Path(__file__).parents[1] / "conftest.py").read_text())
    Path("Makefile").write_text("composer-check:\n\ttrue\n")

    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take seconds to load

    def run(cases: str, ci: str, require_gpu: str = "") -> str:
        monkeypatch.setenv("CI", ci)
        monkeypatch.setenv("FASTSAM_REQUIRE_GPU", require_gpu)
        Path("tests", "test_cases.py").write_text(cases)
        options = ["-q", "-rA", "-p", "no:cacheprovider"]
        return pytester.runpytest_inprocess(*options, "tests").stdout.str()

    return run


def test_unexplained_skips_fail_in_ci_only(run_pytest: Run) -> None:
    assert "1 passed, 5 skipped, 1 xfailed" in run_pytest(CASES, ci="")
    output = run_pytest(CASES, ci="true")
    assert "3 failed, 1 passed, 2 skipped, 1 error" in output
    assert "CI allows no skip or xfail for this reason: known bug" in output.replace("xfail: ", "")


def test_module_that_is_skipped_whole_fails_in_ci(run_pytest: Run) -> None:
    whole = "import pytest\npytest.importorskip('no_such_module')\n"
    assert "1 skipped" in run_pytest(whole, ci="")
    assert "1 error" in run_pytest(whole, ci="true")


@pytest.mark.skipif(torch.cuda.is_available(), reason="no GPU must be here for this")
def test_a_required_gpu_that_is_not_there_is_a_failure(run_pytest: Run) -> None:
    gpu = "import pytest\n\n@pytest.mark.gpu\ndef test_gpu(): pass\n\ndef test_runs(): pass\n"
    Path("pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    output = run_pytest(gpu, ci="", require_gpu="1")
    assert "1 passed, 1 error" in output
    assert "for this reason: no GPU" in output
