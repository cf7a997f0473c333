"""What needs a GPU, in the fifteen minutes for which one is borrowed: two calls, each a list of jobs by value."""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from shutil import which

ROOT = Path(__file__).parent.parent.parent
SECONDS = {"first": 480, "second": 180}
"""Of each call. With two starts of the machine, of one to two minutes each, they fit fifteen minutes."""
COMMANDS = (
    "python3 tests/gpu/check.py first --out gpu-check",
    "python3 tests/gpu/check.py second --out gpu-check-2 --again gpu-check/summary.json",
)
HELP = f"""\
Two calls, for a machine that is borrowed for fifteen minutes in all, its starts included. In 8 minutes build, smoke,
figures and tests; in 3 what was red then, and the sanitizer:

  {COMMANDS[0]}
  {COMMANDS[1]}

FASTSAM_COMMIT names the commit where the tree comes without git. A job that fails, hangs or breaks its CUDA context
stops no other. DIR holds at most 6 small files, complete up to the job that ended last: summary.json, <call>.log and
the figures. The exit status is 0 where every job passed; nothing is left out in silence.
"""
NEEDED = {"first": ("pytest", "rich", "setuptools", "triton"), "second": ("pytest", "setuptools", "triton")}
"""Packages without which some job could do nothing: asked for before any begins."""
BACKENDS = ("triton", "cuda", "others")
FILES = ("steps", "streams", "graphs", "corners", "distributed")
"""Of tests/gpu, by value."""
CASES = ("161x64", "resnet50", "size-1e8")
CONTESTANTS = ("fastsam-triton", "fastsam-cuda", "fastsam-foreach", "davda54", "composer", "foreach-item")
SANITIZED = "alignment and float32 and mixed and {}-cuda"
LOG_BYTES = 1 << 20
"""Of each job: the end of a longer log."""
GRACE = 5.0
"""Seconds that a job has to end after SIGINT, which lets pytest say what it found."""
NO_TESTS = 5  # pytest's exit status
MACHINE = "import sys, torch; torch.cuda.is_available() or sys.exit('no GPU: torch finds no CUDA device here'); "
MACHINE += "print('figure: torch', torch.__version__, torch.cuda.get_device_properties(0))"
BUILD = "import os, subprocess, sys, torch; "
BUILD += "os.environ['TORCH_CUDA_ARCH_LIST'] = '{}.{}'.format(*torch.cuda.get_device_capability()); "  # for it alone
BUILD += "sys.exit(subprocess.call([sys.executable, 'setup.py', '-q', 'build_ext', '--inplace']))"


@dataclass
class Job:
    """One process. A file may hold no test of a backend, or of a package that is not installed: `may_be_empty`."""

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    may_be_empty: bool = False


@dataclass
class Result:
    """How a job ended: "passed", "failed", "no tests" or "not run"."""

    job: str
    state: str
    reason: str = ""
    seconds: float = 0.0
    passed: int = 0
    red: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Short enough for all jobs to fit into the end of an output."""
        reason, counts = f" ({self.reason})" * bool(self.reason), f", {self.passed} tests passed" * bool(self.passed)
        more = [f"and {len(self.red) - 2} more"] * (len(self.red) > 2)
        lines = [f"    {line[:160]}" for line in (*self.figures, *self.red[:2], *more)]
        return "\n".join([f"{self.job}: {self.state}{reason} in {self.seconds:.0f} s{counts}", *lines])


def python(name: str, *arguments: str, seconds: float) -> Job:
    return Job(name, [sys.executable, *arguments], seconds)


def marked(name: str, *chosen: str, backend: str = "", may_be_empty: bool = False, **environment: str) -> Job:
    """Tests marked gpu, of one backend where `backend` says so: one may break the CUDA context of its process."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider", *chosen]
    if backend:
        environment["FASTSAM_TEST_BACKEND"] = backend
    return Job(name, command, 240, environment, may_be_empty or bool(backend))


def first(out: Path) -> tuple[list[Job], list[Job]]:
    """Jobs that run alone, and jobs that run together."""
    figures = str(out / "bench.json")
    steps = ["--device", "cuda", "--suite", "step", "--seconds", "2", "--cases", *CASES, "--contestants", *CONTESTANTS]
    alone = [
        python("build", "-c", BUILD, seconds=150),
        *(python(f"smoke-{b}", "tests/gpu/smoke.py", b, "cuda", seconds=60) for b in ("triton", "cuda", "foreach")),
        python("bench", "-m", "bench", *steps, "--output", figures, seconds=80),
        python("kernels", "-m", "bench.kernels", "--output", figures, seconds=70),
    ]
    files = [marked(f"{file}-{b}", f"tests/gpu/test_{file}.py", backend=b) for file in FILES for b in BACKENDS]
    kernels = [marked(f"kernels-{b}", "tests/kernels", "-k", f"{b}-cuda") for b in BACKENDS[:2]]
    grows = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # other addresses, and freed memory is unmapped
    streams = "tests/gpu/test_streams.py", "tests/gpu/test_graphs.py"
    again = [marked(f"expandable-{b}", *streams, backend=b, **grows) for b in BACKENDS[:2]]
    others = [marked(Path(path).stem, path, may_be_empty=True) for path in elsewhere()]
    return alone, [*files[:3], *kernels, *files[3:], *again, *others]


