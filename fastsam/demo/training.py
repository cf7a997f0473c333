"""The training that the demo compares: one loop for SGD and for FusedSAM(SGD), and what is measured on its result."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from fastsam import FusedSAM, frozen_running_stats

LR, MOMENTUM, BATCH = 0.05, 0.9, 64
TRAINING_IMAGES = 1000  # of 1797; the others are the test set
CLASSES = 10
TURN = 20
"""Steps; of every method a whole number of its intervals, in every share of training that counts."""


@dataclass(frozen=True)
class Method:
    """An optimizer to compare: plain SGD where `rho` is None, else FusedSAM around the same SGD.

    Attributes:
        rho: FusedSAM's radius.
        interval: FusedSAM's.
        start: the share of training after which SAM starts.
        part: the share of the batch that the ascent climbs by.
        direction: FusedSAM's.
        weight_decay: SGD's.
    """

    rho: float | None = None
    interval: int = 1
    start: float = 0.0
    part: float = 1.0
    direction: str = "gradient"
    weight_decay: float = 0.0

    @property
    def gradients(self) -> float:
        """Gradients of a whole batch that it computes in a step, on average."""
        if self.rho is None or self.direction == "momentum":
            return 1.0
        return 1.0 + self.part * (1.0 - self.start) / self.interval

    def tuned(self, value: float) -> Method:
        """The same with another value of what is to be tuned: rho, or of plain SGD the weight decay."""
        return replace(self, weight_decay=value) if self.rho is None else replace(self, rho=value)

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        """A new optimizer over the parameters of `model`, for a training of so many steps."""
        sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=self.weight_decay)
        if self.rho is None:
            return sgd
        start = round(self.start * steps)
        return FusedSAM(sgd, self.rho, interval=self.interval, start=start, direction=self.direction)


def step(method: Method, model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> None:
    """One step of either optimizer: SGD calls the closure once, FusedSAM on a SAM step a second time at w + e_w.

    Normalisation layers see each batch once, whole: at w, or where only a part of it climbs at w + e_w.
    """
    partly = round(method.part * len(labels))

    def closure() -> Any:
        optimizer.zero_grad()
        ascending = isinstance(optimizer, FusedSAM) and optimizer.ascending
        n = partly if ascending else len(labels)
        again = isinstance(optimizer, FusedSAM) and optimizer.perturbed and method.direction == "gradient"
        frozen = ascending if method.part < 1 else again
        with frozen_running_stats(model) if frozen else nullcontext():
            loss = cross_entropy(model(images[:n]), labels[:n])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)


def train(
    method: Method,
    data: Data,
    epochs: int,
    seed: int,
    decay: bool = False,
) -> nn.Module:
    """Trains a new network; initial weights and order of the batches follow from `seed`, whatever the method.

    Args:
        method: the optimizer to use.
        data: its training images and labels are learnt.
        epochs: passes over the training images.
        seed: of the initial weights and of the order of the batches.
        decay: lets the learning rate fall to 0 along a cosine; else it is constant.

    Returns:
        The network, in evaluation mode.
    """
    model = data.network(seed)
    steps = epochs * math.ceil(len(data.labels) / BATCH)
    optimizer = method.optimizer(model, steps)
    scheduler = CosineAnnealingLR(optimizer, steps) if decay else None
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.labels), generator=order).split(BATCH):  # type: ignore[no-untyped-call]
            step(method, model, optimizer, data.images[batch], data.labels[batch])
            if scheduler is not None:
                scheduler.step()
    return model.eval()


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
class Data:
    """Images in 10 classes, split at random, and what learns them.

    `images` (n, 1, height, width) and `test_images` are fp32 from 0 to 1, `labels` (n,) and `test_labels` int64. The
    test labels are always the true ones. `network` makes one with initial weights that follow from a seed.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    network: Callable[[int], nn.Module] = network

    def validation(self, share: float = 0.2) -> Data:
        """The training part alone, split again: the last `share` of it, labels as they were learnt, is the test set."""
        kept = round((1 - share) * len(self.labels))
        return replace(
            self,
            images=self.images[:kept],
            labels=self.labels[:kept],
            test_images=self.images[kept:],
            test_labels=self.labels[kept:],
        )


def digits(seed: int, noise: float) -> Data:
    """scikit-learn's 1797 scanned digits, 8x8, of which 1000 are to be learnt; `seed` decides which.

    A share `noise` of the training labels is replaced by wrong ones.
    """
    from sklearn.datasets import load_digits  # here: the benchmarks take a network from this file, and no data

    images, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return split(images, torch.as_tensor(labels), seed, noise, network)


def split(images: Tensor, labels: Tensor, seed: int, noise: float, network: Callable[[int], nn.Module]) -> Data:
    """1000 images at random to learn, the others to test; a share `noise` of the labels to learn made wrong."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    images, labels = images[order], labels[order].long()
    learnt = with_wrong_labels(labels[:TRAINING_IMAGES], noise, generator)
    return Data(images[:TRAINING_IMAGES], learnt, images[TRAINING_IMAGES:], labels[TRAINING_IMAGES:], network)


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


def step_times(methods: Sequence[Method], rounds: int, data: Data) -> list[StepTime]:
    """Times one training step with each of `methods`; ratios are to the first.

    In each round the methods take turns of 20 steps, a whole training to `start`, so that a turn has its share of SAM
    steps. Medians over the rounds count. A ratio is taken within each round, as what else the machine does at that time
    slows all turns of a round alike.

    Args:
        methods: what to compare.
        rounds: the number of turns that each method takes.
        data: its first batch is trained on.
    """
    images, labels = data.images[:BATCH], data.labels[:BATCH]
    models = [data.network(0) for _ in methods]
    optimizers = [method.optimizer(model, TURN) for method, model in zip(methods, models, strict=True)]
    sides = list(zip(methods, models, optimizers, strict=True))

    def turn(first: int, method: Method, model: nn.Module, optimizer: Optimizer) -> float:
        if isinstance(optimizer, FusedSAM):
            optimizer.start = first + round(method.start * TURN)
        start = time.perf_counter()
        for _ in range(TURN):
            step(method, model, optimizer, images, labels)
        return (time.perf_counter() - start) / TURN

    table = [[turn(TURN * r, *side) for side in sides] for r in range(rounds + 1)]
    table = table[1:]  # the first round warms up: caches, buckets, momentum
    columns = list(zip(*table, strict=True))
    return [
        StepTime(
            seconds=statistics.median(column),
            ratio=statistics.median(time / first for time, first in zip(column, columns[0], strict=True)),
        )
        for column in columns
    ]
