"""Where to climb: along the gradient or, in Momentum-SAM, against the base optimizer's momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer, RMSprop

__all__ = ["DIRECTIONS", "GRADIENT", "Direction", "check_base", "keeps_other_state", "momentum_of"]

DIRECTIONS = ("gradient", "momentum")
"""What `direction` may be."""

KEYS = ("momentum_buffer", "exp_avg")
"""What torch's optimizers call the momentum in a parameter's state."""


class Direction(NamedTuple):
    """One tensor for each parameter, whose sum over the parameters is the direction of an ascent."""

    of: Callable[[Tensor], Tensor | None]
    """That of a parameter; None where it has none, and is not perturbed."""
    noun: str
    """What it is called in an error message."""
    sign: float


GRADIENT = Direction(attrgetter("grad"), "gradient", 1.0)


def momentum_of(base: Optimizer) -> Direction:
    """The momentum v, as `base` keeps it for each parameter, not preconditioned; climbed against: -v.

    A step takes the weights along -v, so there they are looked at: Becker et al. 2024, arXiv 2401.12033.
    """

    def of(p: Tensor) -> Tensor | None:
        state = base.state.get(p)  # not [p], which would make an entry
        if not state or not p.requires_grad:
            return None
        v: Tensor | None = state.get("exp_avg")
        return state.get("momentum_buffer") if v is None else v

    return Direction(of, "momentum", -1.0)


def keeps_other_state(base: Optimizer, params: Iterable[Tensor]) -> bool:
    """Whether `base` has state for one of the parameters, but no momentum in it."""
    return any((state := base.state.get(p)) and not any(key in state for key in KEYS) for p in params)


def check_base(base: Optimizer) -> None:
    """Raises a ValueError unless `base` says, by its options, that it keeps a momentum."""
    remedy = "use torch.optim.SGD(..., momentum=0.9), Adam or AdamW, or direction='gradient'"
    name = type(base).__name__
    if isinstance(base, RMSprop):
        raise ValueError(f"direction='momentum' can't use RMSprop's momentum, which is preconditioned: {remedy}")
    groups = [*base.param_groups, base.defaults]
    if any(map(_has_momentum, groups)):
        return
    if any("momentum" in group for group in groups):
        raise ValueError(f"direction='momentum' climbs along the momentum, but {name} has momentum=0: {remedy}")
    raise ValueError(f"direction='momentum' climbs along the momentum, which {name} does not keep: {remedy}")


def _has_momentum(group: dict[str, Any]) -> bool:
    return bool(group.get("momentum")) or "betas" in group