def elsewhere() -> list[str]:
    """Files outside of tests/gpu that hold tests marked gpu; in tests/package some only speak of the mark."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    others = [path for path in paths if path.parent.name not in ("gpu", "package", "kernels")]
    return [str(path.relative_to(ROOT)) for path in others if "pytest.mark.gpu" in path.read_text()]


def second(again: Path | None) -> tuple[list[Job], list[Job]]:
    """The red tests of the first call, then one case a backend under compute-sanitizer."""
    red = {} if again is None else {result["job"]: result["red"] for result in json.loads(again.read_text())}
    name = re.compile(r"\S+\[.*?\](?= - |$)|\S+")  # what is in brackets may hold spaces
    chosen = {job: [name.match(line)[0] for line in lines[:20]] for job, lines in red.items() if lines}
    jobs = [marked(f"again-{job}", *tests) for job, tests in chosen.items()]
    for tool in ("memcheck", "racecheck"):
        for backend in BACKENDS[:2]:
            case = "tests/kernels/test_kernels.py", "-k", SANITIZED.format(backend)
            job = marked(f"{tool}-{backend}", *case, PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # an allocation a tensor
            job.command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *job.command]
            jobs.append(job)
    return [python("build", "-c", BUILD, seconds=100)], jobs


class Running:
    """A job's process, whose output goes to a file of its own."""

    def __init__(self, job: Job, folder: str, seconds: float) -> None:
        self.job, self.seconds, self.start, self.reason = job, min(job.seconds, seconds), time.monotonic(), ""
        environment = {**os.environ, "CI": "true", "FASTSAM_REQUIRE_GPU": "1", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        environment |= job.environment
        self.output = Path(folder, job.name)
        with self.output.open("wb") as file:
            options = {"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            # A group, not a session of its own: where this process is killed, what it started should not live on.
            self.process = subprocess.Popen(job.command, **options, preexec_fn=os.setpgrp)

    def stop(self, number: int) -> None:
        """Sends a signal to all of the job's processes, where any is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def ended(self) -> bool:
        """Whether it has; ends it where its time is over."""
        over = time.monotonic() - self.start - self.seconds
        if self.process.poll() is None and over > 0:
            self.stop(signal.SIGKILL if over > GRACE else signal.SIGINT if not self.reason else 0)
            self.reason = f"stopped after {self.seconds:.0f} s"
        return self.process.poll() is not None

    def result(self, log: Path) -> Result:
        """Adds the job's output to the log, and reads it."""
        self.stop(signal.SIGKILL)  # ranks and other children that were left
        data, status = self.output.read_bytes()[-LOG_BYTES:], self.process.returncode
        with log.open("ab") as file:
            file.write(f"== {self.job.name}: {' '.join(' '.join(self.job.command).split())}\n".encode() + data)
        text = data.decode(errors="replace")
        result = Result(self.job.name, "passed", self.reason, time.monotonic() - self.start)
        result.passed = sum(map(int, re.findall(r"(\d+) passed", text)[-1:]))
        result.figures = re.findall(r"^(?:figure: |(?=done ))(.*)", text, re.MULTILINE)
        result.red = re.findall(r"^(?:FAILED|ERROR) (.+)$", text, re.MULTILINE)
        if status == NO_TESTS and self.job.may_be_empty and not self.reason:
            result.state = "no tests"
        elif self.reason or status:
            result.state = "failed"
            result.reason = self.reason or (f"signal {-status}" if status < 0 else f"status {status}")
            result.figures += [] if result.red else [line for line in text.splitlines() if line.strip()][-3:]
        return result


def run(jobs: Sequence[Job], processes: int, deadline: float, log: Path, keep: Callable[[Result], None]) -> None:
    """Runs `jobs` in their order, `processes` at a time; each result is kept as soon as it is there."""
    waiting, running = list(jobs), list[Running]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    job, left = waiting.pop(0), deadline - time.monotonic() - GRACE
                    if left > 0:
                        running.append(Running(job, folder, left))
                    else:
                        keep(Result(job.name, "not run", "the time is over"))
                for each in [each for each in running if each.ended()]:
                    running.remove(each)
                    keep(each.result(log))
                time.sleep(0.05)
        finally:
            for each in running:
                each.stop(signal.SIGKILL)


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=HELP, formatter_class=raw)
    parser.add_argument("call", choices=list(SECONDS))
    parser.add_argument("--out", type=Path, metavar="DIR", default=ROOT / "build" / "gpu-check", help="%(default)s")
    parser.add_argument("--again", type=Path, metavar="FILE", help="summary.json of the first call, for the second")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="tests at a time; default: %(default)s")
    parser.add_argument("--list", action="store_true", help="show the jobs, run none")
    options = parser.parse_args(arguments)
    out, deadline, results = options.out.resolve(), time.monotonic() + SECONDS[options.call], list[Result]()
    alone, together = first(out) if options.call == "first" else second(options.again)
    if options.list:
        print(*(f"{job.name}: {' '.join(' '.join(job.command).split())}" for job in (*alone, *together)), sep="\n")
        return 0
    absent = [name for name in NEEDED[options.call] if find_spec(name) is None]
    absent += ["compute-sanitizer"] * (options.call == "second" and which("compute-sanitizer") is None)
    if absent:
        print(f"not installed: {', '.join(absent)}. Nothing was begun")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{options.call}.log"
    log.unlink(missing_ok=True)

    def keep(result: Result) -> None:
        results.append(result)
        unfinished = out / "summary.tmp"
        unfinished.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
        unfinished.replace(out / "summary.json")
        print(result, flush=True)

    try:
        run([python("machine", "-c", MACHINE, seconds=60)], 1, deadline, log, keep)
        if results[0].state == "passed":
            run(alone, 1, deadline, log, keep)
            run(together, options.processes, deadline, log, keep)
    except KeyboardInterrupt:
        print("interrupted; summary.json holds what ended before")
        return 130
    bad = [result.job for result in results if result.state in ("failed", "not run")]
    print(f"{len(results)} jobs; not passed: {', '.join(bad) or 'none'}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
