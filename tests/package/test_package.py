"""What is shipped: the wheels, native and pure, as a user gets them, and `python -m fastsam`."""

import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastsam
from fastsam import backends

ROOT = Path(__file__).parents[2]
FILES = [
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "mkdocs.yml",
]
FOLDERS = ["bench", "csrc", "docs", "examples", "fastsam", "tests"]

STEP = """
import torch
from fastsam import FusedSAM

w = torch.nn.Parameter(torch.ones(5))
sam = FusedSAM([w], torch.optim.SGD, lr=0.5{options})
w.grad = torch.full_like(w, 2.0)
sam.first_step(zero_grad=True)
w.grad = torch.ones_like(w)
sam.second_step()
assert torch.equal(w, torch.full_like(w, 0.5)), w
"""

# An editable install leaves a finder that would lend its own fastsam._C to the unpacked wheel.
ONLY_UNPACKED = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in finder.__module__]
import fastsam
assert "unpacked" in fastsam.__file__, fastsam.__file__
"""


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs this Python with `environment` added; the ninja beside it is found as in an activated environment.

    Where it builds CUDA code, it builds for one GPU only.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {key: value for key, value in os.environ.items() if not key.startswith("FASTSAM_")}
    env = {**env, "PATH": path, "TORCH_CUDA_ARCH_LIST": "9.0", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def copy_sources(target: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, target / name)
    return target


def build_wheel(source: Path, into: Path, **environment: str) -> Path:
    command = [
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-index",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(into),
        str(source),
    ]
    result = python(*command, cwd=into, **environment)
    if result.returncode != 0:
        raise RuntimeError(result.stdout + result.stderr)
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = copy_sources(tmp_path_factory.mktemp("sources"))
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    result = python("-c", build, cwd=sources, FASTSAM_BUILD_NATIVE="0")
    assert result.returncode == 0, result.stderr
    (archive,) = (sources / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def pure_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(sdist, tmp_path_factory.mktemp("pure"), CXX="/nonexistent")


@pytest.fixture(scope="module")
def native_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(sdist, tmp_path_factory.mktemp("native"))


@pytest.fixture
def run_with(tmp_path: Path) -> Callable[[Path, str], subprocess.CompletedProcess[str]]:
    def run(wheel: Path, code: str) -> subprocess.CompletedProcess[str]:
        unpacked = tmp_path / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        return python("-c", ONLY_UNPACKED + code, cwd=tmp_path, PYTHONPATH=str(unpacked))

    return run


def names_in(wheel: Path) -> set[str]:
    info = f"fused_sam-{fastsam.__version__}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.startswith(info)}


def test_sdist_holds_all_that_its_tests_and_readme_need(sdist):
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*") if path.is_file()]
    wanted = {path.relative_to(ROOT).as_posix() for path in files if path.suffix not in (".so", ".pyc")} | set(FILES)
    assert wanted <= inside, wanted - inside
    assert not [name for name in inside if name.endswith((".so", ".pyc"))]


def test_pure_wheel_holds_every_module_and_no_library(pure_wheel):
    assert pure_wheel.name == f"fused_sam-{fastsam.__version__}-py3-none-any.whl"
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastsam").rglob("*.py")}
    assert names_in(pure_wheel) == modules | {"fastsam/py.typed"}


def test_pure_wheel_steps_and_warns_once_at_the_first_construction(pure_wheel, run_with):
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        exec({step!r})
texts = [str(warning.message) for warning in caught if "--no-build-isolation" in str(warning.message)]
assert len(texts) == 1, texts
assert "cpp" not in fastsam.available_backends()
"""
    result = run_with(pure_wheel, code.format(step=STEP.format(options="")))
    assert result.returncode == 0, result.stderr


def test_native_wheel_is_abi3_and_the_pure_one_with_a_library(native_wheel, pure_wheel):
    pattern = rf"fused_sam-{re.escape(fastsam.__version__)}-cp310-abi3-\w+\.whl"
    assert re.fullmatch(pattern, native_wheel.name), native_wheel.name
    libraries = names_in(native_wheel) - names_in(pure_wheel)
    assert "fastsam/_C.abi3.so" in libraries
    assert libraries <= {"fastsam/_C.abi3.so", "fastsam/_C_cuda.abi3.so"}  # the latter with nvcc and a CUDA torch


