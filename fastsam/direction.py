"""Where to climb: along the gradient or, in Momentum-SAM, against the base optimizer's momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["DIRECTIONS", "GRADIENT", "Direction", "check_base", "keeps_other_state", "momentum_of"]

KEYS = ("momentum_buffer", "exp_avg")
"""What torch's optimizers call the momentum in a parameter's state."""

PRECONDITIONED = {
    *("RMSprop", "RMSpropTF", "LaProp", "Adopt", "AdoptBC", "ADOPT", "Lars", "LARS", "Mars", "MARS", "NvNovoGrad"),
    *("AdaFactor", "AdafactorBigVision", "AdaGC", "Amos", "CAME", "Shampoo", "SM3", "StableSPAM"),
}
"""Optimizers, torch's and other packages', whose momentum is of preconditioned or rescaled gradients."""


class Direction(NamedTuple):
    """Which tensor of each parameter to climb along: its gradient, or the momentum."""

    of: Callable[[Tensor], Tensor | None]
    """That of a parameter; None where it has none, and is not perturbed."""
    noun: str
    """What it is called in an error message."""
    sign: Callable[[dict[str, Any]], float]
    """By param group: -1 where the direction leads away from the worst nearby point."""
    two_passes: bool
    """Whether a step first computes a gradient at w, to climb along; else its only gradient is that at w + e_w."""
    rho: float
    """The radius of a call that gives none."""
    alive: Callable[[dict[str, Any]], bool] = lambda group: True
    """By param group: whether what `of` returns is still kept up to date; else the group is not perturbed."""


GRADIENT = Direction(
    attrgetter("grad"),
    "gradient",
    lambda group: -1.0 if group.get("maximize") else 1.0,  # to maximise, the worst point nearby is the lowest
    two_passes=True,
    rho=0.05,
)


def momentum_of(base: Optimizer) -> Direction:
    """The momentum v, as `base` keeps it for each parameter, not preconditioned; climbed against: -v.

    A step takes the weights along -v, and there the gradient is computed: Becker et al. 2024, arXiv 2401.12033. Under
    ``maximize=True`` torch's buffers hold the momentum of the negated gradient, so the sign stays.
    """

    def of(p: Tensor) -> Tensor | None:
        state = base.state.get(p)  # not [p], which would make an entry
        if not state or not p.requires_grad:
            return None
        v: Tensor | None = state.get("exp_avg")
        return state.get("momentum_buffer") if v is None else v

    # SGD leaves its buffers as they are from where a schedule sets momentum=0.
    return Direction(
        of,
        "momentum",
        lambda group: -1.0,
        two_passes=False,
        rho=1.0,
        alive=lambda group: group.get("momentum") != 0 or "betas" in group,
    )


DIRECTIONS: dict[str, Callable[[Optimizer], Direction]] = {"gradient": lambda base: GRADIENT, "momentum": momentum_of}
"""What `direction` may be."""


def keeps_other_state(base: Optimizer, params: Iterable[Tensor]) -> bool:
    """Whether `base` has state for one of the parameters, but no momentum in it."""
    return any((state := base.state.get(p)) and not any(key in state for key in KEYS) for p in params)


def check_base(base: Optimizer) -> None:
    """Raises a ValueError unless `base` says, by its options, that it keeps a momentum."""
    remedy = "use torch.optim.SGD(..., momentum=0.9), Adam or AdamW, or direction='gradient'"
    name = type(base).__name__
    if any(ancestor.__name__ in PRECONDITIONED for ancestor in type(base).__mro__):
        raise ValueError(f"direction='momentum' can't use {name}'s momentum, which is preconditioned: {remedy}")
    if any(ancestor.__name__ == "ZeroRedundancyOptimizer" for ancestor in type(base).__mro__):
        raise ValueError(
            "direction='momentum' can't use ZeroRedundancyOptimizer, which keeps a part of the momentum on each rank: "
            "use direction='gradient'"
        )
    groups = [*base.param_groups, getattr(base, "defaults", {})]
    if any(map(_has_momentum, groups)):
        return
    if any("momentum" in group for group in groups):
        raise ValueError(f"direction='momentum' climbs along the momentum, but {name} has momentum=0: {remedy}")
    raise ValueError(f"direction='momentum' climbs along the momentum, which {name} does not keep: {remedy}")


def _has_momentum(group: dict[str, Any]) -> bool:
    return bool(group.get("momentum")) or "betas" in group
