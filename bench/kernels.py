"""`python -m bench.kernels`: on a GPU, each kernel's own time beside what its bytes should take; and design targets.

Then the same in other shapes, which are candidates for the kernels' own: one moves in where it gains 3 % at 1e8
parameters and loses nothing on ResNet-50. Run it after `python -m bench --device cuda`, whose rows it compares with
the targets, and with the same --output. Beside those results, bench/results/<device>.json where nothing else is said,
it writes <device>-kernels.json and .md.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest import mock

import torch

from bench import results
from bench.cases import all_cases
from bench.contestants import CONTESTANTS, Copy, yardsticks
from bench.inputs import Inputs, Setting, Turn, check
from bench.measures import available_memory, device_name, environment, free_memory, peak_bandwidth
from bench.results import Row
from bench.timing import L2_FLUSH_BYTES, quartiles

BACKENDS = ("fastsam-triton", "fastsam-cuda")
CASES = ("161x64", "resnet50", "size-1e8")
JUDGES = CASES[1:]
"""Of candidates."""
DTYPES = (torch.float32, torch.bfloat16)
PASSES = {"norm": 1, "perturb": 4, "restore": 2}
"""Reads and writes of a whole list of parameters: norm reads g; perturb reads w and g, writes w and the backup."""
ROUNDS = 20


@dataclass(frozen=True)
class Shape:
    """Constants of a backend's module, by name, in the place of its own."""

    backend: str
    constants: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.constants) or "as it is"

    def applied(self) -> AbstractContextManager[object]:
        """Where a bucket is laid out, and its kernels are launched, in this shape."""
        module = sys.modules[f"fastsam.backends.{self.backend.removeprefix('fastsam-')}"]
        values = {name: (lambda numel, v=v: v) if name == "chunk_size" else v for name, v in self.constants}
        return mock.patch.multiple(module, **values) if values else nullcontext()


CANDIDATES = (
    *(Shape("fastsam-triton", (("chunk_size", c), ("WARPS", w))) for w, c in product((4, 8), (4096, 8192, 16384))),
    *(Shape("fastsam-cuda", (("chunk_size", c),)) for c in (4096, 8192, 16384)),
)


@dataclass(frozen=True)
class Target:
    """A bound on a figure of a row of the step suite: fp32, plain."""

    case: str
    what: str
    figure: Callable[[Row], float | None]
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        return f">= {self.at_least}" if self.at_least is not None else f"<= {self.at_most}"


def best_foreach(row: Row) -> float:
    return min(ratio for name, ratio in row["speedup_over"].items() if "foreach" in name)


TARGETS = (
    Target("size-1e8", "share of the floor, 1e8 parameters", lambda row: row["share_of_floor"], at_least=0.9),
    Target("size-1e8", "share of the device's peak", lambda row: row.get("share_of_peak"), at_least=0.85),
    Target("161x64", "davda54's wall time over ours", lambda row: row["wall_speedup_over"]["davda54"], at_least=20),
    Target("resnet50", "davda54's wall time over ours", lambda row: row["wall_speedup_over"]["davda54"], at_least=10),
    Target("resnet50", "the best foreach's device time over ours", best_foreach, at_least=1.15),
    # Three kernels; each turn brings gradients at other addresses, whose upload is a copy besides.
    Target("resnet50", "launches, with one upload of addresses", lambda row: row.get("launches"), at_most=4),
)


def bandwidth(numel: int, dtype: torch.dtype) -> tuple[str, float]:
    """The fastest yardstick of `numel` elements with a cold cache, and the bytes a second that it reads and writes."""
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def measure(yardstick: Copy) -> float:
        seconds = []
        for _ in range(ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            yardstick.run()
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) * 1e-3)
        return 2 * numel * dtype.itemsize / quartiles(seconds)[1]

    device = torch.device("cuda")
    found = {name: measure(kind(numel, dtype, device)) for name, kind in yardsticks(device).items()}
    return max(found.items(), key=lambda item: item[1])


def kernel_seconds(turn: Turn) -> dict[str, list[float]]:
    """Of each launch of a step the seconds that it took, by the name that the profiler gives it."""
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    found: dict[str, list[float]] = {}
    for i in range(3 + ROUNDS):
        turn.prepare()
        flush.zero_()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            turn.run()
            torch.cuda.synchronize()
        for event in profiler.profiler.kineto_results.events():
            if i >= 3 and event.device_type() == torch.autograd.DeviceType.CUDA:
                found.setdefault(event.name(), []).append(event.duration_ns() * 1e-9)
    return found


