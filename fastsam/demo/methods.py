"""The methods that the demo compares, and what was chosen for each: rho, or of plain SGD the weight decay."""

from __future__ import annotations

from typing import NamedTuple

from fastsam.demo.training import Method

NOISE = 0.4
"""The share of wrong labels."""


class Condition(NamedTuple):
    """Under which a network is trained."""

    noise: float
    decay: bool  # of the learning rate, along a cosine


CONDITIONS = (Condition(0.0, False), Condition(NOISE, False), Condition(NOISE, True))

SGD, SAM, MOMENTUM_SAM = "SGD", "SAM", "Momentum-SAM"
METHODS = {
    SGD: Method(),
    "SGD, weight decay": Method(weight_decay=0.01),
    SAM: Method(0.2),
    "SAM, interval=5": Method(0.5, interval=5),
    "SAM, quarter of the batch": Method(0.2, part=0.25),
    "SAM, last 30 %": Method(0.2, start=0.7),
    "SAM, last half, interval=2": Method(0.2, start=0.5, interval=2),
    MOMENTUM_SAM: Method(1.0, direction="momentum"),
}
"""By name; with values that the search starts from."""

RADII = (0.05, 0.1, 0.2, 0.4, 0.8)
GRIDS = {
    "SGD, weight decay": (0.001, 0.003, 0.01, 0.02, 0.03),
    "SAM": RADII,
    "SAM, interval=5": (0.1, 0.2, 0.4, 0.8, 1.2),
    "SAM, quarter of the batch": RADII,
    "SAM, last 30 %": RADII,
    "SAM, last half, interval=2": RADII,
    "Momentum-SAM": (0.2, 0.4, 0.8, 1.1, 1.4),
}
"""What is searched, on a validation split of the training part: `python -m bench.accuracy --tune`."""

Values = dict[str, tuple[float, ...]]
"""What was chosen for each method, under each of `CONDITIONS`, or of the last of them."""

CHOSEN: Values = {
    "SGD, weight decay": (0.003, 0.01, 0.003),
    "SAM": (0.2, 0.2, 0.05),
    "SAM, interval=5": (0.4, 0.8, 0.4),
    "SAM, quarter of the batch": (0.4, 0.4, 0.1),
    "SAM, last 30 %": (0.4, 0.8, 0.4),
    "SAM, last half, interval=2": (0.4, 0.8, 0.4),
    "Momentum-SAM": (0.8, 1.4, 1.1),
}
"""On digits, by `python -m bench.accuracy --tune`, with seeds that are used for nothing else."""


def tuned(chosen: Values, condition: Condition) -> dict[str, Method]:
    """The methods with what was chosen for a condition, by name."""
    column = CONDITIONS.index(condition) - len(CONDITIONS)
    return {name: method.tuned(chosen[name][column]) if name in chosen else method for name, method in METHODS.items()}
