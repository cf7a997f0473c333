"""The passes of a step: how a closure is run at w and at w + e_w, and what trainers pass to ``step`` as one.

Lightning, under automatic optimization: ``optimizer.step(closure=partial(self._wrap_closure, module, optimizer,
closure))``. The inner closure clears the gradients, runs training_step and goes backward; ``_wrap_closure`` adds
on_before_optimizer_step and the clipping. These belong to the gradient that the base optimizer steps by, so the pass at
w does without: clipping by value would turn the ascent. Under manual optimization ``optimizer.step()`` passes the same,
around a closure that does nothing. In 16-mixed Lightning runs the closure once, and then ``scaler.step(optimizer)``.

Composer's closures are in fastsam.composer.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from fastsam.notices import tell_once

__all__ = ["Closure", "Passes", "advice", "check_lightning", "is_forward_only", "warn_of_double_counting"]

Closure = Callable[..., Any]


class Passes(NamedTuple):
    """A closure as each pass of a step runs it; each gives the loss."""

    at_w: Closure
    above: Closure
    """At w + e_w."""
    plain: Closure
    """The only pass of a step that `interval` leaves plain."""
    by_trainer: bool = False
    """It clears the gradients that it finds, and gives None where the step is to be skipped."""
    empty: bool = False
    """It computes nothing: a trainer's stand-in for no closure."""

    @classmethod
    def of(cls, closure: Closure) -> Passes:
        """The passes of a user's closure, or of Lightning's.

        Raises:
            RuntimeError: as `check_lightning`; or a module goes past SAMMixin.
        """
        if isinstance(closure, partial) and getattr(closure.func, "__name__", "") == "_wrap_closure":
            module = closure.args[0] if closure.args else None
            if hasattr(module, "automatic_optimization"):  # else somebody else's function of that name
                return cls._of_lightning(closure, module)
        if getattr(closure, "__module__", None) == "composer.trainer.trainer":
            tell_once(
                "composer",
                "FusedSAM in Composer's Trainer logs the losses of both passes added up, and synchronises both "
                "gradients: use fastsam.composer.SAM, or fastsam.composer.SAMOptimizer",
            )
        return cls(closure, closure, closure)

    @classmethod
    def _of_lightning(cls, closure: partial[Any], module: Any) -> Passes:
        inner = closure.args[-1]
        if not module.automatic_optimization:
            return cls(inner, closure, closure, empty=getattr(inner, "__name__", "") == "do_nothing_closure")
        if is_forward_only(module.trainer):

            def skip() -> None:
                inner()

            return cls(skip, skip, skip, by_trainer=True)
        in_mixin = getattr(module, "_in_optimizer_step", None)  # None of a module without SAMMixin, which checks itself
        if in_mixin is None:
            check_lightning(module)
        elif not in_mixin:
            raise RuntimeError(
                f"{type(module).__name__}.optimizer_step goes past SAMMixin's: call super().optimizer_step(epoch, "
                "batch_idx, optimizer, optimizer_closure) in the place of optimizer.step(closure=optimizer_closure)"
            )
        return cls(inner, closure, closure, by_trainer=True)


def is_forward_only(trainer: Any) -> bool:
    """Whether Lightning's StochasticWeightAveraging only wants BatchNorm's statistics: there is no gradient then."""
    return bool(trainer.fit_loop._skip_backward)


def check_lightning(module: Any) -> None:
    """Checks what automatic optimization would run at w and at w + e_w.

    Raises:
        RuntimeError: the trainer adds up gradients over several batches; or training_step fetches its batches.
    """
    if (batches := module.trainer.accumulate_grad_batches) > 1:
        raise RuntimeError(
            f"accumulate_grad_batches={batches} can't work with automatic optimization: Lightning ran the earlier "
            "batches of this step at w and won't run them again at w + e_w. Use manual optimization, as "
            "examples/train_lightning.py does, or larger batches"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise RuntimeError(
            "training_step(dataloader_iter) can't work with automatic optimization: its second run, at w + e_w, would "
            "fetch another batch. Use training_step(batch, batch_idx), or manual optimization"
        )


def warn_of_double_counting(sam: object) -> None:
    """Under Lightning's manual optimization ``step`` counts itself; some code for davda54/sam counts around it too.

    Args:
        sam: a FusedSAM, or Lightning's wrapper, in which Lightning's loop puts its hooks.
    """
    loop = getattr(vars(sam).get("_on_before_step"), "__self__", None)
    if loop is not None and loop.optim_step_progress.total.ready > loop.optim_step_progress.total.completed:
        tell_once(
            "double counting",
            "_on_before_step() was called before second_step(), which calls it itself: global_step counts each step "
            "twice, and max_steps ends training after half of them. Leave _on_before_step() and _on_after_step() out",
        )


def advice(in_scaler_step: bool) -> str:
    """What to add, for the trainers that are imported, to the error of a step without a perturbation."""
    if in_scaler_step and ("lightning" in sys.modules or "pytorch_lightning" in sys.modules):
        return (
            ". Lightning's automatic optimization in 16-mixed runs its closure only once: it needs "
            "fastsam.lightning.SAMMixin before LightningModule, and super().optimizer_step() where you override it. "
            "Manual optimization needs first_step(), as in examples/train_lightning.py"
        )
    if "transformers.trainer" in sys.modules:
        return ". In the Transformers Trainer: use SAMTrainer, from examples/train_transformers.py"
    if "accelerate" in sys.modules:
        return ". With Accelerate: sam.optimizer.first_step(), as in examples/train_accelerate.py"
    return ""
