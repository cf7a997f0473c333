"""Everything that needs a GPU, in parts that fit a machine that is borrowed for half an hour."""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from json import dumps
from pathlib import Path
from shutil import which
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent.parent
PARTS = {
    "build": 150,
    "smoke": 60,
    "tests": 240,
    "graphs": 120,
    "sanitizer": 270,
    "frameworks": 150,
    "bench": 290,
    "kernels": 130,
}
"""Seconds for each part. What an earlier part leaves of its own, the later ones may use."""
COMMANDS = (
    "python3 tests/gpu/check.py --parts build,smoke,tests,graphs --out gpu-check-1",
    "python3 tests/gpu/check.py --parts build,sanitizer,frameworks --out gpu-check-2",
    "python3 tests/gpu/check.py --parts build,bench,kernels --out gpu-check-3",
)
HELP = f"""\
In three commands of less than 10 minutes each, on one machine or on three:

  {COMMANDS[0]}
  {COMMANDS[1]}
  {COMMANDS[2]}

Each begins with a build: a new machine needs it, and where nothing changed it takes seconds. FASTSAM_COMMIT names the
commit where the tree comes without git. Every job is a process with a time limit: one that fails, hangs or breaks its
CUDA context stops no other. DIR holds at most 8 small files, each complete up to the job that ran last: <part>.log,
junit.zip, summary.json, and the figures of bench and kernels. The exit status is 0 where every job passed or was left
out because something is not installed; nothing is passed in silence: a part in which no test passed fails.

Parts and their seconds: {", ".join(f"{name} {seconds}" for name, seconds in PARTS.items())}.
"""
BACKENDS = {"cuda": ("triton", "cuda", "foreach"), "cpu": ("cpp",)}
WORDS = {"graph": "graphs", "distributed": "frameworks"}
FRAMEWORKS = ("accelerate", "composer", "lightning", "transformers")
CASES = ("161x64", "densenet121", "resnet50", "mixer-b16", "size-1e8")
# All but torch.compile's, which takes a minute of compilation for each case.
CONTESTANTS = ("fastsam-*", "pytorch_optimizer", "davda54", "composer", "foreach", "foreach-kept", "foreach-item")
SANITIZED = (
    ("memcheck", "tests/gpu/test_steps.py", "test_dtypes_and_layouts and (float32 or bfloat16) and {}"),
    ("memcheck", "tests/kernels/test_kernels.py", "alignment and (float32 or bfloat16) and mixed and {}-cuda"),
    ("racecheck", "tests/kernels/test_kernels.py", "alignment and (float32 or bfloat16) and mixed and {}-cuda"),
)
JOB_SECONDS = 120
LOG_BYTES = 1 << 20
"""Of each job; the middle of a longer log is cut out."""
GRACE = 5.0
"""Seconds that a job has to end after SIGINT, which lets pytest write what it found."""
FAILURES_SHOWN = (6, 3, 1)
SUMMARY_CHARACTERS = 8000
NO_TESTS = 5  # pytest's exit status

DESCRIBE = """
import platform, sys, numpy, torch
from importlib.metadata import version, PackageNotFoundError
def v(name):
    try: return version(name)
    except PackageNotFoundError: return "none"
names = "torch triton numpy setuptools pytest transformers accelerate lightning pytorch_optimizer".split()
print("figure: Python", platform.python_version() + ",", ", ".join(f"{n} {v(n)}" for n in names))
if sys.argv[1] == "cuda":
    if not torch.cuda.is_available():
        sys.exit("no GPU: torch finds no CUDA device here")
    print("figure:", torch.cuda.get_device_name(), "capability", torch.cuda.get_device_capability())
"""
ASSERT_BACKENDS = """
import sys, torch
from fastsam import backends
if torch.cuda.is_available(): torch.cuda.init()  # only then capabilities and Triton's compiler are asked for
missing = {name: backends.missing(name) for name in sys.argv[1:]}
sys.exit("\\n".join(f"backend {name} is missing: {why}" for name, why in missing.items() if why) or 0)
"""


@dataclass
class Job:
    """One process, or the reason why there is none."""

    name: str
    command: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = JOB_SECONDS
    left_out: str | None = None
    junit: bool = False
    may_be_empty: bool = False


