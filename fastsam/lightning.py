"""Lightning: what its trainer passes to ``step``, and a mixin for its modules. Lightning itself is not imported.

Under automatic optimization: ``optimizer.step(closure=partial(self._wrap_closure, module, optimizer, closure))``. The
inner closure clears the gradients, runs training_step and goes backward; ``_wrap_closure`` adds
on_before_optimizer_step and the clipping. These belong to the gradient that the base optimizer steps by. The pass at w
does without: clipping by value would change the direction of the ascent. Under manual optimization ``optimizer.step()``
passes the same, around a closure that does nothing. In 16-mixed Lightning runs the closure once, and then
``scaler.step(optimizer)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

from torch import nn

from fastsam.batchnorm import frozen_running_stats
from fastsam.closures import Closure, Passes, Trainer
from fastsam.notices import tell_once

__all__ = ["TRAINER", "SAMMixin"]


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

    Examples:
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
        if _is_forward_only(self.trainer):
            closure()
            return
        _check_automatic(self)
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
            sam._count_step(steps)

    def _run_passes(self, sam: Any, closure: Callable[[], Any], step: Callable[[Callable[[], Any]], None]) -> None:
        if not sam._state.direction.two_passes and sam.is_sam_step:
            sam.first_step()  # in 16-mixed Lightning runs the closure before it calls the optimizer
            step(partial(self._run, sam, closure))
            return
        if not sam.is_sam_step:
            step(partial(self._run, sam, closure))
            return
        with nullcontext() if sam.first_pass_context is None else sam.first_pass_context():
            self._run(sam, closure)
        if not self._skipped:
            sam.first_step(zero_grad=True)
            step(partial(self._run_second_pass, sam, closure))

    def _run_second_pass(self, sam: Any, closure: Callable[[], Any]) -> Any:
        self._second_pass = True
        try:
            with frozen_running_stats(cast(nn.Module, self)):
                return self._run(sam, closure)
        finally:
            self._second_pass = False

    def _run(self, sam: Any, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self._skipped = loss is None  # by training_step
        sam._state.note_loss(loss)  # in 16-mixed the optimizer is not given the closure
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
        with _clippable(sam):
            super().clip_gradients(sam, gradient_clip_val, gradient_clip_algorithm)  # type: ignore[misc]


@contextmanager
def _clippable(sam: Any) -> Iterator[None]:
    """Where Lightning may clip: it refuses to clip for an optimizer that unscales its gradients by itself."""
    sam._step_supports_amp_scaling = False
    try:
        yield
    finally:
        vars(sam).pop("_step_supports_amp_scaling", None)


def _passes_of(closure: Closure) -> Passes | None:
    if not (isinstance(closure, partial) and getattr(closure.func, "__name__", "") == "_wrap_closure"):
        return None
    module: Any = closure.args[0] if closure.args else None
    if not hasattr(module, "automatic_optimization"):  # somebody else's function of that name
        return None
    inner, optimizer = closure.args[-1], closure.args[1]
    sam = getattr(optimizer, "optimizer", optimizer)

    def clipped() -> Any:
        with _clippable(sam):
            return closure()

    if not module.automatic_optimization:
        return Passes(inner, clipped, clipped, computes_nothing=getattr(inner, "__name__", "") == "do_nothing_closure")
    if _is_forward_only(module.trainer):

        def skip() -> None:
            inner()

        return Passes(skip, skip, skip, by_trainer=True)
    in_mixin = getattr(module, "_in_optimizer_step", None)  # None of a module without SAMMixin, which checks itself
    if in_mixin is None:
        _check_automatic(module)
    elif not in_mixin:
        raise RuntimeError(
            f"{type(module).__name__}.optimizer_step goes past SAMMixin's: call super().optimizer_step(epoch, "
            "batch_idx, optimizer, optimizer_closure) in the place of optimizer.step(closure=optimizer_closure)"
        )
    return Passes(inner, clipped, clipped, by_trainer=True)


def _is_forward_only(trainer: Any) -> bool:
    """Whether StochasticWeightAveraging only wants BatchNorm's statistics: there is no gradient then."""
    return bool(trainer.fit_loop._skip_backward)


def _check_automatic(module: Any) -> None:
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


def _advice(in_scaler_step: bool) -> str:
    if not in_scaler_step:
        return ""
    return (
        ". Lightning's automatic optimization in 16-mixed runs its closure only once: it needs "
        "fastsam.lightning.SAMMixin before LightningModule, and super().optimizer_step() where you override it. "
        "Manual optimization needs first_step(), as in examples/train_lightning.py"
    )


def _warn_of_double_counting(sam: object) -> None:
    """Under manual optimization ``step`` counts itself; some code for davda54/sam counts around it too.

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


TRAINER = Trainer(_passes_of, _advice, _warn_of_double_counting)
"""For the core; see `fastsam.closures`."""
