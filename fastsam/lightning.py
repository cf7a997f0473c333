"""A mixin for Lightning's modules. Lightning itself is not imported; what it passes to ``step`` is in closures.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

from torch import nn

from fastsam.batchnorm import frozen_running_stats
from fastsam.closures import refuse_accumulation

__all__ = ["SAMMixin"]


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
        if not sam.is_sam_step:
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
