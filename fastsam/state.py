"""What changes in a FusedSAM while it trains."""

from __future__ import annotations

from torch import Tensor

from fastsam.direction import Direction
from fastsam.freshness import ClearingWatch, PlainStep, StaleGradients
from fastsam.perturbation import Perturbation

__all__ = ["State"]


class State:
    """All that changes while training, in one object: wrappers copy an optimizer's attributes and set their own."""

    def __init__(self, backend: str | None, direction: Direction) -> None:
        self.perturbed = False
        self.perturbing = False
        self.perturbation = Perturbation(backend, direction)
        self.stale = StaleGradients()
        self.loss_scale: Tensor | None = None
        self.plain_step: PlainStep | None = None  # what first_step() returned False on
        self.clearing: ClearingWatch | None = None
        self.rehearsed = False
        self.clears = False  # second_step() will, so that there is nothing to mark
        self.watched = False  # a closure that ran once; see `FusedSAM._call_above`
        self.stepping = False  # step() is under way
        self.witness: tuple[Tensor, int] | None = None  # a weight, and its version once it was perturbed
        self.clippable = False  # the gradients, to Lightning
