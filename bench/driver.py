"""Runs what was asked for on one device, keeps each measurement as soon as it is made, and says what was left out."""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console  # pip install rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import plan, results, step_suite, training_suite
from bench.cases import all_cases
from bench.measures import device_name, environment, free_memory
from bench.results import Row
from bench.small_models import MODELS

OnTurn = Callable[[str], None]
Job = Callable[[OnTurn], list[Row]]
INTERRUPTED = 130


class Reporter:
    """The progress bar. It is drawn between measurements only: a thread of its own would take part of a core."""

    def __init__(self, console: Console, total: int) -> None:
        columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=console, auto_refresh=False, transient=True)
        self.task = self.progress.add_task("", total=total)
        self.label = ""
        self.drawn = 0.0

    def turn(self, name: str) -> None:
        if time.monotonic() - self.drawn > 0.25:
            self.progress.update(self.task, description=f"{self.label}: {name}", refresh=True)
            self.drawn = time.monotonic()


def step_jobs(
    device: torch.device, options: argparse.Namespace, usable: list[str], max_threads: int
) -> Iterator[tuple[str, Job]]:
    """(label, what to call) for each case and setting of the step suite."""
    chosen = plan.Options(options.dtype, options.form, options.threads)
    for case in all_cases().values():
        if options.cases is not None and case.name not in options.cases:
            continue
        for setting in plan.settings(case, chosen, device, max_threads, representative=not options.quick):
            names = plan.contestants(case, setting, usable, options.asked, max_threads)

            job = partial(step_suite.measure, case, setting, names, seconds=options.seconds)
            yield f"{case.name}, {setting}", job


def training_jobs(device: torch.device, options: argparse.Namespace, max_threads: int) -> Iterator[tuple[str, Job]]:
    """The same for the training suite, with all cores."""
    for name in MODELS:
        if options.cases is not None and name not in options.cases:
            continue
        threads = max(options.threads or [max_threads])
        yield f"training {name}", partial(training_suite.measure, name, threads, device, seconds=2 * options.seconds)


def run(device: torch.device, options: argparse.Namespace, console: Console) -> int:
    """Measures; returns the exit status: 1 where a contestant's results were wrong, 130 after Ctrl-C."""
    warnings.filterwarnings("ignore", message="FusedSAM perturbs torch")
    reasons = plan.unusable(options.contestants, device)
    usable = [name for name in options.contestants if name not in reasons]
    max_threads = torch.get_num_threads()
    jobs = list(step_jobs(device, options, usable, max_threads)) if "step" in options.suite else []
    jobs += training_jobs(device, options, max_threads) if "training" in options.suite else []
    path = output_path(device, options)
    about = environment(device)
    console.print(f"{about['device']}: {len(jobs)} measurements of up to {len(usable)} contestants, into {path}")
    left_out = [f"{name}: {reason}" for name, reason in reasons.items()]
    measured, status = 0, 0
    reporter = Reporter(console, len(jobs))
    with reporter.progress:
        try:
            for label, job in jobs:
                reporter.label = label
                rows = job(on_turn=reporter.turn)
                free_memory(device)
                results.save(path, [row | about for row in rows])
                measured += sum("left_out" not in row for row in rows)
                for (reason,), of_reason in results.groups((r for r in rows if "left_out" in r), "left_out").items():
                    left_out.append(f"{label}: {', '.join(row['contestant'] for row in of_reason)}: {reason}")
                reporter.progress.console.print(f"[green]done[/] {label}{summary(rows)}", highlight=False)
                reporter.progress.advance(reporter.task)
        except KeyboardInterrupt:
            console.print(f"interrupted in {reporter.label}; what was measured before is kept")
            status = INTERRUPTED
        finally:
            torch.set_num_threads(max_threads)
    for line in left_out:
        console.print(f"left out: {line}", highlight=False, markup=False)
    console.print(f"{measured} rows in {path}, a table in {path.with_suffix('.md')}")
    return status or int(any(step_suite.WRONG in line for line in left_out))


def output_path(device: torch.device, options: argparse.Namespace) -> Path:
    if options.output is not None:
        return options.output
    path = results.file_of(device_name(device))
    return path.with_stem(f"{path.stem}-quick") if options.quick else path


def summary(rows: list[Row]) -> str:
    """The fastest fastsam backend's figures, for the line that a measurement leaves behind."""
    own = [row for row in rows if "speedup_over" in row]
    if not own:
        return ""
    best = min(own, key=lambda row: row.get("device_us", row["wall_us"])[1])
    found = f"  {best['contestant']}: {best['share_of_floor']:.0%} of the floor"
    if best["speedup_over"]:
        peer, ratio = min(best["speedup_over"].items(), key=lambda item: item[1])
        found += f", {ratio:.2f}x {peer}"
    return found
