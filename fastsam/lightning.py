"""Lightning: what it passes to `FusedSAM.step`, and a mixin for its modules. Lightning itself is not imported.

Under automatic optimization a precision plugin calls ``optimizer.step(closure=partial(self._wrap_closure, module,
optimizer, closure))``. The inner closure runs training_step, clears the gradients and goes backward;
``_wrap_closure`` adds on_before_optimizer_step and the clipping. These belong to the gradient that the base optimizer
steps by, so the pass at w does without: clipping by value would turn the ascent. ``optimizer.step()`` under manual
optimization passes the same, around a closure that does nothing. In 16-mixed the plugin runs the closure once and then
calls ``scaler.step(optimizer)``, without a closure.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

from torch import nn

from fastsam.batchnorm import frozen_running_stats

__all__ = ["SAMMixin"]

SCALER_ADVICE = (
    ". Lightning's automatic optimization in 16-mixed runs its closure only once: name fastsam.lightning.SAMMixin "
    "before LightningModule, or use manual optimization as examples/train_lightning.py does"
)
"""For a scaler.step() that came without first_step()."""


class WrappedClosure(NamedTuple):
    """What Lightning wrapped."""

    inner: Callable[[], Any]
    automatic: bool
    """It clears the gradients by itself; a loss of None means that training_step skips the batch."""

    @property
    def empty(self) -> bool:
        """Whether step() was called without a closure, under manual optimization."""
        return getattr(self.inner, "__name__", "") == "do_nothing_closure"


def unwrap(closure: Any) -> WrappedClosure | None:
    """The closure inside of one of Lightning's; None for any other.

    Raises:
        RuntimeError: gradient accumulation under automatic optimization.
    """
    if not isinstance(closure, partial) or getattr(closure.func, "__name__", "") != "_wrap_closure":
        return None
    if not closure.args or not hasattr(module := closure.args[0], "automatic_optimization"):
        return None  # somebody else's function of that name
    inner = closure.args[-1]
    if module.automatic_optimization:
        refuse_accumulation(module.trainer)
    return WrappedClosure(inner, module.automatic_optimization)


def refuse_accumulation(trainer: Any) -> None:
    """Raises a RuntimeError when the trainer adds up gradients over several batches."""
    if (batches := trainer.accumulate_grad_batches) > 1:
        raise RuntimeError(
            f"accumulate_grad_batches={batches} can't work with automatic optimization: Lightning ran the earlier "
            "batches of this step at w and won't run them again at w + e_w. Use manual optimization, as "
            "examples/train_lightning.py does, or larger batches"
        )


class SAMMixin:
    """Lets a step count each batch once, though training_step runs twice; makes 16-mixed work.

    For automatic optimization, named before LightningModule (of ``lightning`` or ``pytorch_lightning``). Of the two
    runs of a SAM step, the one at w is as always. In the one at w + e_w ``self.log`` does nothing and batch
    normalisation leaves its running statistics alone. Metric objects that training_step itself updates see both runs.

    Without the mixin, automatic optimization works in 32-true and bf16-mixed. ``gradient_clip_val`` clips the second
    gradient alone, with it or without.

    Raises:
        TypeError: a subclass names it after LightningModule.

    Example:
        >>> class Digits(SAMMixin, LightningModule):
        ...     def configure_optimizers(self):
        ...         return FusedSAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    """

    trainer: Any
    _second_pass = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(SAMMixin)]:
            if "optimizer_step" in vars(base) and not issubclass(base, SAMMixin):
                raise TypeError(f"name SAMMixin before {base.__name__} in {cls.__name__}'s bases, or it has no effect")

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Lightning's hook: one step, of two passes or, where `interval` says so, of one.

        Args:
            epoch: not used.
            batch_idx: not used.
            optimizer: Lightning's wrapper of a FusedSAM.
            optimizer_closure: runs training_step, clears the gradients and goes backward.

        Raises:
            TypeError: another optimizer.
            RuntimeError: gradient accumulation.
        """
        closure = cast("Callable[[], Any]", optimizer_closure)
        refuse_accumulation(self.trainer)
        sam = optimizer.optimizer
        if not hasattr(sam, "first_pass_context"):
            raise TypeError(f"SAMMixin needs a FusedSAM from configure_optimizers, but got {type(sam).__name__}")
        if not sam._is_sam_step():
            optimizer.step(closure=closure)
            return
        with nullcontext() if sam.first_pass_context is None else sam.first_pass_context():
            loss = closure()
        if loss is None:  # training_step skips this batch
            return
        with sam:
            sam.first_step(zero_grad=True)
            optimizer.step(closure=partial(self._run_second_pass, closure))

    def _run_second_pass(self, closure: Callable[[], Any]) -> Any:
        self._second_pass = True
        try:
            with frozen_running_stats(cast(nn.Module, self)):
                return closure()
        finally:
            self._second_pass = False

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's ``log``, which does nothing in the pass at w + e_w."""
        if not self._second_pass:
            super().log(*args, **kwargs)  # type: ignore[misc]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Lightning's hook. In 16-mixed it unscales the gradients first, where Lightning refuses to clip.

        Args:
            optimizer: the FusedSAM.
            gradient_clip_val: the trainer's.
            gradient_clip_algorithm: the trainer's.
        """
        plugin = self.trainer.precision_plugin
        if not gradient_clip_val or getattr(plugin, "scaler", None) is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)  # type: ignore[misc]
            return
        plugin.scaler.unscale_(optimizer)
        clip = plugin.clip_grad_by_value if gradient_clip_algorithm == "value" else plugin.clip_grad_by_norm
        clip(optimizer, gradient_clip_val)
