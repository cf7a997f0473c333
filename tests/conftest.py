"""Under CI=true, a test that did not run for a reason nobody allowed is a failure, not a skip.

FASTSAM_REQUIRE_GPU=1 is as strict, and no longer allows that there is no GPU: what is marked gpu then has to run.
"""

import gc
import os
import re
import signal
import warnings
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from fastsam import backends, notices

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models and texts are made here or come with a package

REQUIRE_GPU = os.environ.get("FASTSAM_REQUIRE_GPU") == "1"
STRICT = os.environ.get("CI") == "true" or REQUIRE_GPU
MAKEFILE = Path(__file__).parent.parent / "Makefile"


def is_allowed(reason: str) -> bool:
    """Whether `reason` is one of these: no GPU; Triton's interpreter beside a numpy that breaks it; a target of the
    Makefile that is for it, as "make composer-check".
    """
    if reason == "Triton's interpreter up to 3.6 fails with numpy >= 2.4":
        return True
    if reason.startswith("no GPU"):  # with one at hand, only more of them, or more memory, can be wanting
        return not REQUIRE_GPU or torch.cuda.is_available()
    targets = re.findall(r"^([\w-]+-check):", MAKEFILE.read_text(), flags=re.MULTILINE)
    return any(f"make {target}" in reason for target in targets)


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xfail: " + report.wasxfail.removeprefix("reason: ")
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)


def fail_unexplained_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not is_allowed(reason := skip_reason(report)):
        report.outcome = "failed"
        report.longrepr = f"CI allows no skip or xfail for this reason: {reason}"
        vars(report).pop("wasxfail", None)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if STRICT:
        fail_unexplained_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if STRICT:
        fail_unexplained_skip(report)
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("no GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first: while one process is busy with the last of them, there is something left for the others."""
    slow = ["test_triton.py", "package", "frameworks", "distributed"]
    items.sort(key=lambda item: min((i for i, name in enumerate(slow) if name in item.path.parts), default=len(slow)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` stands for every backend that serves CPU tensors, Triton's by its interpreter where that is on.

    A module, or a test by its own parametrize, may choose: a module of the first kind names its `BACKENDS`.
    """
    marks = metafunc.definition.iter_markers("parametrize")
    if "backend" in metafunc.fixturenames and not any("backend" in mark.args[0] for mark in marks):
        interpreted = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []
        names = getattr(metafunc.module, "BACKENDS", ["reference", "foreach", "cpp", *interpreted])
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> None:
    """A module's tests that collect garbage look through their own objects, not through those of every import."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None, None, None]:
    """In steps as small as the tests', threads would only wait for each other; test_norm.py takes more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def hears_nothing(monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, None]:
    """For loops that are right, as users write them: what fastsam tells is an error, unless a test asks for it."""
    monkeypatch.setattr(notices, "told", {"native"})  # not whether this machine has the library
    monkeypatch.setattr(notices, "_BETWEEN", frozenset())  # a warning then names fastsam's own line
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"fastsam\.")
        yield


@pytest.fixture
def sigint() -> Generator[None, None, None]:
    """SIGINT raises KeyboardInterrupt, also where a shell started this process in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    reason = backends.missing(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param} is missing: {reason}")
    return request.param