def test_native_library_needs_no_version_of_python(native_wheel):
    with zipfile.ZipFile(native_wheel) as archive:
        library = archive.read("fastsam/_C.abi3.so")
    assert b"PyInit__C" in library
    assert b"libtorch_python" not in library
    assert b"libpython" not in library


def test_native_wheel_steps_without_a_warning(native_wheel, run_with):
    code = "import warnings\nwarnings.simplefilter('error')\n" + STEP.format(options=", backend='cpp'")
    result = run_with(native_wheel, code)
    assert result.returncode == 0, result.stderr


def test_compile_error_fails_the_build(tmp_path):
    sources = copy_sources(tmp_path)
    for source in (sources / "csrc").rglob("*.cpp"):  # all: the others, which are right, would be compiled beside it
        source.write_text("#error broken on purpose\n")
    with pytest.raises(RuntimeError, match="broken on purpose"):
        build_wheel(sources, sources)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FASTSAM_BUILD_NATIVE": "0"}, "FASTSAM_BUILD_NATIVE=0"),
        ({"CXX": "/nonexistent"}, r"no C\+\+20 compiler was found \(CXX=/nonexistent\)"),
    ],
)
def test_pure_build_says_why_in_one_line(environment, reason):
    result = python("setup.py", "--version", cwd=ROOT, **environment)
    assert result.returncode == 0
    assert result.stdout.strip() == fastsam.__version__
    assert re.search(rf"^fastsam: pure Python build, .*: {reason}$", result.stderr, flags=re.MULTILINE), result.stderr


def test_import_tells_of_another_distribution_in_its_folder(pure_wheel, tmp_path):
    """What PyPI calls fastsam is another project: installed last, or first, it shares the folder with this one."""
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    info = tmp_path / "unpacked" / "fastsam-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastsam\nVersion: 0.0.1\n")
    for record, warned in (("fastsam/__init__.py,,\n", True), ("elsewhere/__init__.py,,\n", False)):
        (info / "RECORD").write_text(record)
        result = python("-c", ONLY_UNPACKED, cwd=tmp_path, PYTHONPATH=str(tmp_path / "unpacked"))
        assert result.returncode == 0, result.stderr
        assert ("fastsam 0.0.1 is installed into the folder of fused-sam" in result.stderr) is warned, result.stderr


def test_import_brings_in_no_optional_dependency():
    code = """
import sys
import torch
before = set(sys.modules)
import fastsam
optional = {"triton", "composer", "lightning", "accelerate", "transformers", "matplotlib", "sklearn", "rich"}
assert not optional & (set(sys.modules) - before)
"""
    result = python("-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@functools.cache
def report() -> dict[str, str]:
    result = python("-m", "fastsam", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    rows = [line.strip() for line in result.stdout.splitlines() if line.startswith("  ")]
    return dict(re.split(r"\s{2,}", row, maxsplit=1) for row in rows)


def test_report_names_versions_and_devices():
    rows = report()
    assert rows["fastsam"] == fastsam.__version__
    assert torch.__version__ in rows["torch"]
    assert re.search(r"\d+ threads", rows["cpu"])


def test_report_gives_every_backend_its_state():
    rows = report()
    available = fastsam.available_backends()
    for name in backends.BACKENDS:
        assert rows[name].startswith("available" if name in available else "missing: "), rows[name]
    assert "default on cpu" in rows[backends.default(torch.device("cpu"))]


@pytest.mark.skipif(torch.version.cuda is not None, reason="no GPU build of torch is what this is about")
def test_report_advises_no_reinstall_where_it_cannot_help():
    assert re.fullmatch(r"missing: torch \S+ is not built for CUDA: install one that is, .*", report()["cuda"])


@pytest.mark.parametrize("name", ["reference", "no-such-backend"])
def test_report_tells_of_an_override(name):
    result = python("-m", "fastsam", cwd=ROOT, FASTSAM_BACKEND=name)
    assert result.returncode == 0
    assert f"FASTSAM_BACKEND={name} " in result.stdout
