"""Loops that go wrong between the calls: what they are told, and how the weights come back."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.device import capturing
from fastsam.direction import keeps_other_state
from fastsam.notices import tell_once
from fastsam.state import State

__all__ = [
    "alive",
    "check_lost",
    "check_momentum",
    "check_second_pass",
    "restore_collected",
    "restore_left_perturbed",
]

alive: weakref.WeakSet[Any] = weakref.WeakSet()
"""Every FusedSAM that there is."""


def restore_left_perturbed(base: Optimizer) -> None:
    """Restores what another FusedSAM left at w + e_w: that of an interrupted notebook cell, which now runs again."""
    params = {id(p) for group in base.param_groups for p in group["params"]}
    for sam in list(alive):
        if sam.perturbed and any(id(p) in params for p in sam._parameters()):
            sam.restore()
            warnings.warn(
                "an earlier FusedSAM had left these weights perturbed (w + e_w), as an interrupted loop does: they are "
                "restored. `with sam:` around the loop restores by itself",
                stacklevel=3,
            )


@torch.no_grad()
def restore_collected(state: State) -> None:
    """Of a FusedSAM that nobody holds any more: restores, unless somebody wrote to the weights since."""
    if not state.perturbed:
        return
    untouched = state.witness is not None and state.witness[0]._version == state.witness[1]
    if untouched:
        state.perturbation.restore()
    warnings.warn(
        "a FusedSAM was deleted while the weights were perturbed (w + e_w): they "
        + ("are restored" if untouched else "stay so, since something else has written to them")
        + ". `with sam:` around the loop restores by itself",
        stacklevel=2,
    )


def check_second_pass(state: State, groups: list[dict[str, Any]], along_momentum: bool) -> None:
    """Looks at what a loop in two calls did between them."""
    if state.plain_step is not None and state.plain_step.doubled:
        raise RuntimeError(
            "a second gradient was added to that of a plain step, which first_step() had announced by returning "
            "False: write `if sam.first_step(zero_grad=True): loss_fn(model(x), y).backward()`, or ask "
            "sam.is_sam_step before the second pass"
        )
    if (state.perturbed or along_momentum) and all(p.grad is None for group in groups for p in group["params"]):
        tell_once(
            "no second gradient",
            "second_step() found no gradient, so the base optimizer has nothing to step by: after "
            "first_step(zero_grad=True) compute the loss and call backward() "
            + ("whatever it returned, with direction='momentum'" if along_momentum else "again, at w + e_w"),
        )


def check_lost(lost: Collection[str], grad_scaler: object, first_pass_context: object) -> None:
    """What pickle leaves behind, a closure can't do without."""
    if "grad_scaler" in lost and grad_scaler is None:
        raise RuntimeError(
            "this FusedSAM comes from a pickle, which leaves grad_scaler behind, so the scale of the gradients is "
            "not known: set sam.grad_scaler = scaler (GradScaler(enabled=False) where there is none any more)"
        )
    if "first_pass_context" in lost and first_pass_context is None:
        tell_once(
            "first_pass_context",
            "this FusedSAM comes from a pickle, which leaves first_pass_context behind: set it again, or the first "
            "pass runs without it",
        )


def check_momentum(state: State, base: Optimizer, params: list[Tensor], steps: int, there: bool) -> None:
    """Looks at a step along the momentum, which is or isn't there: it must not stay plain in silence."""
    name = type(base).__name__
    if there:
        if not state.watched and state.stale.any_fresh(params):
            tell_once(
                "a gradient at w",
                "direction='momentum' needs no gradient at w, but a backward ran before first_step() or "
                "step(closure): leave it out, and compute the only gradient of a step at w + e_w",
            )
        state.watched = True
    elif keeps_other_state(base, params):
        raise RuntimeError(
            f"direction='momentum' finds neither momentum_buffer nor exp_avg in the state of {name}: use "
            "torch.optim.SGD(..., momentum=0.9), Adam or AdamW as the base optimizer, or direction='gradient'"
        )
    elif any(map(capturing, {p.device for p in params})):
        raise RuntimeError("there is no momentum yet, and a CUDA graph is being captured: take a step before")
    elif steps > 0:
        tell_once(
            "no momentum",
            f"direction='momentum' finds no momentum yet, after {steps} steps, so this one is plain. That is "
            f"right where a GradScaler skipped them; else {name} does not keep its momentum in its state",
        )
