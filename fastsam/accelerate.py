"""Accelerate: a closure that its prepared optimizer passes on while gradients are accumulated. It is not imported here.

Under ``accelerator.accumulate`` a prepared optimizer calls ``step`` in the last micro-batch of each step alone, so a
closure of one micro-batch would leave the others out.
"""

from __future__ import annotations

import inspect
from typing import Any

from fastsam.closures import Closure, Passes, Trainer

__all__ = ["TRAINER"]


def _passes_of(closure: Closure) -> Passes | None:
    prepared = _calling_optimizer()
    steps = 1 if prepared is None else prepared.gradient_state.num_steps
    if steps > 1:
        raise RuntimeError(
            f"gradient_accumulation_steps={steps} can't work with a closure: Accelerate calls step(closure) in the "
            "last micro-batch of each step alone, and the others would be left out. Use first_step() and a second "
            "pass over all micro-batches, as examples/train_accelerate.py does; a closure that computes all of them "
            "goes past the prepared optimizer, by sam.optimizer.step(closure) where accelerator.sync_gradients is True"
        )
    return None


def _calling_optimizer() -> Any:
    """The prepared optimizer whose step is under way, None where there is none."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "step" and frame.f_globals.get("__name__") == "accelerate.optimizer":
            return frame.f_locals.get("self")
        frame = frame.f_back
    return None


TRAINER = Trainer(_passes_of)
"""For the core; see `fastsam.closures`."""
