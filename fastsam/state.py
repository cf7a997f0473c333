"""What changes in a FusedSAM while it trains."""

from __future__ import annotations

import numbers
from enum import Enum, auto
from typing import Any

from torch import Tensor

from fastsam.direction import Direction
from fastsam.freshness import ClearingWatch, LeftGradients, StaleGradients
from fastsam.perturbation import Perturbation

__all__ = ["Phase", "State"]


class Phase(Enum):
    """Where the weights are."""

    AT_W = auto()
    CLIMBING = auto()
    """perturb is writing w + e_w."""
    INTERRUPTED = auto()
    """A signal handler restored w while perturb was writing, which it still does when the handler is done."""
    ABOVE = auto()
    """At w + e_w."""


class State:
    """All that changes while training, in one object: wrappers copy an optimizer's attributes and set their own.

    Attributes:
        phase: where the weights are. It is stored before and after every write to them.
        perturbation: the buckets, and the last ascent.
        stale: the gradients that are done with.
        between: the gradients that `first_step` left; None where it cleared them, or where no step is under way.
        clearing: watches the closure that is running; None where nothing needs to be found out.
        examined: whether the first step was looked at whose gradients could be there by mistake.
        stepping: whether `step` is under way.
        will_clear: whether `second_step` will clear the gradients, so that none needs a mark.
        perturbed_loss: the loss at w + e_w of the last step with a closure, a tensor or a number.
    """

    def __init__(self, backend: str | None, direction: Direction) -> None:
        self.phase = Phase.AT_W
        self.perturbation = Perturbation(backend, direction)
        self.stale = StaleGradients()
        self.between: LeftGradients | None = None
        self.clearing: ClearingWatch | None = None
        self.examined = False
        self.stepping = False
        self.will_clear = False
        self.perturbed_loss: Any = None

    @property
    def perturbed(self) -> bool:
        """Whether the weights are at w + e_w, or on their way there."""
        return self.phase is Phase.ABOVE or self.phase is Phase.CLIMBING

    @property
    def direction(self) -> Direction:
        """What the ascent climbs along."""
        return self.perturbation.direction

    def note_loss(self, loss: object) -> None:
        """Keeps the loss that a pass gave, where that was at w + e_w."""
        if self.perturbed and isinstance(loss, Tensor | numbers.Real):  # of a tuple it would keep the graph too
            self.perturbed_loss = loss.detach() if isinstance(loss, Tensor) else loss
