"""State dicts of other SAM optimizers, and of plain ones, made into the base optimizer's own."""

from __future__ import annotations

from typing import Any

__all__ = ["to_base_state_dict"]

FOREIGN_STATE = ("old_p", "e_w")
"""What davda54/sam and pytorch_optimizer (old_p) and Composer (e_w) keep for each parameter."""


def to_base_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Drops from a state dict what other SAM optimizers keep in it.

    Args:
        state_dict: of FusedSAM, of a plain optimizer, or of davda54/sam's, pytorch_optimizer's or Composer's SAM. It is
            not changed.

    Returns:
        A state dict that the base optimizer loads.
    """
    state = {}
    for key, entry in state_dict["state"].items():
        kept = {k: v for k, v in entry.items() if k not in FOREIGN_STATE} if isinstance(entry, dict) else entry
        if kept or not entry:
            state[key] = kept
    return {**state_dict, "state": state}
