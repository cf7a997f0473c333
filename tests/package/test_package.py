"""What is shipped: the wheels, native and pure, as a user gets them, and `python -m fastsam`."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsam
from fastsam import _distribution, backends
from fastsam.__main__ import main

ROOT = Path(__file__).parents[2]
FILES = [
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "SECURITY.md",
    ".pre-commit-config.yaml",
    "LICENSE",
    "mkdocs.yml",
]
FOLDERS = [".github", "bench", "csrc", "docs", "examples", "fastsam", "tests"]

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
NOT_EDITABLE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in finder.__module__]
"""
ONLY_UNPACKED = (
    NOT_EDITABLE
    + """
import fastsam
assert "unpacked" in fastsam.__file__, fastsam.__file__
"""
)


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


def test_workflows_and_pages_call_targets_that_the_makefile_has():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    files = [*(ROOT / ".github" / "workflows").glob("*.yml"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    lines = "\n".join(path.read_text() for path in files)
    named = {word for line in re.findall(r"(?m)(?:run: |`|^)make ([^`\n#]*)", lines) for word in line.split()}
    assert {"check", "docs", "test", "newest-check", "dist"} <= named
    named = {word for word in named if "=" not in word and re.fullmatch(r"[\w-]+", word)}
    assert named <= targets, named - targets


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


@functools.cache
def report(**environment: str) -> dict[str, str]:
    result = python("-m", "fastsam", cwd=ROOT, **environment)
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


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_without_a_gpu_the_report_says_so_and_advises_no_install(name):
    row = report(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")[name]
    no_build = r"torch \S+ is a build without CUDA: https://pytorch.org/\S+"
    no_device = r"no CUDA device here \(nvidia-smi .*\)"
    assert re.fullmatch(f"missing: {no_build if torch.version.cuda is None else no_device}", row)


def test_report_in_a_clone_says_that_it_hides_what_was_installed(pure_wheel, tmp_path):
    """Python looks in the folder that it runs in before it looks where pip installs."""
    installed = tmp_path / "installed"
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(installed)
    clone = copy_sources(tmp_path / "clone")
    report = NOT_EDITABLE + "import runpy\nrunpy.run_module('fastsam', run_name='__main__')"
    result = python("-c", report, cwd=clone, PYTHONPATH=str(installed))
    assert result.returncode == 0, result.stderr
    (row,) = re.findall(r"  cpp +(.*)", result.stdout)
    assert f"hides the installed package, {installed / 'fastsam'}." in row
    assert row.endswith(f"or install in place: pip install --no-build-isolation -e {clone}")


@pytest.fixture
def installed_from(monkeypatch, tmp_path):
    """Has fastsam believe that pip installed it from there: the content of direct_url.json."""

    def install(origin: dict[str, Any] | None) -> None:
        info = tmp_path / "fused_sam-0.1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fused-sam\nVersion: 0.1.0\n")
        if origin is not None:
            (info / "direct_url.json").write_text(json.dumps(origin))
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.setattr(_distribution, "CLONE", None)

    return install


ABSENT = ModuleNotFoundError("No module named 'fastsam._C'")
AGAIN = "pip install --no-build-isolation --no-deps --force-reinstall"


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        ({"url": "file:///home/me/my%20clone", "dir_info": {}}, "'/home/me/my clone'"),
        (
            {"url": "https://example.org/f.git", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}},
            "git+https://example.org/f.git@0a1b",
        ),
        ({"url": "file:///tmp/fused_sam-0.1.0.tar.gz", "archive_info": {}}, "/tmp/fused_sam-0.1.0.tar.gz"),
        ({"url": "file:///tmp/fused_sam-0.1.0-py3-none-any.whl", "archive_info": {}}, "<the source of fastsam>"),
        (None, "<the source of fastsam>"),
    ],
)
def test_what_is_missing_names_the_cause_and_the_whole_command(installed_from, origin, source):
    installed_from(origin)
    reason = _distribution.why_missing(ABSENT)
    assert re.match("the native library was not built: pip hides torch from the build", reason)
    assert f" {AGAIN} {source} (with -v " in reason


def test_a_compiler_that_does_not_run_is_told_by_its_name(installed_from, monkeypatch):
    installed_from(None)
    monkeypatch.setenv("CXX", "/nonexistent")
    assert "compiler: unset CXX (/nonexistent does not run), and then pip" in _distribution.why_missing(ABSENT)


def test_a_native_library_that_does_not_load_is_told_with_its_error(installed_from):
    installed_from(None)
    reason = _distribution.why_missing(ImportError("undefined symbol: aoti_torch_x"))
    assert reason.startswith(
        "the native library cannot be loaded (undefined symbol: aoti_torch_x). Build it again: pip"
    )


def test_an_old_torch_is_the_cause_before_all_else(installed_from, monkeypatch):
    installed_from(None)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.7.1+cu126"))
    reason = _distribution.why_missing(ABSENT)
    assert reason.startswith("torch 2.7.1+cu126 is older than 2.10, which the native library needs: pip install --up")


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("xcode-select", "xcode-select --install"),
        ("apt-get", r"apt install g\+\+"),
        ("dnf", r"dnf install gcc-c\+\+"),
        ("none", r"g\+\+ or clang\+\+"),
    ],
)
def test_without_a_compiler_the_package_of_the_system_is_named(installed_from, monkeypatch, program, command):
    installed_from(None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == program else None)
    reason = _distribution.why_missing(ABSENT)
    assert re.fullmatch(rf"the native library was not built, .* compiler: {command}, and then {AGAIN} .*", reason), (
        reason
    )


@pytest.mark.parametrize("name", ["reference", "no-such-backend"])
def test_report_tells_of_an_override(name, monkeypatch, capsys):
    monkeypatch.setenv("FASTSAM_BACKEND", name)
    main()
    assert f"FASTSAM_BACKEND={name} " in capsys.readouterr().out
