"""Batch normalisation's running statistics: which of SAM's two passes updates them.

Both passes of a SAM step run in training mode, so both update the running mean and variance, the second with the
statistics at w + e_w. Freeze them for one pass to count each batch once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastsam.notices import tell_once
from fastsam.torch_api import InstanceNorm, NormBase

__all__ = ["disable_running_stats", "enable_running_stats", "frozen_running_stats"]

_SAVED = "_fastsam_running_stats"
"""The attribute that a frozen module keeps its (momentum, track_running_stats) in."""


def disable_running_stats(model: nn.Module) -> None:
    """Stops every normalisation layer of a model from updating its running statistics.

    Layers still normalise by the batch in training mode, and by the statistics they have in evaluation mode. Calling it
    twice changes nothing. ``num_batches_tracked`` stops as well.

    Args:
        model: any module; its BatchNorm, SyncBatchNorm and InstanceNorm layers are frozen. Scripted ones can't be: a
            warning says so.
    """
    _disable(model)


def enable_running_stats(model: nn.Module) -> None:
    """Undoes `disable_running_stats`; layers that are not frozen stay as they are.

    Args:
        model: the same module, or a copy of it.
    """
    _enable(model.modules())


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """`disable_running_stats` for the length of a ``with`` block; may be nested.

    Args:
        model: any module.

    Examples:
        >>> sam.first_step(zero_grad=True)
        >>> with fastsam.frozen_running_stats(model):
        ...     loss_fn(model(x), y).backward()
        >>> sam.second_step(zero_grad=True)
    """
    frozen = _disable(model)
    try:
        yield
    finally:
        _enable(frozen)


def _enable(modules: Iterable[nn.Module]) -> None:
    """Thaws those of the modules that are frozen; not what is inside of them."""
    for module in modules:
        if _SAVED in module.__dict__:
            module.momentum, module.track_running_stats = module.__dict__.pop(_SAVED)


def _disable(model: nn.Module) -> list[nn.Module]:
    """Freezes what is not frozen yet, and returns that."""
    frozen = []
    for module in model.modules():
        if isinstance(module, NormBase) and _SAVED not in module.__dict__:
            module.__dict__[_SAVED] = (module.momentum, module.track_running_stats)
            module.momentum = 0.0  # type: ignore[assignment]
            # Without tracking, num_batches_tracked rests too. InstanceNorm has no use for that count, and would take
            # a layer that does not track for one that normalises by the batch in evaluation mode.
            if not isinstance(module, InstanceNorm):
                module.track_running_stats = False  # type: ignore[assignment]
            frozen.append(module)
        elif isinstance(module, torch.jit.ScriptModule) and "Norm" in module.original_name and _tracks(module):
            tell_once(
                "scripted",
                f"{module.original_name} in a scripted model can't be frozen: TorchScript has its momentum built in, "
                "and both passes update its running statistics. Script only the parts of the model without it",
            )
    return frozen


def _tracks(module: nn.Module) -> bool:
    return any(name == "running_mean" for name, _ in module.named_buffers(recurse=False))
