"""The private names of torch that fastsam uses, each with what happens where torch has it no longer.

`import fastsam` survives the loss of any of them; tests/package/test_torch_api.py names the one that is gone.
`grad_mode` uses public names alone; it is here because it too stands for something that torch does slower.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

__all__ = [
    "InstanceNorm",
    "NormBase",
    "compiled",
    "disable_dynamo",
    "found_inf_by",
    "grad_mode",
    "hooks",
    "is_unscaled",
    "label",
    "local_tensor",
    "recording",
    "scale_of",
    "uncompiled",
]

P = ParamSpec("P")
R = TypeVar("R")

# -- gradient mode and profiling ---------------------------------------------------------------------------------------


def grad_mode(enabled: bool) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function run with gradients enabled, or not; torch.no_grad as a decorator takes twice as long.

    Never in torch.inference_mode: what is made there, as the base optimizer's state is, the next step outside of it
    could not write to.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(False):
                    return run(*args, **kwargs)
            before = torch.is_grad_enabled()
            try:  # whatever interrupts from here on
                torch.set_grad_enabled(enabled)
                return function(*args, **kwargs)
            finally:
                torch.set_grad_enabled(before)

        return run

    return decorate


try:
    from torch._C._autograd import _profiler_enabled as recording
except ImportError:  # each label then costs what record_function costs without a profiler: 12 us

    def recording() -> bool:
        """Whether a profiler records."""
        return True


def label(name: str) -> AbstractContextManager[object]:
    """torch.autograd.profiler.record_function, but only while a profiler records."""
    return torch.autograd.profiler.record_function(name) if recording() else nullcontext()


# -- torch.compile -----------------------------------------------------------------------------------------------------

try:
    from torch._compile import _disable_dynamo as disable_dynamo
except ImportError:  # this one imports torch._dynamo with fastsam, which takes seconds
    from torch.compiler import disable as disable_dynamo  # type: ignore[no-redef]


def _set_eval_frame(callback: Any) -> Any:
    return None


def _find_set_eval_frame() -> Callable[[Any], Any]:
    """torch's function that sets what compiles frames and returns what did, if it still does that."""
    try:
        from torch._C._dynamo.eval_frame import set_eval_frame

        before = set_eval_frame(None)
        works = set_eval_frame(before) is None
    except (ImportError, TypeError):
        works = False
    return set_eval_frame if works else _set_eval_frame


set_eval_frame = _find_set_eval_frame()
"""Where torch's is gone, the closures that a compiled function hands to `step` run eagerly; nothing else changes."""


class _Outside(threading.local):
    """What compiles frames where the step under way was called; None where nothing does."""

    callback: Any = None


_outside = _Outside()


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Keeps torch.compile out of `function` and of all that it calls, except what it calls by `compiled`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        callback = set_eval_frame(None)
        before, _outside.callback = _outside.callback, callback
        try:
            return function(*args, **kwargs)
        finally:
            _outside.callback = before
            set_eval_frame(callback)

    if set_eval_frame is _set_eval_frame:
        return disable_dynamo(function)
    return disable_dynamo(run, recursive=False)


def compiled(function: Callable[[], R]) -> R:
    """Calls `function` with the compiler on again, where the `uncompiled` function was called with it on."""
    callback = set_eval_frame(_outside.callback)
    try:
        return function()
    finally:
        set_eval_frame(callback)


# -- optimizers, scalers, modules, DTensors ----------------------------------------------------------------------------


def hooks(optimizer: Optimizer, kind: str) -> Iterable[Callable[..., Any]]:
    """The hooks of a kind ("step_pre", "load_state_dict_post", ...), none where torch keeps them elsewhere."""
    found: dict[int, Callable[..., Any]] = getattr(optimizer, f"_optimizer_{kind}_hooks", {})
    return found.values()


def scale_of(scaler: GradScaler) -> Tensor | None:
    """The scaler's scale, 0-d, the scaler's own tensor; get_scale(), which waits for the device, where it is gone."""
    if not hasattr(scaler, "_get_scale_async"):
        return torch.tensor(scaler.get_scale())
    return scaler._get_scale_async()


def is_unscaled(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether unscale_ was called on the optimizer since the last update(); False where torch does not tell."""
    states = getattr(scaler, "_per_optimizer_states", {})
    stage = states.get(id(optimizer), {}).get("stage")
    return getattr(stage, "name", "") == "UNSCALED"


def found_inf_by(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether unscale_ found a gradient that is not finite; False where torch does not tell. Waits for the device."""
    states = getattr(scaler, "_per_optimizer_states", {})
    return any(map(bool, states.get(id(optimizer), {}).get("found_inf_per_device", {}).values()))


def local_tensor(t: Any) -> Tensor:
    """The shard of a DTensor on this rank, as an object that stays the same."""
    # Not to_local(): of a parameter it gives another tensor object, and takes 40 times as long.
    shard: Tensor | None = getattr(t, "_local_tensor", None)
    return t.to_local() if shard is None else shard


NormBase: tuple[type[nn.Module], ...]
InstanceNorm: tuple[type[nn.Module], ...]
try:
    from torch.nn.modules.batchnorm import _NormBase
    from torch.nn.modules.instancenorm import _InstanceNorm

    NormBase, InstanceNorm = (_NormBase,), (_InstanceNorm,)
except ImportError:  # lazy layers and those of other packages are then not seen
    InstanceNorm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    NormBase = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, *InstanceNorm)
