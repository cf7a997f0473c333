"""The command: trains with every method and seed, prints the table, writes the picture."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

PACKAGES = {"matplotlib": "matplotlib", "rich": "rich", "sklearn": "scikit-learn"}  # beyond fastsam's own, by module
try:
    import sklearn.datasets  # noqa: F401 (training.py imports it when it needs the data)
    from rich import box
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from fastsam.demo.landscape import Costs, Panel, draw, loss_surface
    from fastsam.demo.methods import CHOSEN, CONDITIONS, METHODS, NOISE, SAM, SGD, Condition, tuned
    from fastsam.demo.training import (
        BATCH,
        LR,
        MOMENTUM,
        Method,
        StepTime,
        accuracy,
        digits,
        sharpness,
        step_times,
        train,
    )
except ModuleNotFoundError as error:
    package = PACKAGES.get((error.name or "").partition(".")[0])
    if package is None:
        raise
    command = f"pip install {' '.join(PACKAGES.values())}"
    raise SystemExit(f"the demo needs {package}, which is not installed: {command}") from None

SURFACE_EXTENT = 0.6  # by how much of its own norm a filter is moved, at most, each way
SHARPNESS_RHO = 0.2
WRONG = Condition(NOISE, decay=False)


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    seeds: int
    epochs: int
    timing_rounds: int
    surface_points: int  # along each direction; odd, so that the middle one is w


FULL = Size(seeds=4, epochs=30, timing_rounds=10, surface_points=31)
QUICK = Size(seeds=2, epochs=25, timing_rounds=5, surface_points=13)


@dataclass(frozen=True)
class Trained:
    """One network at the end of its training, and what was measured on it."""

    model: nn.Module
    accuracy: float
    sharpness: float


Results = dict[tuple[Condition, str], list[Trained]]  # by condition and name of the method: one for each seed


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo with these command line arguments; None takes the process's own."""
    options = parse(arguments)
    start = time.perf_counter()
    torch.set_num_threads(1)
    console = Console(highlight=False)
    console.print("Timing a training step with each method, in turns")  # before any progress bar takes time of its own
    methods = tuned(CHOSEN, WRONG)
    timed = step_times(list(methods.values()), options.size.timing_rounds, digits(seed=0, noise=NOISE))
    times = dict(zip(methods, timed, strict=True))
    with Progress(console=console) as progress:
        results = train_all(options, progress)
        draw_picture(results, times, options, progress)
    report(results, times, options, console)
    console.print(f"Picture (of seed 0): {options.output}\nThis took {time.perf_counter() - start:.0f} s.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastsam.demo",
        description="Trains a small CNN on scikit-learn's digits with SGD and with FusedSAM(SGD) in several forms, "
        f"with true labels and with {100 * NOISE:.0f} % wrong ones; prints accuracy, sharpness and cost, and draws the "
        "loss around two minima and accuracy over cost.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer seeds and epochs, shorter timing, a coarser picture")
    for name, what in (("seeds", "trainings of each kind"), ("epochs", "length of each training")):
        full, quick = getattr(FULL, name), getattr(QUICK, name)
        add(f"--{name}", type=int, metavar="N", help=f"{what} (default {full}, with --quick {quick})")
    default = Path("fastsam-demo.png")
    add("--output", type=Path, default=default, metavar="PATH", help="the PNG to write (default %(default)s)")
    options = parser.parse_args(arguments)
    options.size = QUICK if options.quick else FULL
    for name in ("seeds", "epochs"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(options.size, name))
        if (count := getattr(options, name)) < 1:
            parser.error(f"--{name} is {count}: at least 1 is needed")
    if not options.output.parent.is_dir():  # said now, not after minutes of training
        parser.error(f"--output is {options.output}, but there is no folder {options.output.parent}")
    return options


def train_all(options: argparse.Namespace, progress: Progress) -> Results:
    """Trains with every method under every condition, once for each seed, on all cores."""
    cells = [(condition, name, m) for condition in CONDITIONS for name, m in tuned(CHOSEN, condition).items()]
    jobs = [(condition, m, seed, options.epochs) for condition, _, m in cells for seed in range(options.seeds)]
    task = progress.add_task("Training", total=sum(method.gradients for _, method, _, _ in jobs))
    found = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for job, trained in zip(jobs, pool.map(train_one, *zip(*jobs, strict=True)), strict=True):
            found.append(trained)
            progress.advance(task, job[1].gradients)
    seeds = options.seeds
    return {(c, name): found[i * seeds : (i + 1) * seeds] for i, (c, name, _) in enumerate(cells)}


