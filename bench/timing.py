"""The one way in which everything here is timed: contestants take turns, so what slows the machine slows them all."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

L2_FLUSH_BYTES = 256 * 2**20
CYCLES_PER_SECOND = 2e9  # of a GPU, at the most
MAX_HEAD_START = 0.1  # seconds


class Timed(Protocol):
    def prepare(self) -> None:
        """What a measurement needs beforehand; not timed."""

    def run(self) -> None:
        """What is timed."""


@dataclass
class Samples:
    """Seconds, one entry a round. `device` and `host`, each without the other, stay empty on CPU."""

    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    @property
    def best(self) -> list[float]:
        """The device's own time where it is known, wall time otherwise."""
        return self.device or self.wall


class CpuClock:
    def measure(self, contestant: Timed, samples: Samples) -> None:
        contestant.prepare()
        start = time.perf_counter_ns()
        contestant.run()
        samples.wall.append((time.perf_counter_ns() - start) * 1e-9)


class CudaClock:
    """Wall time with the device idle at both ends, then the device's own time.

    For the latter the device sleeps first, so that the host is ahead with its launches and gaps between kernels are the
    device's, not Python's; the host's time is taken meanwhile. The L2 cache is flushed before each.
    """

    def __init__(self) -> None:
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def measure(self, contestant: Timed, samples: Samples) -> None:
        contestant.prepare()
        self.flush.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        contestant.run()
        torch.cuda.synchronize()
        wall = (time.perf_counter_ns() - start) * 1e-9
        samples.wall.append(wall)

        contestant.prepare()
        self.flush.zero_()
        torch.cuda._sleep(int(min(1.5 * wall, MAX_HEAD_START) * CYCLES_PER_SECOND))
        self.start.record()
        start = time.perf_counter_ns()
        contestant.run()
        samples.host.append((time.perf_counter_ns() - start) * 1e-9)
        self.end.record()
        torch.cuda.synchronize()
        samples.device.append(self.start.elapsed_time(self.end) * 1e-3)


def interleave(
    contestants: Mapping[str, Timed],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    on_turn: Callable[[str], None] = lambda name: None,
) -> dict[str, Samples]:
    """Times `contestants` in turn, in another order each round, until `seconds` are over.

    The first round is thrown away: it touches fresh memory. At least `min_rounds` follow whatever they take.
    """
    clock = CudaClock() if device.type == "cuda" else CpuClock()
    samples = {name: Samples() for name in contestants}
    order = list(contestants)
    shuffle = random.Random(0).shuffle
    start = time.monotonic()
    for turn in range(1 + max_rounds):
        if turn > min_rounds and time.monotonic() - start > seconds:
            break
        shuffle(order)
        for name in order:
            on_turn(name)
            clock.measure(contestants[name], Samples() if turn == 0 else samples[name])
    return samples


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
