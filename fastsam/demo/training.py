"""The training that the demo compares: one loop for SGD and for FusedSAM(SGD), and what is measured on its result."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from fastsam import FusedSAM

LR, MOMENTUM, BATCH = 0.05, 0.9, 64
TRAINING_IMAGES = 1000  # of 1797; the others are the test set
CLASSES = 10


@dataclass(frozen=True)
class Method:
    """An optimizer to compare: plain SGD where `rho` is None, else FusedSAM around the same SGD."""

    rho: float | None = None
    interval: int = 1

    @property
    def gradients(self) -> float:
        """Gradients that it computes in a step, on average: 1 for SGD, one more on each SAM step."""
        return 1.0 if self.rho is None else 1.0 + 1.0 / self.interval

    def optimizer(self, model: nn.Module) -> Optimizer:
        """A new optimizer over the parameters of `model`."""
        if self.rho is None:
            return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
        return FusedSAM(
            model.parameters(), torch.optim.SGD, rho=self.rho, interval=self.interval, lr=LR, momentum=MOMENTUM
        )


def step(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> None:
    """One step of either optimizer: SGD calls the closure once, FusedSAM a second time at w + e_w."""

    def closure() -> Any:
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)


def train(
    method: Method, data: Digits, epochs: int, seed: int, on_epoch: Callable[[], object] = lambda: None
) -> nn.Module:
    """Trains a new network; initial weights and order of the batches follow from `seed`, whatever the method.

    Args:
        method: the optimizer to use.
        data: its training images and labels are learnt.
        epochs: passes over the training images.
        seed: of the initial weights and of the order of the batches.
        on_epoch: called after each epoch.
    """
    model = network(seed)
    optimizer = method.optimizer(model)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.labels), generator=order).split(BATCH):  # type: ignore[no-untyped-call]
            step(model, optimizer, data.images[batch], data.labels[batch])
        on_epoch()
    return model


def network(seed: int) -> nn.Module:
    """A small CNN for 8x8 digits, with initial weights that follow from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, CLASSES),
        )


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1797 scanned digits, split at random.

    `images` (1000, 1, 8, 8) and `test_images` (797, 1, 8, 8) are fp32 from 0 to 1, `labels` (1000,) and `test_labels`
    (797,) int64. The test labels are always the true ones.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(seed: int, noise: float) -> Digits:
    """Splits the digits and replaces a share `noise` of the training labels by wrong ones; `seed` decides which."""
    generator = torch.Generator().manual_seed(seed)
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=generator)
    images = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)[order]
    images, test_images = images[:TRAINING_IMAGES], images[TRAINING_IMAGES:]
    labels, test_labels = labels[:TRAINING_IMAGES], labels[TRAINING_IMAGES:]
    return Digits(images, with_wrong_labels(labels, noise, generator), test_images, test_labels)


def with_wrong_labels(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A copy of `labels` (n,) in which exactly round(share * n), at random places, are another class at random."""
    count = round(share * len(labels))
    places = torch.randperm(len(labels), generator=generator)[:count]
    shift = torch.randint(1, CLASSES, (count,), generator=generator)
    return labels.index_put((places,), (labels[places] + shift) % CLASSES)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of `images` that `model` gives their label."""
    return float((model(images).argmax(1) == labels).double().mean())


def sharpness(model: nn.Module, images: Tensor, labels: Tensor, rho: float) -> float:
    """loss(w + e_w) - loss(w): how much the loss rises at the worst point within `rho` of w, to first order.

    The loss is the mean cross entropy over all of `images`, with the labels that were learnt. The weights are left as
    they are.
    """
    with FusedSAM(model.parameters(), torch.optim.SGD, rho=rho) as sam:  # leaving the block restores w
        sam.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        sam.first_step(zero_grad=True)
        with torch.no_grad():
            return float(cross_entropy(model(images), labels) - loss)


@dataclass(frozen=True)
class StepTime:
    """The time of a training step in seconds, and divided by the time with the first method of the comparison."""

    seconds: float
    ratio: float


def step_times(methods: Sequence[Method], rounds: int, data: Digits) -> list[StepTime]:
    """Times one training step with each of `methods`; ratios are to the first.

    In each round the methods take turns, as many steps each as the largest interval, so that a turn has its share of
    SAM steps. Medians over the rounds count. A ratio is taken within each round, as what else the machine does at that
    time slows all turns of a round alike.

    Args:
        methods: what to compare; each interval divides the largest.
        rounds: the number of turns that each method takes.
        data: its first batch is trained on.
    """
    images, labels = data.images[:BATCH], data.labels[:BATCH]
    models = [network(seed=0) for _ in methods]
    optimizers = [method.optimizer(model) for method, model in zip(methods, models, strict=True)]
    steps = max(method.interval for method in methods)

    def turn(model: nn.Module, optimizer: Optimizer) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step(model, optimizer, images, labels)
        return (time.perf_counter() - start) / steps

    table = [[turn(*pair) for pair in zip(models, optimizers, strict=True)] for _ in range(rounds + 1)]
    table = table[1:]  # the first round warms up: caches, buckets, momentum
    columns = list(zip(*table, strict=True))
    return [
        StepTime(
            seconds=statistics.median(column),
            ratio=statistics.median(time / first for time, first in zip(column, columns[0], strict=True)),
        )
        for column in columns
    ]
