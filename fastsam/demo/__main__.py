"""The command: trains with every method and seed, prints the tables, writes the picture."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

PACKAGES = {"matplotlib": "matplotlib", "rich": "rich", "sklearn": "scikit-learn"}  # beyond fastsam's own, by module
try:
    from rich import box
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from fastsam.demo.landscape import Panel, draw, loss_surface
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
    raise SystemExit(f"the demo needs {package}, which is not installed: pip install 'fastsam[demo]'") from None

NOISE = 0.4
INTERVALS = (1, 2, 5, 10)
SURFACE_EXTENT = 0.6  # by how much of its own norm a filter is moved, at most, each way

SGD = Method()


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    seeds: int
    epochs: int
    timing_rounds: int
    surface_points: int  # along each direction; odd, so that the middle one is w


FULL = Size(seeds=8, epochs=30, timing_rounds=60, surface_points=31)
QUICK = Size(seeds=2, epochs=25, timing_rounds=20, surface_points=13)


@dataclass(frozen=True)
class Trained:
    """One network at the end of its training, and what was measured on it."""

    model: nn.Module
    accuracy: float
    sharpness: float


Results = dict[tuple[float, Method], list[Trained]]  # by label noise and method: one for each seed


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo with these command line arguments; None takes the process's own."""
    options = parse(arguments)
    start = time.perf_counter()
    torch.set_num_threads(1)  # so small a network gains little from more, and the results don't depend on how many
    sam = Method(options.rho)
    sweep = [Method(options.interval_rho * interval, interval) for interval in INTERVALS]
    noisy = list(dict.fromkeys([SGD, sam, *sweep]))
    console = Console(highlight=False)
    console.print("Timing a training step with each method, in turns")  # before any progress bar takes time of its own
    data = digits(seed=0, noise=NOISE)
    times = dict(zip(noisy, step_times(noisy, options.size.timing_rounds, data), strict=True))
    with Progress(console=console) as progress:
        results = train_all({0.0: [SGD, sam], NOISE: noisy}, options, progress)
        draw_landscapes(results, sam, options, progress)
    report(results, times, sam, sweep, options, console)
    console.print(f"Picture (of seed 0): {options.output}\nThis took {time.perf_counter() - start:.0f} s.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastsam.demo",
        description="Trains a small CNN on scikit-learn's digits with SGD and with FusedSAM(SGD), with true labels and "
        f"with {100 * NOISE:.0f} % wrong ones; prints accuracy, sharpness and cost, and draws the loss around both "
        "minima.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer seeds and epochs, shorter timing, a coarser picture")
    for name, what in (("seeds", "trainings of each kind"), ("epochs", "length of each training")):
        full, quick = getattr(FULL, name), getattr(QUICK, name)
        add(f"--{name}", type=int, metavar="N", help=f"{what} (default {full}, with --quick {quick})")
    add("--rho", type=float, default=0.2, help="SAM's radius (default %(default)s)")
    add(
        "--interval-rho",
        type=float,
        default=0.1,
        metavar="RHO",
        help="in the comparison of intervals, rho is this times the interval (default %(default)s: at 0.2, interval=10 "
        "would have rho=2, with which this network learns nothing)",
    )
    default = Path("fastsam-demo.png")
    add("--output", type=Path, default=default, metavar="PATH", help="the PNG to write (default %(default)s)")
    options = parser.parse_args(arguments)
    options.size = QUICK if options.quick else FULL
    for name in ("seeds", "epochs"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(options.size, name))
        if (count := getattr(options, name)) < 1:
            parser.error(f"--{name} is {count}: at least 1 is needed")
    for name in ("rho", "interval_rho"):
        if not (radius := getattr(options, name)) > 0:
            parser.error(f"--{name.replace('_', '-')} is {radius}: it must be greater than 0")
    if not options.output.parent.is_dir():  # said now, not after minutes of training
        parser.error(f"--output is {options.output}, but there is no folder {options.output.parent}")
    return options


