"""What `make gpu-check` runs, on a machine with a CUDA GPU: the build, the tests marked gpu, compute-sanitizer where it
is installed, and the benchmarks. The exit status says whether all of them passed; results go to bench/results.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
SANITIZED = "alignment and (float32 or bfloat16) and mixed and {backend}-cuda"
BENCHMARKS = ["161x64", "densenet121", "resnet50", "mixer-b16", "size-1e8"]


def run(title, *command, **environment):
    print(f"== {title}: {' '.join(command)}", flush=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CI": "true", **environment}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    start = time.monotonic()
    status = subprocess.run(command, cwd=ROOT, env=env, check=False).returncode
    print(
        f"== {title}: {'passed' if status == 0 else f'FAILED ({status})'} in {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return status == 0


def python(title, *arguments, **environment):
    return run(title, sys.executable, *arguments, **environment)


def sanitize(backend, tool):
    """A small case under compute-sanitizer. Without torch's cache every tensor is an allocation of its own."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    tests = ["-m", "pytest", "-q", "tests/test_kernels.py", "-k", SANITIZED.format(backend=backend)]
    title = f"{tool} of {backend}"
    return run(title, *command, sys.executable, *tests, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def gpu_tests():
    """The files that hold such tests. The others import packages that a machine without a network may lack."""
    marked = [path for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    return ["tests/gpu", *sorted(str(path.relative_to(ROOT)) for path in marked)]


def main():
    if not torch.cuda.is_available():
        sys.exit("no GPU: torch finds no CUDA device here")
    print(f"== {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    passed = python("build", "setup.py", "-q", "build_ext", "--inplace")
    passed &= python("report", "-m", "fastsam")
    passed &= python("tests", "-m", "pytest", "-q", "-m", "gpu", *gpu_tests())
    if shutil.which("compute-sanitizer"):
        for backend in ("triton", "cuda"):
            for tool in ("memcheck", "racecheck"):
                passed &= sanitize(backend, tool)
    else:
        print("== compute-sanitizer is not installed: left out", flush=True)
    step = ["-m", "bench", "--device", "cuda", "--suite", "step", "--seconds", "2", "--cases", *BENCHMARKS]
    passed &= python("benchmarks", *step)
    passed &= python("kernels and targets", "-m", "bench.kernels")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
