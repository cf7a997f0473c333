"""GradScaler: the base optimizer's step with gradients that carry a loss scale.

rho * g / ||g|| does not feel the scale, so the first gradient is never unscaled; only the second one is. The scaler
leaves that to optimizers with ``_step_supports_amp_scaling``: it calls their ``step`` with two attributes set, which it
deletes afterwards. ``found_inf`` tells (0-d tensor, not 0) that a gradient is not finite, ``grad_scale`` is what to
divide by (None: `unscale_` did it already).
"""

from __future__ import annotations

import inspect
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from fastsam.torch_api import found_inf_by, is_unscaled, scale_of

__all__ = [
    "check_first_gradient",
    "clear_scaler_attributes",
    "in_scaler_step",
    "loss_scale",
    "remember_scaler",
    "step",
    "unscale_for_hooks",
]


def loss_scale(scaler: GradScaler | None) -> Tensor | None:
    """The scale that the gradients carry now, a copy, 0-d, on the scaler's device; None where it isn't known."""
    scale = scale_of(scaler) if scaler is not None and scaler.is_enabled() else None
    return None if scale is None else scale.clone()


def check_first_gradient(scaler: GradScaler | None, sam: Optimizer, base: Optimizer) -> None:
    """Raises a RuntimeError when the gradients at w were unscaled: the scaler would take the second ones for it too."""
    scaler = scaler or _stepped_by.get(sam)
    if _is_unscaled(scaler, sam) or _is_unscaled(scaler, base):
        raise RuntimeError(
            "scaler.unscale_() was called before the second backward: it works once a step, and the second gradients "
            "need it (the first ones need none). Call it after first_step() and the second backward; leave it out of a "
            "closure that runs twice. Then scaler.update() and zero_grad() make a new start"
        )


_stepped_by: WeakKeyDictionary[Optimizer, GradScaler] = WeakKeyDictionary()
"""The scaler that an optimizer was stepped by, of which nobody had told it."""


def remember_scaler(sam: Optimizer) -> None:
    """Finds out, in scaler.step(sam), which scaler it is: so the next `check_first_gradient` can look at it."""
    if not in_scaler_step(sam):
        return
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(scaler := frame.f_locals.get("self"), GradScaler):
            _stepped_by[sam] = scaler
            return
        frame = frame.f_back


def in_scaler_step(sam: Optimizer) -> bool:
    """Whether scaler.step(sam) is what called."""
    return "found_inf" in vars(sam)


def clear_scaler_attributes(sam: Optimizer) -> None:
    """Deletes what scaler.step(sam) set: after an exception it does not do so, and would multiply the next scale."""
    for name in ("grad_scale", "found_inf"):
        vars(sam).pop(name, None)


def unscale_for_hooks(scaler: GradScaler | None, sam: Optimizer, base: Optimizer) -> bool:
    """Unscales the gradients before the hooks of a step see them, as an unmodified scaler does for other optimizers.

    Args:
        scaler: the one that the user made known, or None.
        sam: what the scaler knows; carries what it set.
        base: the optimizer inside.

    Returns:
        False where a gradient is not finite: then the step is skipped, hooks and all. Waits for the device.
    """
    if in_scaler_step(sam):
        found_inf, grad_scale = sam.found_inf, sam.grad_scale  # type: ignore[attr-defined]
        if found_inf:
            return False
        if grad_scale is not None:
            _unscale(base, grad_scale)
            sam.grad_scale = None  # type: ignore[attr-defined]
    elif scaler is not None:
        if not is_unscaled(scaler, sam):
            scaler.unscale_(sam)
        return not found_inf_by(scaler, sam)
    return True


def step(scaler: GradScaler | None, sam: Optimizer, base: Optimizer) -> None:
    """Steps `base` with the gradients that are there, at w; skips it where one of them is not finite.

    Args:
        scaler: the one that the user made known, or None.
        sam: what the scaler knows; carries what it set.
        base: the optimizer to step.

    Raises:
        RuntimeError: `unscale_` was called on the base optimizer; or the scaler's own, such as a forgotten update().
        ValueError: a gradient is fp16, which can't be unscaled.
    """
    if _is_unscaled(scaler, base):
        raise RuntimeError("scaler.unscale_() was called on the base optimizer: call it on the FusedSAM around it")
    if scaler is None or in_scaler_step(sam):
        _step_base(sam, base)
        return
    # The scaler calls sam.step. That is already running, hooks and all, so it finds the last part alone in its place.
    # A learning rate scheduler may have put a `step` of its own there.
    own = vars(sam).get("step")
    sam.step = lambda: _step_base(sam, base)  # type: ignore[method-assign, assignment]
    try:
        scaler.step(sam)
    finally:
        del sam.step
        if own is not None:
            sam.step = own  # type: ignore[method-assign]


def _step_base(sam: Optimizer, base: Optimizer) -> None:
    grad_scale, found_inf = map(vars(sam).get, ("grad_scale", "found_inf"))
    if found_inf is None and grad_scale is None:
        base.step()
    elif _supports_scaling(base):
        base.grad_scale, base.found_inf = grad_scale, found_inf  # type: ignore[attr-defined]
        try:
            base.step()
        finally:
            clear_scaler_attributes(base)
    elif not found_inf:  # waits for the device, as the scaler does for every optimizer that knows nothing of it
        if grad_scale is not None:
            _unscale(base, grad_scale)
        base.step()


def _supports_scaling(base: Optimizer) -> bool:
    """Whether `base` reads the two attributes; the older contract, a `grad_scaler` argument, is not offered."""
    supports = getattr(base, "_step_supports_amp_scaling", False)
    return supports and "grad_scaler" not in inspect.signature(base.step).parameters


def _unscale(base: Optimizer, grad_scale: Tensor) -> None:
    """Divides the gradients, out of place: two of them may share memory, which unscale_ would divide twice."""
    inverse = grad_scale.double().reciprocal().float() if grad_scale.device.type != "mps" else grad_scale.reciprocal()
    by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for p in (p for group in base.param_groups for p in group["params"]):
        if (g := p.grad) is None:
            continue
        if g.dtype is torch.float16:
            raise ValueError(
                "the gradients are fp16, where unscaling loses them: keep the parameters in fp32 and run the model "
                "under torch.autocast, or use a base optimizer that unscales in its kernel, as fused=True does"
            )
        by_device.setdefault(g.device, []).append((p, g))
    for device, pairs in by_device.items():
        unscaled = torch._foreach_mul([g for _, g in pairs], inverse.to(device, non_blocking=True))
        for (p, _), g in zip(pairs, unscaled, strict=True):
            p.grad = g


def _is_unscaled(scaler: GradScaler | None, optimizer: Optimizer) -> bool:
    return scaler is not None and is_unscaled(scaler, optimizer)
