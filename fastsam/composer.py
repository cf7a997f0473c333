"""MosaicML Composer: its SAM, an Algorithm for the Trainer, and its SAMOptimizer, by the same names and arguments.

Composer calls an optimizer's ``step`` with a closure of its own kind. ``closure(ddp_sync=False)`` computes a gradient
that stays on its rank; ``closure(loss_dict={})`` keeps the loss out of the logs. Either returns the loss, or None when
a gradient overflowed on any rank; the gradients are unscaled by then.

Without Composer `SAMOptimizer` works, and `SAM` says what to install.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from fastsam.closures import Closure, Passes, Trainer
from fastsam.direction import GRADIENT
from fastsam.notices import tell_once
from fastsam.optimizer import FusedSAM
from fastsam.options import OPTIONS, SETTINGS

try:
    from composer.core import Algorithm, Event, Time, TimeUnit
    from composer.trainer._scaler import ClosureGradScaler
    from composer.utils import dist, ensure_tuple
except ImportError as error:
    _missing: ImportError | None = error
    Algorithm = object
else:
    _missing = None

if TYPE_CHECKING:
    from composer.core import State
    from composer.loggers import Logger

__all__ = ["SAM", "TRAINER", "SAMOptimizer"]

_NEVER = sys.maxsize
"""A start that does not come."""


class SAMOptimizer(FusedSAM):
    """`FusedSAM` with the closures of Composer's Trainer; `SAM` puts it around the Trainer's optimizer.

    On a SAM step each rank climbs by its own gradient, which is not synchronised; the second gradient is. Since w is
    restored to the bit, the replicas stay equal.

    Args:
        base_optimizer: the optimizer to wrap.
        rho: radius of the neighbourhood, >= 0. Composer's method card advises to scale it with `interval`. With
            direction="momentum", 0.05 stands for that direction's own default, 1.0.
        epsilon: added to the gradient norm, >= 0.
        interval: step k, counted from 0, is a SAM step when (k + 1) is a multiple of it.
        **kwargs: `adaptive`, `backend`, `flatten_parameters`, `start` or `direction`, as `FusedSAM` has them.

    Raises:
        TypeError, ValueError, RuntimeError: as `FusedSAM`.

    Note:
        Departures from Composer's: w is restored by a copy, not by a subtraction; a loss of exactly 0 is a step; the
        state dict holds the base optimizer's state and the count of steps, so training resumes where it was.
    """

    _step_supports_amp_closure = True
    """The Trainer then passes closures under amp_fp16 too, by its ClosureGradScaler."""

    def __init__(
        self,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        epsilon: float = 1.0e-12,
        interval: int = 1,
        **kwargs: Any,
    ) -> None:
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(
                f"base_optimizer must be an optimizer, but got {base_optimizer!r}; the form that takes parameters and "
                "an optimizer class is fastsam.FusedSAM's"
            )
        for name in {"first_pass_context", "grad_scaler"} & kwargs.keys():
            raise TypeError(
                f"{name} is not for SAMOptimizer: the Trainer's closures see to synchronising and to scaling. Leave it "
                "out, or use fastsam.FusedSAM in a loop of your own"
            )
        if kwargs.get("direction") != "momentum" or rho != GRADIENT.rho:
            kwargs["rho"] = rho  # else FusedSAM takes the one that is right along the momentum
        super().__init__(base_optimizer, epsilon=epsilon, interval=interval, **kwargs)

    @property
    def global_step(self) -> int:
        """Steps done, those that a loss scaler skipped included. Part of the state dict."""
        return self._steps

    @global_step.setter
    def global_step(self, steps: int) -> None:
        self._steps = steps

    def _passes(self, closure: Closure) -> Passes:
        return Passes(partial(closure, ddp_sync=False), partial(closure, loss_dict={}), closure, by_trainer=True)


class SAM(Algorithm):  # type: ignore[misc]  # of any type where Composer is not installed
    """Sharpness-aware minimization (Foret et al. 2021) in Composer's Trainer, by `SAMOptimizer`.

    Wraps the Trainer's optimizers before a checkpoint is loaded, so that their state and the loss scale are loaded too.
    On SAM steps it logs ``loss/train/perturbed``, the loss at w + e_w, beside the Trainer's ``loss/train/total``, at w.

    Args:
        rho: radius of the neighbourhood, >= 0.
        epsilon: added to the gradient norm, >= 0.
        interval: SAM runs on one step in `interval`; the others are plain steps. Scale `rho` with it.
        start: from when on SAM runs: a number of steps, or one of Composer's time strings, as "0.7dur" or "10ep".
        **kwargs: `adaptive`, `backend`, `flatten_parameters` or `direction`, as `FusedSAM` has them.

    Raises:
        ImportError: Composer is not installed.
        TypeError, ValueError: an argument that is out of range.

    Examples:
        >>> Trainer(model=model, optimizers=optimizer, algorithms=[SAM(rho=0.05)], ...)
    """

    def __init__(
        self, rho: float = 0.05, epsilon: float = 1.0e-12, interval: int = 1, start: int | str = 0, **kwargs: Any
    ) -> None:
        if _missing is not None:
            raise ImportError(
                f"fastsam.composer.SAM needs MosaicML Composer, which can't be imported ({_missing}): pip install "
                "mosaicml"
            ) from _missing
        OPTIONS["rho"](rho, "rho")
        OPTIONS["epsilon"](epsilon, "epsilon")
        SETTINGS["interval"](interval, "interval")
        self.rho = rho
        self.epsilon = epsilon
        self.interval = interval
        self.start: Any = _time(start) if isinstance(start, str) else SETTINGS["start"](start, "start")
        self.options = kwargs

    def __repr__(self) -> str:
        return f"SAM(rho={self.rho}, epsilon={self.epsilon}, interval={self.interval}, start={self.start})"

    def match(self, event: Event, state: State) -> bool:
        """Whether to run at this event: before a checkpoint is loaded, and after, in case that made new optimizers.

        Also after each batch, to log; and before each batch where `start` is a time.
        """
        return event in (Event.BEFORE_LOAD, Event.AFTER_LOAD, Event.BATCH_END) or (
            event is Event.BATCH_START and not isinstance(self.start, int)
        )

    def apply(self, event: Event, state: State, logger: Logger | None) -> int | None:
        """Wraps what optimizers are not wrapped yet, and takes a loss scaler that serves closures; or logs."""
        if event is Event.BATCH_END:
            if logger is not None:
                _log_perturbed_loss(state, logger)
            return None
        if event is Event.BATCH_START:
            for optimizer in ensure_tuple(state.optimizers):
                if isinstance(optimizer, SAMOptimizer):
                    optimizer.start = 0 if self._has_come(state) else _NEVER
            return None
        start = self.start if isinstance(self.start, int) else _NEVER
        state.optimizers = tuple(
            optimizer
            if isinstance(optimizer, SAMOptimizer)
            else SAMOptimizer(optimizer, self.rho, self.epsilon, self.interval, start=start, **self.options)
            for optimizer in ensure_tuple(state.optimizers)
        )
        if not isinstance(state.scaler, ClosureGradScaler):
            state.scaler = ClosureGradScaler()
        return None

    def _has_come(self, state: State) -> bool:
        """Whether the time is `start`, or later."""
        in_parts = self.start.unit == TimeUnit.DURATION
        elapsed = state.get_elapsed_duration() if in_parts else state.timestamp.get(self.start.unit)
        return elapsed is not None and bool(elapsed >= self.start)


def _log_perturbed_loss(state: State, logger: Logger) -> None:
    """As the Trainer logs the loss at w: the mean over the ranks, by the step's number."""
    for optimizer in ensure_tuple(state.optimizers):
        # Along the momentum the Trainer's own is at w + e_w. Where a gradient overflowed, it did for all ranks.
        if isinstance(optimizer, SAMOptimizer) and optimizer.direction == "gradient":
            if (loss := optimizer.perturbed_loss) is None:
                continue
            mean = state.device.tensor_to_device(torch.as_tensor(loss, dtype=torch.float32)) / dist.get_world_size()
            dist.all_reduce(mean)
            logger.log_metrics({"loss/train/perturbed": mean.item()}, step=state.previous_timestamp.batch.value)


def _time(start: str) -> Any:
    try:
        return Time.from_timestring(start)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"start must be a number of steps or one of Composer's time strings, as '0.7dur', but got {start!r}"
        ) from error


def _passes_of(closure: Closure) -> None:
    """FusedSAM itself trains by a closure of the Trainer's, but badly."""
    if getattr(closure, "__module__", None) == "composer.trainer.trainer":
        tell_once(
            "composer",
            "FusedSAM in Composer's Trainer logs the losses of both passes added up, and synchronises both "
            "gradients: use fastsam.composer.SAM, or fastsam.composer.SAMOptimizer",
        )


TRAINER = Trainer(_passes_of)
"""For the core; see `fastsam.closures`."""
