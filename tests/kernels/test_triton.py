"""The Triton backend without a GPU: its kernels on CPU tensors by Triton's interpreter, through the tests that all
backends pass; and what is said where Triton is missing, too old or broken.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SUITES = {
    "kernels": (["test_kernels.py"], "triton"),
    "rest": (
        ["test_backends.py", "test_layouts.py", "test_nonfinite.py", "test_norm.py"],
        "triton and not (float64 or float16 or bfloat16 or thousands or thread_count)",
    ),
}
"""What the interpreter runs, and which of it: it takes some milliseconds a parameter. The first has all dtypes."""


def python(*arguments, **environment):
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FASTSAM_BACKEND")}
    path = os.pathsep.join(filter(None, [environment.pop("first_on_path", ""), str(ROOT)]))
    env = {**env, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def release(package):
    return tuple(int(part) for part in version(package).split(".")[:2])


@pytest.fixture(scope="module")
def interpreted():
    """A process for each suite, both at once."""
    quiet = ["-q", "-p", "no:cacheprovider", "--disable-warnings"]
    with ThreadPoolExecutor(len(SUITES)) as pool:
        results = {}
        for name, (files, chosen) in SUITES.items():
            command = ["-m", "pytest", *quiet, *(f"tests/kernels/{file}" for file in files), "-k", chosen]
            results[name] = pool.submit(python, *command, TRITON_INTERPRET="1")
        yield results


@pytest.mark.skipif(
    release("triton") < (3, 7) and release("numpy") >= (2, 4),
    reason="Triton's interpreter up to 3.6 fails with numpy >= 2.4",
)
@pytest.mark.parametrize("suite", SUITES)
def test_interpreted(interpreted, suite):
    result = interpreted[suite].result()
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout.splitlines()[-1], result.stdout


STEP = """
import sys
import torch
import fastsam
from fastsam import backends

assert "triton" not in sys.modules
reason = backends.missing("triton")
assert reason is not None and {reason!r} in reason, reason
assert "triton" not in fastsam.available_backends()
assert backends.default(torch.device("cpu")) != "triton"
assert backends.default(torch.device("cuda")) != "triton"
try:
    backends.load("triton", torch.device("cuda"))
except RuntimeError as error:
    assert {reason!r} in str(error), error
else:
    raise AssertionError("loaded")
try:
    backends.load("triton", torch.device("cpu"))
except ValueError as error:
    assert "serves cuda tensors" in str(error), error
else:
    raise AssertionError("loaded")
"""

INSTALLS = {
    "missing": ("raise ModuleNotFoundError('No module named triton')", "pip install"),
    "broken": ("import ctypes; ctypes.CDLL('no-such-library.so')", "no-such-library.so"),
    "old": (
        "__version__ = '2.1.0'\nfrom triton import language\njit = lambda f=None, **options: f if f else (lambda g: g)",
        "Triton 2.1.0 is older than 3.2",
    ),
}


@pytest.mark.parametrize("install", INSTALLS)
def test_without_a_triton_that_works_there_is_a_reason(tmp_path, install):
    source, reason = INSTALLS[install]
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(source)
    language = "constexpr = int\nfloat64 = float32 = bfloat16 = float16 = None\n"
    (tmp_path / "triton" / "language.py").write_text(language)
    result = python("-c", STEP.format(reason=reason), first_on_path=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr


def test_without_a_gpu_there_is_a_reason():
    """On a machine with one, CUDA_VISIBLE_DEVICES hides it."""
    reason = "no CUDA device here" if torch.version.cuda else "a build without CUDA"
    result = python("-c", STEP.format(reason=reason), CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr


def test_nothing_initialises_cuda():
    """So processes may fork after the import. With a device that is not there: what would initialise it raises."""
    code = """
import torch
import torch._dynamo, torch._inductor
torch.version.cuda = "13.0"
torch.cuda.device_count = lambda: 1
def initialised(*args):
    raise AssertionError("CUDA is initialised")
torch._C._cuda_getDeviceCount = torch.cuda._lazy_init = initialised
import fastsam

assert "triton" in fastsam.available_backends()
fastsam.FusedSAM([torch.nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1)

torch.cuda.is_initialized = lambda: True
torch.cuda.get_device_name = lambda i: "Old"
torch.cuda.get_device_capability = lambda i: (7, 5)
assert "Old is older than capability 8.0" in fastsam.backends.missing("triton")
assert "triton" not in fastsam.available_backends()
"""
    result = python("-c", code, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr


def test_the_interpreter_serves_the_cpu_only_and_never_by_default():
    code = """
import torch
from fastsam import backends

cpu, cuda = torch.device("cpu"), torch.device("cuda")
assert backends.missing("triton") is None
assert backends.default(cpu) != "triton" and backends.default(cuda) != "triton"
assert backends.load("triton", cpu).__name__ == "fastsam.backends.triton"
try:
    backends.load("triton", cuda)
except ValueError as error:
    assert "serves cpu tensors" in str(error), error
else:
    raise AssertionError("loaded")
"""
    result = python("-c", code, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