@dataclass
class Result:
    """How a job ended: "passed", "failed", "left out", "no tests" or "not run"."""

    part: str
    job: str
    state: str
    reason: str = ""
    seconds: float = 0.0
    passed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = f", {self.passed} tests passed, {self.skipped} skipped" if self.passed or self.skipped else ""
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.part}/{self.job}: {self.state}{reason} in {self.seconds:.0f} s{counts}"


def python(name: str, *arguments: str, seconds: float = JOB_SECONDS) -> Job:
    return Job(name, [sys.executable, *arguments], seconds=seconds)


def pytest_job(
    path: str,
    backend: str | None = None,
    prefix: Sequence[str] = (),
    title: str = "",
    chosen: str = "",
    **environment: str,
) -> Job:
    """`path` in a process of its own; of tests/gpu only what `backend` runs ("none": what names no backend)."""
    name = "-".join(filter(None, [title, Path(path).stem, backend]))
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider", path, *(["-k", chosen] if chosen else [])]
    if backend is not None:
        environment["FASTSAM_TEST_BACKEND"] = backend
    return Job(name, command, environment, junit=True, may_be_empty=backend is not None)


def marked(root: Path) -> list[str]:
    """The files outside of tests/gpu that hold tests marked gpu; in tests/package some only speak of the mark."""
    paths = sorted((root / "tests").rglob("test_*.py"))
    others = [path for path in paths if path.parent.name not in ("gpu", "package")]
    return [str(path.relative_to(root)) for path in others if "pytest.mark.gpu" in path.read_text()]


def framework(path: str) -> str | None:
    return next((name for name in FRAMEWORKS if name in Path(path).stem), None)


def build(device: str, out: Path) -> Iterator[Job]:
    yield python("library", "setup.py", "-q", "build_ext", "--inplace", seconds=PARTS["build"])
    yield python("report", "-m", "fastsam")
    yield python("backends", "-c", ASSERT_BACKENDS, *(["triton", "cuda", "cpp"] if device == "cuda" else ["cpp"]))


def smoke(device: str, out: Path) -> Iterator[Job]:
    for backend in BACKENDS[device]:
        yield python(backend, "tests/gpu/smoke.py", backend, device, seconds=40)


def part_of(path: Path) -> str:
    """Which part runs a file of tests/gpu."""
    return next((part for word, part in WORDS.items() if word in path.stem), "tests")


def gpu_files(part: str) -> Iterator[Job]:
    for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        if part_of(path) == part:
            for backend in (*BACKENDS["cuda"], "none"):
                yield pytest_job(str(path.relative_to(ROOT)), backend)


def expandable(path: str) -> Iterator[Job]:
    """`path` again with segments of memory that grow: other addresses, and freed memory that is unmapped."""
    for backend in ("triton", "cuda"):
        settings = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        yield pytest_job(path, backend, title="expandable", **settings)


def tests(device: str, out: Path) -> Iterator[Job]:
    for path in marked(ROOT):
        if framework(path) is None:
            for kernels in ("triton-cuda", "cuda-cuda") if "kernels" in path else ("",):
                yield pytest_job(path, title=kernels, chosen=kernels)
    yield from gpu_files("tests")
    yield from expandable("tests/gpu/test_streams.py")


def graphs(device: str, out: Path) -> Iterator[Job]:
    yield from gpu_files("graphs")
    yield from expandable("tests/gpu/test_graphs.py")