def train_one(condition: Condition, method: Method, seed: int, epochs: int) -> Trained:
    """Trains one network, in a process of the pool."""
    torch.set_num_threads(1)  # so small a network gains little from more, and the results don't depend on how many
    data = digits(seed, condition.noise)
    model = train(method, data, epochs, seed, condition.decay)
    tested = accuracy(model, data.test_images, data.test_labels)
    return Trained(model, tested, sharpness(model, data.images, data.labels, SHARPNESS_RHO))


def draw_picture(results: Results, times: dict[str, StepTime], options: argparse.Namespace, progress: Progress) -> None:
    """Draws the loss around two minima, found with the first seed and wrong labels, and accuracy over cost."""
    data = digits(seed=0, noise=NOISE)
    points = options.size.surface_points
    offsets = torch.linspace(-SURFACE_EXTENT, SURFACE_EXTENT, points)
    task = progress.add_task("Walking the landscapes", total=2)

    def panel(title: str, name: str) -> Panel:
        trained = results[WRONG, name][0]
        losses = loss_surface(trained.model, data.images, data.labels, offsets, seed=0)
        progress.advance(task)
        caption = f"test accuracy {100 * trained.accuracy:.1f} %, sharpness {trained.sharpness:.3f}"
        return Panel(title, caption, losses - losses[points // 2, points // 2])

    rho = tuned(CHOSEN, WRONG)[SAM].rho
    constant, decaying = ([summary(results, Condition(NOISE, d), name) for name in METHODS] for d in (False, True))
    draw(
        [panel("SGD", SGD), panel(f"FusedSAM(SGD), rho = {rho:g}", SAM)],
        offsets,
        Costs(list(METHODS), [times[name].ratio for name in METHODS], constant, decaying),
        f"Digits, {100 * NOISE:.0f} % wrong training labels: two minima, and what accuracy costs",
        "rise of the training loss",
        options.output,
    )


def summary(results: Results, condition: Condition, name: str) -> tuple[float, float]:
    """Mean and standard error of the test accuracy, in per cent."""
    accuracies = [100 * one.accuracy for one in results[condition, name]]
    error = statistics.stdev(accuracies) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else 0.0
    return statistics.mean(accuracies), error


def report(results: Results, times: dict[str, StepTime], options: argparse.Namespace, console: Console) -> None:
    """Prints the tables, and under which conditions they hold."""

    def reached(condition: Condition, name: str) -> str:
        mean, error = summary(results, condition, name)
        return f"{mean:.1f} ± {error:.1f}"

    accuracies = by_condition("Test accuracy, %", reached)
    console.print(
        accuracies, cost_table(results, times), by_condition("Chosen: rho, or weight decay", chosen), sep="\n"
    )
    console.print(
        f"Test accuracy: mean ± standard error of {options.seeds} seeds. With each seed, all start from "
        f"the same weights, see the same batches and end after the same {options.epochs} epochs (batch {BATCH}, lr "
        f"{LR}, momentum {MOMENTUM}; decaying: along a cosine, to 0).\n"
        "rho and weight decay were chosen for each column on a validation split of the training part, with other "
        "seeds: python -m bench.accuracy --tune, in a clone.\n"
        f"Sharpness: loss(w + e_w) - loss(w) on the training set as it was learnt, within rho={SHARPNESS_RHO:g}.\n"
        "Gradients: of a whole batch, in a step, on average. Times are medians over turns, and x SGD is the ratio to "
        "SGD in the same round of turns.\n"
        "One small network on one data set. docs/method.md says how far this carries."
    )


def by_condition(title: str, cell: Callable[[Condition, str], str]) -> Table:
    """A table of `cell` by method and condition."""
    wrong = f"{100 * NOISE:.0f} % wrong"
    made = table(title, "optimizer", "true labels", wrong, "the same, lr decays")
    for name in METHODS:
        made.add_row(name, *(cell(condition, name) for condition in CONDITIONS))
    return made


def chosen(condition: Condition, name: str) -> str:
    """rho, or the weight decay of plain SGD."""
    method = tuned(CHOSEN, condition)[name]
    return f"{method.weight_decay if method.rho is None else method.rho:g}"


def cost_table(results: Results, times: dict[str, StepTime]) -> Table:
    """What a step costs, and the sharpness that it comes to with wrong labels."""
    made = table("Cost, and sharpness with wrong labels", "optimizer", "gradients", "ms/step", "x SGD", "sharpness")
    for name, method in METHODS.items():
        cost = [f"{method.gradients:g}", f"{1e3 * times[name].seconds:.2f}", f"{times[name].ratio:.2f}"]
        made.add_row(name, *cost, f"{statistics.mean(one.sharpness for one in results[WRONG, name]):.3f}")
    return made


def table(title: str, *columns: str) -> Table:
    """An empty table; all but the first column hold numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=True)
    return made


if __name__ == "__main__":
    main()
