"""`python -m bench.kernels`: on a GPU, each kernel's own time beside what its bytes should take; and design targets.

Run it after `python -m bench --device cuda`, whose rows it compares with the targets, and with the same --output.
Beside those results, bench/results/<device>.json where nothing else is said, it writes <device>-kernels.json and .md.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import results
from bench.cases import all_cases
from bench.contestants import CONTESTANTS
from bench.inputs import Inputs, Setting, Turn
from bench.measures import available_memory, device_name, environment, free_memory
from bench.results import Row
from bench.timing import L2_FLUSH_BYTES, quartiles

BACKENDS = ("fastsam-triton", "fastsam-cuda")
CASES = ("161x64", "resnet50", "size-1e8")
DTYPES = (torch.float32, torch.bfloat16)
PASSES = {"norm": 1, "perturb": 4, "restore": 2}
"""Reads and writes of a whole list of parameters: norm reads g; perturb reads w and g, writes w and the backup."""
ROUNDS = 30


@dataclass(frozen=True)
class Target:
    """A bound on a figure of a row of the step suite: fp32, plain."""

    case: str
    what: str
    figure: Callable[[Row], float]
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        return f">= {self.at_least}" if self.at_least is not None else f"<= {self.at_most}"


def best_foreach(row: Row) -> float:
    return min(ratio for name, ratio in row["speedup_over"].items() if "foreach" in name)


TARGETS = (
    Target("size-1e8", "share of the floor, 1e8 parameters", lambda row: row["share_of_floor"], at_least=0.85),
    Target("resnet50", "davda54's wall time over ours", lambda row: row["wall_speedup_over"]["davda54"], at_least=20),
    Target("resnet50", "the best foreach's device time over ours", best_foreach, at_least=1.15),
    # Three kernels; each turn brings gradients at other addresses, whose upload is a copy besides.
    Target("resnet50", "launches, with one upload of addresses", lambda row: row["launches"], at_most=4),
)


def copy_bandwidth(numel: int, dtype: torch.dtype) -> float:
    """Bytes a second, read and written, of one copy_ of `numel` elements with a cold cache.

    They are random: a GPU may move constant data faster.
    """
    source, target = (torch.randn(numel, dtype=dtype, device="cuda") for _ in range(2))
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    seconds = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) * 1e-3)
    return 2 * source.nbytes / quartiles(seconds)[1]


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


def measure(name: str, case_name: str, dtype: torch.dtype) -> list[Row]:
    """A row for each kernel of one step."""
    case, setting = all_cases()[case_name], Setting(dtype, False, 1, torch.device("cuda"))
    if case.numel * dtype.itemsize * 7 > available_memory(setting.device):
        return []
    inputs = Inputs(case, setting)
    contestant = CONTESTANTS[name](inputs.parameters(CONTESTANTS[name]), inputs.rho, False)
    bandwidth = copy_bandwidth(case.numel, dtype)
    rows = []
    for launched, seconds in kernel_seconds(Turn(contestant, inputs.gradients)).items():
        kernel = next((k for k in PASSES if re.search(rf"\b_?{k}(_kernel)?\b", launched)), None)
        row: Row = {"case": case_name, "dtype": str(dtype).removeprefix("torch."), "contestant": name}
        row |= {"kernel": kernel or launched, "launches": len(seconds) / ROUNDS, "us": quartiles(seconds)[1] * 1e6}
        if kernel is not None:
            row["bytes"] = PASSES[kernel] * case.numel * dtype.itemsize
            row["expected_us"] = row["bytes"] / bandwidth * 1e6
        rows.append(row)
    return rows


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
    lines += ["Expected: the bytes at the bandwidth of one `copy_` of as many elements in the same run.", ""]
    lines += ["| case | dtype | backend | kernel | launches | bytes | expected us | measured us |", "|---" * 8 + "|"]
    for r in kernels:
        moved = f"{r['bytes']:,} | {r['expected_us']:.1f}" if "bytes" in r else " | "
        names = f"{r['case']} | {r['dtype']} | {r['contestant']} | `{r['kernel']}`"
        lines.append(f"| {names} | {r['launches']:g} | {moved} | {r['us']:.1f} |")
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
    for name in BACKENDS:
        for case in CASES if name in CONTESTANTS else ():
            for dtype in DTYPES:
                kernels += measure(name, case, dtype)
                free_memory(device)
                # Whole after every measurement: what was measured is kept where time runs out.
                path.write_text(json.dumps({"about": about, "kernels": kernels, "targets": reached}, indent=1) + "\n")
                path.with_suffix(".md").write_text(markdown(about, kernels, reached))
    print(markdown(about, kernels, reached))
    for row in reached:
        print(f"figure: {row['contestant']}: {row['target']}: {row['measured']} ({row['bound']}), held: {row['held']}")


if __name__ == "__main__":
    main()
