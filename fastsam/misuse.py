"""Detects mistakes in training loops, explains them, and restores weights that were left perturbed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.device import capturing
from fastsam.direction import keeps_other_state
from fastsam.notices import tell_once, warn
from fastsam.state import Phase, State

__all__ = [
    "around",
    "check_lost",
    "check_no_momentum",
    "check_process_group",
    "check_second_pass",
    "check_shared",
    "explain",
    "register",
    "restore_left_perturbed",
    "restore_unfinished",
    "tell_gradient_at_w",
    "tell_without_ascent",
]

_alive: list[weakref.ref[Any]] = []
_lock = threading.Lock()

_SECOND_PASS_ERRORS = ("backward through the graph a second time", "modified by an inplace operation")
"""Errors of torch's, by their words, of a second pass that goes back through the graph of the first."""

_GRAPH_OF_W = (
    "In a SAM step: the pass at w + e_w needs a graph of its own, and this one is of the pass at w. Compute model(x) "
    "and the loss again for it, and keep nothing that has a graph, such as a loss, a hidden state or a cached tensor, "
    "over both passes (detach() it)"
)


def register(sam: object) -> None:
    """Notes that there is another FusedSAM."""
    global _alive
    with _lock:
        _alive = [*(ref for ref in _alive if ref() is not None), weakref.ref(sam)]  # who looks at the old one may go on


def around(base: Optimizer) -> list[Any]:
    """The FusedSAMs around an optimizer."""
    return [sam for ref in _alive if (sam := ref()) is not None and sam.base_optimizer is base]


def _others_with(params: Callable[[], list[Tensor]], sam: object = None) -> list[Any]:
    """The other FusedSAMs that are perturbed, of those that have one of the parameters."""
    alive = [ref() for ref in _alive]
    perturbed = [other for other in alive if other is not None and other is not sam and other._state.perturbed]
    if not perturbed:
        return []
    ids = set(map(id, params()))
    return [other for other in perturbed if any(id(p) in ids for p in other._parameters())]


def check_shared(sam: Any) -> None:
    """Raises a RuntimeError where another FusedSAM has perturbed one of the parameters, which would be saved as w."""
    if _others_with(sam._parameters, sam):
        raise RuntimeError(
            "another FusedSAM holds some of these parameters and has perturbed them, so that w + e_w would be saved as "
            "w: end its step with second_step(), or call its restore(), before this first_step()"
        )


def restore_left_perturbed(base: Optimizer) -> None:
    """Restores what another FusedSAM left at w + e_w: that of an interrupted notebook cell, which now runs again."""
    for other in _others_with(lambda: [p for group in base.param_groups for p in group["params"]]):
        restore_unfinished(other._state, "an earlier FusedSAM had been left")
        other._mark_stale()


@torch.no_grad()
def restore_unfinished(state: State, what: str = "a FusedSAM was deleted") -> None:
    """Restores the weights of a step that nobody will finish; what somebody has written to since stays."""
    if not state.perturbed:
        return
    written = False
    if state.phase is Phase.ABOVE:
        written = state.perturbation.restore_unwritten()
    else:  # an interrupt cut perturb short: who has written since can't be told
        state.perturbation.restore()
    state.phase = Phase.AT_W
    warn(
        f"{what} while the weights were perturbed (w + e_w), as an interrupted loop does: they are restored"
        + (", except those that something else has written to since, which stay as written" if written else "")
        + ". `with sam:` around the loop restores by itself"
    )


def tell_without_ascent(state: State, settings: Mapping[str, Any]) -> None:
    """Of a FusedSAM that nobody holds any more, or at the end of the process: says so where `start` never came.

    Where the run is shorter than the interval, as a quick try is, SAM was not due.

    Args:
        state: of the FusedSAM.
        settings: its interval and start, and the count of its steps.
    """
    start, interval, steps = settings["start"], settings["interval"], settings["steps"]
    if (
        steps < interval
        or state.perturbation.buckets
        or any((k + 1) % interval == 0 for k in range(start, min(steps, start + interval)))
    ):
        return
    warn(
        f"FusedSAM ended after {steps} steps without one SAM step: start={start} and interval={interval} left all of "
        "them plain. start counts optimizer steps: is it computed from their number?"
    )


