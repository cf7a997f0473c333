"""Measures that no clock takes: allocations, memory, launches, and what the machine is."""

import gc
import os
import platform
import re
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastsam
from fastsam.__main__ import version_of

ROOT = Path(__file__).parent.parent
PEAKS = {"H100 80GB HBM3": 3.35e12, "H200": 4.8e12, "B200": 7.67e12}
"""Bytes a second, of the GPUs whose names hold these words."""
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler writes two lines at each use


def allocations(action: Callable[[], None]) -> list[int]:
    """Bytes of each allocation of `action` on the CPU, in order; negative where memory is freed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() != 0]


def extra_memory(action: Callable[[], None], device: torch.device) -> int:
    """Bytes that `action` needs at its peak beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    now = peak = 0
    for size in allocations(action):
        now += size
        peak = max(peak, now)
    return peak


def count_launches(action: Callable[[], None]) -> int:
    """Kernels, copies and fills that `action` starts on the GPU; 0 as well where the profiler may see none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
    events = profiler.profiler.kineto_results.events()
    return sum(event.device_type() == torch.autograd.DeviceType.CUDA for event in events)


def free_memory(device: torch.device) -> None:
    """Gives back what earlier measurements left: optimizers hold themselves in cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_name(device: torch.device) -> str:
    """As the vendor calls it, with the number of cores for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    name = found[1] if found else platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def driver(device: torch.device) -> str:
    """Version of the GPU's driver, or of the CPU's operating system."""
    if device.type == "cpu":
        return f"{platform.system()} {platform.release().split('-')[0]}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def commit() -> str:
    """The commit of this tree, "-dirty" where fastsam's or the benchmarks' sources differ from it.

    FASTSAM_COMMIT says it for a copy of the tree that came without git.
    """
    if "FASTSAM_COMMIT" in os.environ:
        return os.environ["FASTSAM_COMMIT"]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "fastsam", "csrc", "bench/*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peak_bandwidth(device: torch.device) -> float | None:
    """Bytes a second that the memory of a GPU moves by its data sheet; None where this does not know it."""
    name = device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def environment(device: torch.device) -> dict[str, str]:
    """What every row of results says of where and when it was measured."""
    packages = {"fastsam": fastsam.__version__, "torch": torch.__version__}
    packages |= {"pytorch_optimizer": version_of("pytorch_optimizer"), "Python": platform.python_version()}
    if device.type == "cuda":
        packages |= {"CUDA": str(torch.version.cuda), "triton": version_of("triton")}
    return {
        "device": device_name(device),
        "driver": driver(device),
        "versions": ", ".join(f"{name} {value}" for name, value in packages.items()),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
