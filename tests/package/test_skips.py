"""The rule of conftest.py: under CI=true a skip or xfail must have an allowed reason."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def run_pytest(folder: Path, ci: str, require_gpu: str = "") -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "tests"]
    root = str(Path(__file__).parents[2])  # conftest.py imports fastsam, which need not be installed
    env = {**os.environ, "CI": ci, "FASTSAM_REQUIRE_GPU": require_gpu, "PYTHONPATH": root}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False).stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text((Path(__file__).parents[1] / "conftest.py").read_text())
    (tmp_path / "Makefile").write_text("composer-check:\n\ttrue\n")
    return tmp_path


def test_unexplained_skips_fail_in_ci_only(project):
    (project / "tests" / "test_cases.py").write_text(CASES)
    assert "1 passed, 5 skipped, 1 xfailed" in run_pytest(project, ci="")
    output = run_pytest(project, ci="true")
    assert "3 failed, 1 passed, 2 skipped, 1 error" in output
    assert "CI allows no skip or xfail for this reason: known bug" in output.replace("xfail: ", "")


def test_module_that_is_skipped_whole_fails_in_ci(project):
    (project / "tests" / "test_cases.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    assert "1 skipped" in run_pytest(project, ci="")
    assert "1 error" in run_pytest(project, ci="true")


@pytest.mark.skipif(torch.cuda.is_available(), reason="no GPU must be here for this")
def test_a_required_gpu_that_is_not_there_is_a_failure(project):
    gpu = "import pytest\n\n@pytest.mark.gpu\ndef test_gpu(): pass\n\ndef test_runs(): pass\n"
    (project / "tests" / "test_cases.py").write_text(gpu)
    (project / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    output = run_pytest(project, ci="", require_gpu="1")
    assert "1 passed, 1 error" in output
    assert "for this reason: no GPU" in output
