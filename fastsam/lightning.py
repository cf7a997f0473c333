"""A mixin for Lightning's modules. Lightning itself is not imported; what it passes to ``step`` is in closures.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

from torch import nn

from fastsam.batchnorm import frozen_running_stats
from fastsam.closures import check_lightning, is_forward_only

__all__ = ["SAMMixin"]


class SAMMixin:
    """Lets a step count each batch once, though training_step runs twice; makes 16-mixed work.

    For automatic optimization, named before LightningModule (of ``lightning`` or ``pytorch_lightning``). Of the two
    runs of a SAM step, the one at w logs and counts as always. In the one at w + e_w ``self.log`` does nothing and
    batch normalisation leaves its running statistics alone. Metric objects that training_step itself updates see both
    runs, and the ``outputs`` of on_train_batch_end are those of the second. ``self.clip_gradients`` works in every
    precision, under manual optimization too.

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
    _in_optimizer_step = False
    _second_pass = False
    _skipped = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(SAMMixin)]:
            if "optimizer_step" in vars(base) and not issubclass(base, SAMMixin):
                raise TypeError(f"name SAMMixin before {base.__name__} in {cls.__name__}'s bases, or it has no effect")

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Lightning's hook: one step, of two passes or, on a plain step or along the momentum, of one.

        Args:
            epoch: not used.
            batch_idx: not used.
            optimizer: Lightning's wrapper of a FusedSAM.
            optimizer_closure: runs training_step, clears the gradients and goes backward.

        Raises:
            TypeError: another optimizer.
            RuntimeError: gradient accumulation, or a training_step that takes an iterator.
        """
        closure = cast("Callable[[], Any]", optimizer_closure)
        if is_forward_only(self.trainer):
            closure()
            return
        check_lightning(self)
        sam = optimizer.optimizer
        if not hasattr(sam, "first_pass_context"):
            raise TypeError(f"SAMMixin needs a FusedSAM from configure_optimizers, but got {type(sam).__name__}")
        steps = sam._steps
        self._in_optimizer_step = True
        try:
            with sam:
                self._run_passes(sam, closure, partial(super().optimizer_step, epoch, batch_idx, optimizer))  # type: ignore[misc]
        finally:
            self._in_optimizer_step = self._skipped = False
        if sam._steps == steps:  # skipped where Lightning does not tell the optimizer
            sam._count_step()

    def _run_passes(self, sam: Any, closure: Callable[[], Any], step: Callable[[Callable[[], Any]], None]) -> None:
        if sam.direction == "momentum" and sam.is_sam_step:
            sam.first_step()  # in 16-mixed Lightning runs the closure before it calls the optimizer
            step(partial(self._run, closure))
            return
        if not sam.is_sam_step:
            step(partial(self._run, closure))
            return
        with nullcontext() if sam.first_pass_context is None else sam.first_pass_context():
            self._run(closure)
        if not self._skipped:
            sam.first_step(zero_grad=True)
            step(partial(self._run_second_pass, closure))

    def _run_second_pass(self, closure: Callable[[], Any]) -> Any:
        self._second_pass = True
        try:
            with frozen_running_stats(cast(nn.Module, self)):
                return self._run(closure)
        finally:
            self._second_pass = False

    def _run(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self._skipped = loss is None  # by training_step
        return loss

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's ``log``, which does nothing in the pass at w + e_w."""
        if not self._second_pass:
            super().log(*args, **kwargs)  # type: ignore[misc]

    def clip_gradients(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Lightning's ``clip_gradients``. In 16-mixed it unscales the gradients first, where Lightning refuses to clip.

        Args:
            optimizer: the FusedSAM, or Lightning's wrapper of it.
            gradient_clip_val: bound of the norm or of each value; None takes the trainer's.
            gradient_clip_algorithm: "norm" or "value"; None takes the trainer's.
        """
        if self._skipped:
            return
        sam = getattr(optimizer, "optimizer", optimizer)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and (gradient_clip_val or self.trainer.gradient_clip_val):
            scaler.unscale_(sam)
        with sam._clippable():
            super().clip_gradients(sam, gradient_clip_val, gradient_clip_algorithm)  # type: ignore[misc]
