"""Whole training steps: the base optimizer alone, SAM at several intervals, the first pass on part of a batch, along
the momentum, and without the native library.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastsam
from bench.results import Row
from bench.small_models import MODELS
from bench.step_suite import WRONG, describe_times
from bench.timing import Samples, interleave, median_ratio

STEPS = 10
"""Steps in one measurement: whole periods of every interval."""
BATCHES = 4
BASE, PEER, OWN = "base", "pytorch_optimizer", "interval=1"
SGD = {"lr": 0.01, "momentum": 0.9}

Batch = tuple[Tensor, Tensor]


@dataclass
class Trainer:
    """Takes `STEPS` training steps at a time with a model and an optimizer of its own."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Iterator[Batch]
    step: Callable[["Trainer", Tensor, Tensor], None]

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        for _ in range(STEPS):
            self.step(self, *next(self.batches))

    def backward(self, x: Tensor, y: Tensor) -> None:
        cross_entropy(self.model(x), y).backward()


def base_step(trainer: Trainer, x: Tensor, y: Tensor) -> None:
    trainer.optimizer.zero_grad()
    trainer.backward(x, y)
    trainer.optimizer.step()


def sam_step(share: float = 1.0) -> Callable[[Trainer, Tensor, Tensor], None]:
    """FusedSAM in the two-call form; the first pass sees the first `share` of the batch."""

    def step(trainer: Trainer, x: Tensor, y: Tensor) -> None:
        part = int(len(x) * share)
        trainer.optimizer.zero_grad()
        trainer.backward(x[:part], y[:part])
        if trainer.optimizer.first_step(zero_grad=True):
            trainer.backward(x, y)
        trainer.optimizer.second_step()

    return step


def momentum_step(trainer: Trainer, x: Tensor, y: Tensor) -> None:
    trainer.optimizer.zero_grad()
    trainer.optimizer.first_step()
    trainer.backward(x, y)
    trainer.optimizer.second_step()


def peer_step(trainer: Trainer, x: Tensor, y: Tensor) -> None:
    trainer.optimizer.zero_grad()
    trainer.backward(x, y)
    trainer.optimizer.first_step(zero_grad=True)
    trainer.backward(x, y)
    trainer.optimizer.second_step()


def trainers(name: str, device: torch.device) -> dict[str, Trainer]:
    """All contestants on the model `name`, from the same weights and with the same batches."""
    construct, shape = MODELS[name].construct, MODELS[name].batch
    torch.manual_seed(0)
    initial = construct().to(device)
    batches = [
        (torch.randn(shape, device=device), torch.randint(10, (shape[0],), device=device)) for _ in range(BATCHES)
    ]

    def trainer(build: Callable[..., torch.optim.Optimizer], step: Any, **options: Any) -> Trainer:
        model = deepcopy(initial)
        return Trainer(model, build(model.parameters(), **options, **SGD), cycle(batches), step)

    def fused(params: Any, **options: Any) -> torch.optim.Optimizer:
        return fastsam.FusedSAM(params, torch.optim.SGD, **options)

    def peer(params: Any, **options: Any) -> torch.optim.Optimizer:
        import pytorch_optimizer

        return pytorch_optimizer.SAM(params, torch.optim.SGD, **options)

    found = {BASE: trainer(torch.optim.SGD, base_step), PEER: trainer(peer, peer_step)}
    for interval in (1, 2, 5, 10):
        found[f"interval={interval}"] = trainer(fused, sam_step(), interval=interval)
    for share in (0.5, 0.25):
        found[f"first pass on {share:.0%}"] = trainer(fused, sam_step(share))
    found["along the momentum"] = trainer(fused, momentum_step, direction="momentum")
    found["interval=1, foreach backend"] = trainer(fused, sam_step(), backend="foreach")
    return found


def check(found: dict[str, Trainer]) -> None:
    """Compares one step of FusedSAM and of pytorch_optimizer's SAM. (Rounding grows with every further step.)

    Raises:
        ArithmeticError: they differ by more than 1 % of the step.
    """
    before = [p.detach().clone() for p in found[BASE].model.parameters()]
    for name in (PEER, OWN):
        found[name].step(found[name], *next(found[name].batches))
    pairs = zip(found[PEER].model.parameters(), found[OWN].model.parameters(), strict=True)
    error = sum((theirs - ours).square().sum() for theirs, ours in pairs) ** 0.5
    moved = sum((p - w).square().sum() for p, w in zip(found[PEER].model.parameters(), before, strict=True)) ** 0.5
    if not error <= 0.01 * moved:
        raise ArithmeticError(f"a step that moves the weights by {moved:.3g} is off by {error:.3g}")


def measure(
    name: str,
    threads: int,
    device: torch.device,
    *,
    seconds: float,
    on_turn: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """A row for each contestant on the model `name`; times are of one step."""
    if device.type == "cpu":
        torch.set_num_threads(threads)
    found = trainers(name, device)
    threads = threads if device.type == "cpu" else 0
    numel = sum(p.numel() for p in found[BASE].model.parameters())
    try:
        check(found)
    except ArithmeticError as error:
        return [describe(name, numel, threads, OWN) | {"left_out": f"{WRONG}: {error}"}]
    samples = interleave(found, device, seconds=seconds, on_turn=on_turn)
    return [
        {
            **describe(name, numel, threads, contestant),
            **describe_times(a_step(own)),
            "ratio_to_base": round(median_ratio(own.wall, samples[BASE].wall), 4),
            "ratio_to_peer": round(median_ratio(own.wall, samples[PEER].wall), 4),
        }
        for contestant, own in samples.items()
    ]


def describe(name: str, numel: int, threads: int, contestant: str) -> Row:
    """What was measured; `key` tells it from every other measurement on this device."""
    return {
        "key": f"training/{name}/float32/plain/threads{threads}/{contestant}",
        "suite": "training",
        "case": name,
        "title": MODELS[name].title,
        "dtype": "float32",
        "adaptive": False,
        "numel": numel,
        "threads": threads,
        "contestant": contestant,
    }


def a_step(samples: Samples) -> Samples:
    def mean(times: Sequence[float]) -> list[float]:
        return [time / STEPS for time in times]

    return Samples(mean(samples.wall), mean(samples.device))
