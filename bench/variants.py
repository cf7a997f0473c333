"""`python -m bench.variants`: what else was tried beside the methods of bench.accuracy, on its data and by its rules.

rho is chosen on validation splits, under each condition; the tables show how far it may go, too. Results go to
bench/results/variants.json and .md.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.accuracy import described, mnist, run_all, with_error
from bench.results import RESULTS
from fastsam import FusedSAM
from fastsam.demo.methods import CONDITIONS
from fastsam.demo.training import CLASSES, LR, MOMENTUM, Data, Method, digits

TUNING_SEEDS = range(1000, 1004)
SEEDS = 10
WRONG_LABELS = CONDITIONS[1:]


@dataclass(frozen=True)
class Ramped(Method):
    """rho rises from 0 over the first `ramp` of training."""

    ramp: float = 0.6

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        sam = super().optimizer(model, steps)
        done = 0

        def before_step(*_: object) -> None:
            nonlocal done
            done += 1
            for group in sam.param_groups:
                group["rho"] = self.rho * min(1.0, done / (self.ramp * steps))

        sam.register_step_pre_hook(before_step)
        return sam


@dataclass(frozen=True)
class OnNormalisation(Method):
    """SAM-ON, arXiv 2306.04226: only the weights of normalisation layers are perturbed."""

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        chosen = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
        others = [p for p in model.parameters() if all(p is not q for q in chosen)]
        groups = [{"params": chosen}, {"params": others, "perturb": False}]
        return FusedSAM(groups, torch.optim.SGD, self.rho, lr=LR, momentum=MOMENTUM)


@dataclass(frozen=True)
class StepBefore(Method):
    """Climbs along the gradient of the step before."""

    direction: str = "step before"

    @property
    def gradients(self) -> float:
        return 1.0

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        return AlongStepBefore(model.parameters(), torch.optim.SGD, self.rho, start=1, lr=LR, momentum=MOMENTUM)


class AlongStepBefore(FusedSAM):
    """The recipe of docs/method.md for it, as a step with a closure."""

    def step(self, closure: Callable[[], Tensor]) -> Any:  # type: ignore[override]
        self.first_step(zero_grad=True)
        return super().step(closure)


def normalised_digits(seed: int, noise: float) -> Data:
    """The demo's data, for its network with BatchNorm behind each convolution."""
    return replace(digits(seed, noise), network=normalised_small_network)


def normalised_small_network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, CLASSES),
        )


DATA = {"digits": digits, "digits, with BatchNorm": normalised_digits, "mnist": mnist}


class Search(NamedTuple):
    """A method on a data set, and the values of rho to try."""

    data: str
    title: str
    method: Method
    grid: tuple[float, ...]


ALONG_MOMENTUM = Method(1.0, direction="momentum")
SEARCHES = [
    Search("digits", "Momentum-SAM", ALONG_MOMENTUM, (0.8, 1.1, 1.6, 2.2, 3.2, 4.5, 6.4)),
    Search("digits", "Momentum-SAM, rho ramps", Ramped(1.0, direction="momentum"), (0.8, 1.1, 1.6, 2.2, 3.2, 4.5, 6.4)),
    Search("digits", "along the step before", StepBefore(0.2), (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)),
    Search("digits, with BatchNorm", "SAM", Method(0.2), (0.1, 0.14, 0.2, 0.28, 0.4)),
    Search("digits, with BatchNorm", "SAM-ON", OnNormalisation(1.0), (1.0, 2.0, 4.0, 5.6, 8.0)),
    Search("mnist", "Momentum-SAM", ALONG_MOMENTUM, (1.6, 2.2, 3.2)),
    Search("mnist", "Momentum-SAM, rho ramps", Ramped(1.0, direction="momentum"), (1.6, 2.2, 3.2)),
    Search("mnist", "SAM-ON", OnNormalisation(1.0), (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)),
]


def measure(search: Search, seeds: int) -> list[dict[str, object]]:
    """A row for each condition: validation accuracy for every rho, and test accuracy with the best."""
    load, rows = DATA[search.data], []
    for c in WRONG_LABELS:
        candidates = [search.method.tuned(rho) for rho in search.grid]
        jobs = [(load, c, m, seed, True) for m in candidates for seed in TUNING_SEEDS]
        found = iter(run_all(jobs, f"{search.title} on {search.data}, validation"))
        means = {rho: statistics.mean(next(found) for _ in TUNING_SEEDS) for rho in search.grid}
        best = max(means, key=means.__getitem__)
        jobs = [(load, c, search.method.tuned(best), seed, False) for seed in range(seeds)]
        rows.append(
            {
                "data": search.data,
                "method": search.title,
                "decay": c.decay,
                "gradients": search.method.gradients,
                "validation": {f"{rho:g}": round(mean, 5) for rho, mean in means.items()},
                "rho": best,
                "accuracies": [round(a, 5) for a in run_all(jobs, f"{search.title} on {search.data}")],
            }
        )
    return rows


def table(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# Test accuracy of variants", ""]
    lines += [f"- {key}: {value}" for key, value in report.items() if key != "rows"]
    lines += [
        "",
        "40 % wrong labels. Accuracy in per cent: on validation splits, whose labels are as wrong, the mean of "
        f"{len(TUNING_SEEDS)} seeds for each rho; test accuracy with the best of these, mean ± standard error.",
    ]
    for name in dict.fromkeys(row["data"] for row in report["rows"]):
        for decay in (False, True):
            rows = [row for row in report["rows"] if (row["data"], row["decay"]) == (name, decay)]
            lines += ["", f"## {name}, {'decaying' if decay else 'constant'} learning rate", ""]
            lines += ["| | gradients a step | validation, by rho | rho | test | seeds |", "|---|---|---|---|---|---|"]
            for row in rows:
                means = ", ".join(f"{rho}: {100 * mean:.1f}" for rho, mean in row["validation"].items())
                cells = [row["method"], f"{row['gradients']:g}", means, f"{row['rho']:g}"]
                cells += [with_error(row["accuracies"]), str(len(row["accuracies"]))]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.variants", description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="default: all")
    parser.add_argument("--seeds", type=int, metavar="N", default=SEEDS, help="default: %(default)s")
    parser.add_argument("--folder", type=type(RESULTS), default=RESULTS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    rows = [row for search in SEARCHES if search.data in options.data for row in measure(search, options.seeds)]
    report = described(rows)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "variants.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.folder / "variants.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