def train_all(methods: dict[float, list[Method]], options: argparse.Namespace, progress: Progress) -> Results:
    """Trains with the methods listed for each label noise, once for each seed."""
    cost = options.seeds * options.epochs * sum(method.gradients for listed in methods.values() for method in listed)
    task = progress.add_task("Training", total=cost)
    results: Results = {}
    for noise, listed in methods.items():
        for method in listed:
            results[noise, method] = []
            for seed in range(options.seeds):
                data = digits(seed, noise)
                model = train(method, data, options.epochs, seed, partial(progress.advance, task, method.gradients))
                tested = accuracy(model, data.test_images, data.test_labels)
                sharp = sharpness(model, data.images, data.labels, options.rho)
                results[noise, method].append(Trained(model, tested, sharp))
    progress.update(task, completed=cost)  # fractions were added up
    return results


def draw_landscapes(results: Results, sam: Method, options: argparse.Namespace, progress: Progress) -> None:
    """Draws the loss around the minima that SGD and SAM found with the first seed and wrong labels."""
    data = digits(seed=0, noise=NOISE)
    points = options.size.surface_points
    offsets = torch.linspace(-SURFACE_EXTENT, SURFACE_EXTENT, points)
    task = progress.add_task("Walking the landscapes", total=2)

    def panel(title: str, method: Method) -> Panel:
        trained = results[NOISE, method][0]
        losses = loss_surface(trained.model, data.images, data.labels, offsets, seed=0)
        progress.advance(task)
        caption = f"test accuracy {100 * trained.accuracy:.1f} %, sharpness {trained.sharpness:.3f}"
        return Panel(title, caption, losses - losses[points // 2, points // 2])

    draw(
        [panel("SGD", SGD), panel(f"FusedSAM(SGD), rho = {sam.rho:g}", sam)],
        offsets,
        f"Loss landscapes of the two minima (digits, {100 * NOISE:.0f} % wrong training labels)",
        "rise of the training loss",
        options.output,
    )


def report(
    results: Results,
    times: dict[Method, StepTime],
    sam: Method,
    sweep: list[Method],
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Prints the two tables, and under which conditions they hold."""
    wrong = f"{100 * NOISE:.0f} % wrong"

    def cells(noise: float, method: Method) -> list[str]:
        trained = results[noise, method]
        return [
            f"{spread([100 * one.accuracy for one in trained], decimals=1)} %",
            spread([one.sharpness for one in trained], decimals=3),
            f"{1e3 * times[method].seconds:.2f}",
            f"{times[method].ratio:.2f}",
        ]

    measured = ("test accuracy", "sharpness", "ms/step", "x SGD")
    main_table = table("SGD and SAM", "labels", "optimizer", *measured)
    for noise, labels in ((0.0, "true"), (NOISE, wrong)):
        for name, method in (("SGD", SGD), (f"SAM, rho={sam.rho:g}", sam)):
            main_table.add_row(labels, name, *cells(noise, method))
    interval_table = table(f"SAM on every interval-th step only, {wrong} labels", "interval", "rho", *measured)
    interval_table.add_row("plain SGD", "", *cells(NOISE, SGD))
    for method in sweep:
        interval_table.add_row(str(method.interval), f"{method.rho:g}", *cells(NOISE, method))

    console.print(main_table, interval_table, sep="\n")
    console.print(
        f"Mean ± standard deviation of {options.seeds} seeds. With each seed, all start from the same weights, see the "
        f"same batches and end after the same {options.epochs} epochs (batch {BATCH}, lr {LR}, momentum {MOMENTUM}).\n"
        f"Sharpness: loss(w + e_w) - loss(w) on the training set as it was learnt, within rho={options.rho:g}.\n"
        "A SAM step computes two gradients, so at equal epochs it has about twice the cost of an SGD step, which is "
        "what interval saves. Times are medians over turns, and x SGD is the ratio to SGD in the same round of turns.\n"
        "rho grows with interval, as MosaicML Composer's method card advises. rho and epochs were chosen to show the "
        "effect: try others with --rho, --interval-rho, --epochs."
    )


def table(title: str, *columns: str) -> Table:
    """An empty table; all but the first two columns hold numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    return made


def spread(values: Sequence[float], decimals: int) -> str:
    """The mean of `values` and, where there are several, their sample standard deviation."""
    mean = f"{statistics.mean(values):.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{decimals}f}"


if __name__ == "__main__":
    main()