def check_second_pass(state: State, groups: list[dict[str, Any]]) -> None:
    """Looks at what a loop in two calls did between them."""
    left, perturbed = state.between, state.perturbed
    only_pass = not state.direction.two_passes
    if left is not None and left.added_to and not perturbed:
        raise RuntimeError(
            "a second gradient was added to that of a plain step, which first_step() had announced by returning False: "
            + (
                "direction='momentum' needs no gradient at w, so leave out the backward before first_step()"
                if only_pass
                else "write `if sam.first_step(zero_grad=True): loss_fn(model(x), y).backward()`, or ask "
                "sam.is_sam_step before the second pass"
            )
        )
    if (perturbed or only_pass) and all(p.grad is None for group in groups for p in group["params"]):
        tell_once(
            "no second gradient",
            "second_step() found no gradient, so the base optimizer has nothing to step by: after "
            "first_step(zero_grad=True) compute the loss and call backward() "
            + ("whatever it returned, with direction='momentum'" if only_pass else "again, at w + e_w"),
        )
    touched = left.touched if perturbed and left is not None else set()
    if touched == {False}:
        tell_once(
            "gradients at w",
            "second_step() found the very gradients that first_step() had climbed by, so this step is the base "
            "optimizer's own: after first_step(zero_grad=True) compute the loss and call backward() again, at w + e_w",
        )
    elif touched == {True} and left is not None and left.added_to:  # else the second backward reached a part
        tell_once(
            "summed gradients",
            "the gradients at w were not cleared, so those at w + e_w were added to them and the base optimizer steps "
            "by the sum: call first_step(zero_grad=True), or zero_grad() before the second backward()",
        )
    if perturbed and state.perturbation.all_written():
        tell_once(
            "written",
            "all weights were written to between first_step() and second_step(), as load_state_dict() does; "
            "second_step() goes back to the weights that first_step() saved. Call restore() before loading",
        )


def explain(error: BaseException | None, state: State) -> None:
    """Adds the cause to an error of torch's that a second pass met, from Python 3.11 on."""
    if not (state.perturbed and isinstance(error, RuntimeError) and hasattr(error, "add_note")):
        return
    known = any(words in str(error) for words in _SECOND_PASS_ERRORS)
    if known and _GRAPH_OF_W not in getattr(error, "__notes__", ()):
        error.add_note(_GRAPH_OF_W)


def check_lost(lost: Collection[str]) -> None:
    """What pickle leaves behind, a step can't do without."""
    if "grad_scaler" in lost:
        raise RuntimeError(
            "this FusedSAM comes from a pickle, which leaves grad_scaler behind, so the scale of the gradients is "
            "not known: set sam.grad_scaler = scaler (None where there is none any more)"
        )
    if "first_pass_context" in lost:
        tell_once(
            "first_pass_context",
            "this FusedSAM comes from a pickle, which leaves first_pass_context behind: set it again, or the first "
            "pass runs without it",
        )


def check_process_group(lost: Collection[str]) -> None:
    """Without its group a rank would climb by the norm of its own parameters alone."""
    if "process_group" in lost:
        raise RuntimeError(
            "this FusedSAM comes from a pickle, which leaves process_group behind, so the norm over its ranks can't be "
            "computed: set sam.process_group again (None where one rank has all parameters now)"
        )


def tell_gradient_at_w(state: State, params: Callable[[], list[Tensor]], steps: int, climbed: bool) -> None:
    """Looks at the first step along the momentum, and at the first that climbs: neither has a gradient at w."""
    if (climbed or not steps) and state.stale.any_fresh(params()):
        tell_once(
            "a gradient at w",
            "direction='momentum' needs no gradient at w, but a backward ran before first_step() or step(closure): "
            "leave it out, and compute the only gradient of a step after first_step(), or in the closure",
        )
    state.examined = climbed


def check_no_momentum(base: Optimizer, params: list[Tensor], steps: int) -> None:
    """Looks at a step along the momentum where there is none: it must not stay plain in silence."""
    name = type(base).__name__
    if keeps_other_state(base, params):
        raise RuntimeError(
            f"direction='momentum' finds neither momentum_buffer nor exp_avg in the state of {name}: use "
            "torch.optim.SGD(..., momentum=0.9), Adam or AdamW as the base optimizer, or direction='gradient'"
        )
    if any(map(capturing, {p.device for p in params})):
        raise RuntimeError("there is no momentum yet, and a CUDA graph is being captured: take a step before")
    if steps > 0:
        tell_once(
            "no momentum",
            f"direction='momentum' finds no momentum yet, after {steps} steps, so this one is plain. That is "
            f"right where a GradScaler skipped them, or where momentum=0; else {name} keeps no momentum in its state",
        )