def measure(shape: Shape, case_name: str, dtype: torch.dtype) -> list[Row]:
    """A row for each kernel of one step."""
    case, setting = all_cases()[case_name], Setting(dtype, False, 1, torch.device("cuda"))
    if case.numel * dtype.itemsize * 7 > available_memory(setting.device):
        return []
    inputs = Inputs(case, setting)
    kind, rows = CONTESTANTS[shape.backend], []
    yardstick, speed = bandwidth(case.numel, dtype)
    peak = peak_bandwidth(setting.device)
    with shape.applied():
        contestant = kind(inputs.parameters(kind), inputs.rho, False)
        check(contestant, inputs.gradients[0], inputs.scales[0])
        launches = kernel_seconds(Turn(contestant, inputs.gradients))
    for launched, seconds in launches.items():
        kernel = next((k for k in PASSES if re.search(rf"\b_?{k}(_kernel)?\b", launched)), None)
        row: Row = {"case": case_name, "dtype": str(dtype).removeprefix("torch."), "contestant": shape.backend}
        row |= {"shape": str(shape), "kernel": kernel or launched, "launches": len(seconds) / ROUNDS}
        row["us"] = quartiles(seconds)[1] * 1e6
        if kernel is not None:
            row["bytes"] = PASSES[kernel] * case.numel * dtype.itemsize
            row |= {"yardstick": yardstick, "expected_us": row["bytes"] / speed * 1e6}
            row |= {} if peak is None else {"share_of_peak": row["bytes"] / row["us"] * 1e6 / peak}
        rows.append(row)
    return rows


def plan() -> list[tuple[Shape, str, torch.dtype]]:
    """What is measured, by value: the kernels as they are, then the candidates in fp32."""
    here = [Shape(name) for name in BACKENDS if name in CONTESTANTS]
    usual = [(shape, case, dtype) for dtype in DTYPES for shape in here for case in CASES]
    return usual + [(c, case, DTYPES[0]) for c in CANDIDATES for case in JUDGES if c.backend in CONTESTANTS]


def targets(rows: Iterable[Row]) -> list[Row]:
    """Each target beside the figure that was measured; None where none was."""
    base = {(r["case"], r["contestant"]): r for r in rows if r["dtype"] == "float32" and not r["adaptive"]}
    found = []
    for target in TARGETS:
        for name in BACKENDS:
            row = base.get((target.case, name), {"left_out": "not measured"})
            value = None if "left_out" in row else target.figure(row)
            held = value is not None and target.holds(value)
            found.append(
                {"target": target.what, "contestant": name, "bound": str(target), "measured": value, "held": held}
            )
    return found


def markdown(about: Row, kernels: list[Row], reached: list[Row]) -> str:
    lines = ["# Kernels and targets", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += ["Expected: the bytes at the bandwidth of the fastest yardstick of as many elements in the same run.", ""]
    columns = "case, dtype, backend, shape, kernel, launches, bytes, yardstick, expected us, measured us, share of peak"
    lines += ["| " + columns.replace(", ", " | ") + " |", "|---" * len(columns.split(", ")) + "|"]
    for r in kernels:
        moved = f"{r['bytes']:,} | {r['yardstick']} | {r['expected_us']:.1f}" if "bytes" in r else " | | "
        names = f"{r['case']} | {r['dtype']} | {r['contestant']} | {r['shape']} | `{r['kernel']}`"
        peak = f"{r['share_of_peak']:.0%}" if "share_of_peak" in r else ""
        lines.append(f"| {names} | {r['launches']:g} | {moved} | {r['us']:.1f} | {peak} |")
    lines += ["", "| target | backend | bound | measured | held |", "|---" * 5 + "|"]
    for r in reached:
        measured = "not measured" if r["measured"] is None else f"{r['measured']:.3g}"
        lines.append(
            f"| {r['target']} | {r['contestant']} | {r['bound']} | {measured} | {'yes' if r['held'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="Each kernel's own time on a GPU.")
    parser.add_argument("--output", type=Path, help="what bench was given; default: its file in bench/results")
    options = parser.parse_args(arguments)
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        sys.exit("no GPU: torch finds no CUDA device")
    path = options.output or results.file_of(device_name(device))
    reached = targets(row for row in results.load(path) if row["suite"] == "step")
    about = environment(device)
    path = path.with_stem(f"{path.stem}-kernels")
    path.parent.mkdir(parents=True, exist_ok=True)
    kernels: list[Row] = []
    for shape, case, dtype in plan():
        kernels += measure(shape, case, dtype)
        free_memory(device)
        # Whole after every measurement: what was measured is kept where time runs out.
        path.write_text(json.dumps({"about": about, "kernels": kernels, "targets": reached}, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(about, kernels, reached))
    print(markdown(about, kernels, reached))
    for row in reached:
        print(f"figure: {row['contestant']}: {row['target']}: {row['measured']} ({row['bound']}), held: {row['held']}")
    if not kernels:
        sys.exit("no kernel was measured: torch's profiler saw none, and warned of CUPTI, or there is no memory for it")


if __name__ == "__main__":
    main()