def sanitizer(device: str, out: Path) -> Iterator[Job]:
    """Small cases under compute-sanitizer. Without torch's cache every tensor is an allocation of its own."""
    if which("compute-sanitizer") is None:
        yield Job("all", left_out="compute-sanitizer is not installed")
        return
    for backend in ("cuda", "triton"):
        for tool, path, tests in SANITIZED:
            prefix = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
            prefix += ["--target-processes", "all"]
            chosen = tests.format(backend)
            yield pytest_job(path, None, prefix, f"{tool}-{backend}", chosen, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def frameworks(device: str, out: Path) -> Iterator[Job]:
    for path in marked(ROOT):
        name = framework(path)
        if name is not None and find_spec(name) is None:
            yield Job(Path(path).stem, left_out=f"{name} is not installed")
        elif name is not None:
            yield pytest_job(path)
    yield from gpu_files("frameworks")


def bench(device: str, out: Path) -> Iterator[Job]:
    if find_spec("rich") is None:
        yield Job("steps", left_out="rich is not installed")
        return
    cases = CASES if device == "cuda" else CASES[:1]
    arguments = ["--device", device, "--suite", "step", "--seconds", "2" if device == "cuda" else "0.1"]
    arguments += ["--cases", *cases, "--contestants", *CONTESTANTS, "--output", str(out / "bench.json")]
    yield python("steps", "-m", "bench", *arguments, seconds=PARTS["bench"])


def kernels(device: str, out: Path) -> Iterator[Job]:
    output = str(out / "bench.json")
    yield python("kernels", "-m", "bench.kernels", "--output", output, seconds=PARTS["kernels"])


JOBS: dict[str, Callable[[str, Path], Iterator[Job]]] = {
    function.__name__: function for function in (build, smoke, tests, graphs, sanitizer, frameworks, bench, kernels)
}


def stop(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to all of a job's processes, where any is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def run(job: Job, part: str, out: Path, seconds: float) -> Result:
    """Runs `job` for `seconds` at the most; its output goes to <part>.log while it runs."""
    if job.left_out is not None:
        return Result(part, job.name, "left out", job.left_out)
    if seconds <= 0:
        return Result(part, job.name, "not run", "the part's time is over")
    environment = {**os.environ, "CI": "true", "FASTSAM_REQUIRE_GPU": "1", "PYTHONUNBUFFERED": "1", **job.environment}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    junit = out / "unfinished.xml"
    command = [*job.command, f"--junitxml={junit}"] if job.junit else list(job.command)
    log = out / f"{part}.log"
    start, reason = time.monotonic(), ""
    with log.open("ab") as file:
        file.write(f"== {job.name}: {' '.join(' '.join(command).split())}\n".encode())
        file.flush()
        begin = file.tell()
        # A group, not a session of its own: where this process is killed, what it started should not live on.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            preexec_fn=os.setpgrp,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            reason = f"stopped after {seconds:.0f} s"
            stop(process, signal.SIGINT)
            try:
                status = process.wait(GRACE)
            except subprocess.TimeoutExpired:
                stop(process, signal.SIGKILL)
                status = process.wait()
        finally:
            stop(process, signal.SIGKILL)  # ranks and other children that were left, and all of them after Ctrl-C
    text = shorten(log, begin)
    state = "passed"
    if reason or status != 0:
        state = "no tests" if job.may_be_empty and status == NO_TESTS and not reason else "failed"
    result = Result(part, job.name, state, reason, time.monotonic() - start)
    if state == "failed" and not reason:
        result.reason = f"signal {-status}" if status < 0 else f"status {status}"
    result.figures = [line.removeprefix("figure: ") for line in text.splitlines() if re.match("figure: |done ", line)]
    if job.junit:
        read_junit(junit, result)
        if state == "passed" and not result.passed and not job.may_be_empty:
            result.state = state = "failed"
            result.reason = "no test passed"
    if state == "failed" and not result.failures:
        result.failures = [line for line in text.splitlines() if line.strip()][-3:]
    return result


def shorten(log: Path, begin: int) -> str:
    """What a job wrote from `begin` on; the middle of what is too long is cut out of the file."""
    data = log.read_bytes()[begin:]
    if len(data) > LOG_BYTES:
        half = LOG_BYTES // 2
        data = data[:half] + f"\n[{len(data) - LOG_BYTES} bytes cut out here]\n".encode() + data[-half:]
        with log.open("r+b") as file:
            file.seek(begin)
            file.write(data)
            file.truncate()
    return data.decode(errors="replace")


def read_junit(junit: Path, result: Result) -> None:
    """Counts and failures from pytest's file, which then goes into junit.zip."""
    if not junit.exists():
        return
    with zipfile.ZipFile(junit.with_name("junit.zip"), "a", zipfile.ZIP_DEFLATED) as archive:
        archive.write(junit, f"{result.part}-{result.job}.xml")
    try:
        cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    except ElementTree.ParseError:
        cases = []
    junit.unlink()
    for case in cases:
        wrong = [child for child in case if child.tag in ("failure", "error")]
        if wrong:
            message = (wrong[0].get("message") or "").splitlines() or [""]
            result.failures.append(f"{case.get('name')}: {message[0]}")
        elif case.find("skipped") is not None:
            result.skipped += 1
        else:
            result.passed += 1


def judge(part: str, results: Sequence[Result]) -> Result | None:
    """Files may lack tests of a backend, but a part in which no test passed proves nothing: that is a failure."""
    of_part = [r for r in results if r.part == part]
    silent = [r for r in of_part if r.state in ("passed", "no tests") and not r.passed]
    if part in ("tests", "graphs") and of_part and len(silent) == len(of_part):
        return Result(part, "all", "failed", "no test passed")
    return None


def summary(results: Sequence[Result]) -> str:
    """A line for each job, figures, and as many failures of each as leave it short enough for the end of an output."""
    texts = (summary_with(results, shown) for shown in FAILURES_SHOWN)
    return next((text for text in texts if len(text) <= SUMMARY_CHARACTERS), summary_with(results, 0))


def summary_with(results: Sequence[Result], shown: int) -> str:
    lines = ["== summary"]
    for result in results:
        lines.append(str(result))
        lines += [f"    {line[:200]}" for line in result.figures]
        lines += [f"    {line[:200]}" for line in result.failures[:shown]]
        if len(result.failures) > shown:
            lines.append(f"    and {len(result.failures) - shown} more")
    return "\n".join(lines)


def run_parts(
    parts: Sequence[tuple[str, Callable[[], Iterator[Job]], float]], out: Path, start: float, results: list[Result]
) -> None:
    """Adds the results of `parts`, whose seconds count from `start`; summary.json is complete after every job."""

    def keep(result: Result) -> None:
        results.append(result)
        unfinished = out / "summary.tmp"
        unfinished.write_text(dumps([asdict(r) for r in results], indent=1) + "\n")
        unfinished.replace(out / "summary.json")
        print(result, flush=True)

    deadline = start
    for part, jobs, seconds in parts:
        deadline += seconds
        try:
            for job in jobs():
                keep(run(job, part, out, min(job.seconds, deadline - time.monotonic())))
        except Exception as error:  # of a part's own preparation
            keep(Result(part, "jobs", "failed", f"{type(error).__name__}: {error}"))
        verdict = judge(part, results)
        if verdict is not None:
            keep(verdict)
        print(f"== {part}: {verdict_of([r for r in results if r.part == part])}", flush=True)


def verdict_of(results: Sequence[Result]) -> str:
    if failed(results):
        return "FAILED"
    return "passed" if any(result.state == "passed" for result in results) else "left out"


def failed(results: Sequence[Result]) -> bool:
    return any(result.state in ("failed", "not run") for result in results)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="separated by commas; default: all")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=ROOT / "build" / "gpu-check", help="default: %(default)s"
    )
    parser.add_argument("--list", action="store_true", help="show the jobs, run none")
    parser.add_argument(
        "--device", choices=list(BACKENDS), default="cuda", help="cpu: a rehearsal; what needs a GPU fails in it"
    )
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts: there is no {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    options.out = options.out.resolve()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        for part in options.parts:
            for job in JOBS[part](options.device, options.out):
                print(f"{part}/{job.name}: {job.left_out or ' '.join(' '.join(job.command).split())}")
        return 0
    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ["summary.json", "junit.zip", *(f"{part}.log" for part in ("device", *options.parts))]:
        (options.out / name).unlink(missing_ok=True)
    device = run(python("machine", "-c", DESCRIBE, options.device), "device", options.out, JOB_SECONDS)
    print(summary([device]), flush=True)
    if device.state != "passed":
        return 1
    (options.out / "device.log").unlink()  # its lines are in the summary
    parts = [(part, lambda part=part: JOBS[part](options.device, options.out), PARTS[part]) for part in options.parts]
    results = [device]
    try:
        run_parts(parts, options.out, start, results)
    except KeyboardInterrupt:
        print("interrupted; summary.json holds what ended before")
        return 130
    print(summary(results), flush=True)
    return int(failed(results))


if __name__ == "__main__":
    sys.exit(main())
