"""The passes of a step: how a closure is run at w and at w + e_w, and what trainers pass to ``step`` as one.

Each supported trainer has a module here, accelerate.py, lightning.py or composer.py, that describes its closures in
`TRAINER`. Such a module is imported once somebody has imported the trainer: users need not import it, and nobody else
pays for it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

__all__ = ["Closure", "Passes", "Trainer", "advice", "before_second_step"]

Closure = Callable[..., Any]

MODULES = {
    "fastsam.accelerate": {"accelerate"},
    "fastsam.composer": {"composer"},
    "fastsam.lightning": {"lightning", "pytorch_lightning"},
}
"""Who knows the trainers, and what these are imported as."""


class Passes(NamedTuple):
    """A closure as each pass of a step runs it; each gives the loss."""

    at_w: Closure
    above: Closure
    """At w + e_w."""
    plain: Closure
    """The only pass of a plain step, or of one along the momentum."""
    by_trainer: bool = False
    """It clears the gradients that it finds, and gives None where the step is to be skipped."""
    computes_nothing: bool = False
    """A trainer's stand-in for no closure."""

    @classmethod
    def of(cls, closure: Closure) -> Passes:
        """The passes of a user's closure, or of a trainer's.

        Raises:
            RuntimeError: the trainer would use it in a way that can't work.
            TypeError: it is what a closure returns, or something else that can't be called.
        """
        if not callable(closure):
            raise TypeError(
                f"closure must be a function, but got a {type(closure).__name__}: pass the function itself, as in "
                "sam.step(closure), not what it returns, as in sam.step(closure())"
            )
        for trainer in _imported():
            if (passes := trainer.passes_of(closure)) is not None:
                return passes
        return cls(closure, closure, closure)


class Trainer(NamedTuple):
    """What is known of a trainer."""

    passes_of: Callable[[Closure], Passes | None]
    """The passes of a closure, if it is this trainer's; raises a RuntimeError where it can't work."""
    advice: Callable[[bool], str] = lambda in_scaler_step: ""
    """What to add to the error of a step without a perturbation; whether GradScaler called is given."""
    before_second_step: Callable[[object], None] = lambda sam: None
    """Looks at an optimizer whose `second_step` is called."""


def advice(in_scaler_step: bool) -> str:
    """What to add, for the trainers that are imported, to the error of a step without a perturbation."""
    for trainer in _imported():
        if found := trainer.advice(in_scaler_step):
            return found
    if "transformers.trainer" in sys.modules:
        return ". In the Transformers Trainer: use SAMTrainer, from examples/train_transformers.py"
    if "accelerate" in sys.modules:
        return ". With Accelerate: sam.optimizer.first_step(), as in examples/train_accelerate.py"
    return ""


def before_second_step(sam: object) -> None:
    """Says what an imported trainer has to say of an optimizer whose `second_step` is called."""
    for trainer in _imported():
        trainer.before_second_step(sam)


def _imported() -> list[Trainer]:
    there = [ours for ours, trainers in MODULES.items() if not sys.modules.keys().isdisjoint(trainers)]
    return [cast(Trainer, importlib.import_module(ours).TRAINER) for ours in there]
