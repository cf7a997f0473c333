"""The Triton backend without a GPU: its kernels on CPU tensors by Triton's interpreter, through the tests that all
backends pass; and what is said where Triton is missing, too old or broken.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fastsam import backends

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
BACKEND = "fastsam.backends.triton"
FILES = ["interpreted", "test_kernels", "test_backends", "test_layouts", "test_nonfinite", "test_norm"]
KERNELS = "not (torch.float64 or torch.float16) or alignment and mixed or combine"
REST = "not (float64 or float16 or thousands or thread_count)"
CHOSEN = f"triton and (test_kernels and ({KERNELS}) or not test_kernels and {REST})"
"""What the interpreter runs: it takes some milliseconds a parameter. fp32 and bf16, whose vectors have 4 and 8
elements; fp64 and fp16 at every alignment, where vectors have 2 and again 8. The substring float16 is bfloat16 too."""


def python(*arguments, **environment):
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FASTSAM_BACKEND")}
    env = {**env, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def release(package):
    return tuple(int(part) for part in version(package).split(".")[:2])


@pytest.mark.skipif(
    release("triton") < (3, 7) and release("numpy") >= (2, 4),
    reason="Triton's interpreter up to 3.6 fails with numpy >= 2.4",
)
def test_interpreted():
    """In a process of its own: the kernels are the interpreter's, or the compiler's, from their import on."""
    quiet = ["-q", "-p", "no:cacheprovider", "--disable-warnings", "-p", "tests.kernels.interpreter"]
    files = [f"tests/kernels/{file}.py" for file in FILES]
    environment = {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = python("-m", "pytest", *quiet, *files, "-k", CHOSEN, **environment)
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout.splitlines()[-1], result.stdout


@pytest.fixture
def look_again(monkeypatch):
    """fastsam looks for Triton again, on a machine whose GPUs are hidden."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    backends._missing.cache_clear()
    yield
    backends._missing.cache_clear()


@pytest.fixture
def install(look_again, monkeypatch, tmp_path):
    """A function that puts another Triton in the place of the one that is installed."""

    def ours():
        return [name for name in sys.modules if name.startswith("triton.") or name in ("triton", BACKEND)]

    def another(source):
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text(source)
        language = "constexpr = int\nfloat64 = float32 = bfloat16 = float16 = None\n"
        (tmp_path / "triton" / "language.py").write_text(language)
        monkeypatch.syspath_prepend(tmp_path)

    for name in ours():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(backends, "triton", None, raising=False)  # as an import of the backend would
    yield another
    for name in ours():
        del sys.modules[name]


def check_missing(reason):
    assert reason in backends.missing("triton")
    assert "triton" not in backends.available_backends()
    assert backends.default(torch.device("cpu")) != "triton"
    assert backends.default(torch.device("cuda")) != "triton"
    for device in ("cpu", "cuda"):
        with pytest.raises(RuntimeError) as error:
            backends.load("triton", torch.device(device))
        assert reason in str(error.value)


INSTALLS = {
    "missing": ("raise ModuleNotFoundError('No module named triton')", "pip install"),
    "broken": ("import ctypes; ctypes.CDLL('no-such-library.so')", "no-such-library.so"),
    "old": (
        "__version__ = '2.1.0'\nfrom triton import language\njit = lambda f=None, **options: f if f else (lambda g: g)",
        "Triton 2.1.0 is older than 3.2",
    ),
}


@pytest.mark.parametrize("kind", INSTALLS)
def test_without_a_triton_that_works_there_is_a_reason(install, kind, monkeypatch):
    """Where there is a GPU: elsewhere that there is none comes first."""
    source, reason = INSTALLS[kind]
    install(source)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_missing(reason)


@pytest.mark.usefixtures("look_again")
def test_without_a_gpu_there_is_a_reason():
    check_missing("no CUDA device here" if torch.version.cuda else "a build without CUDA")


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
