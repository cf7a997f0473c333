"""State dicts of other SAM optimizers, and of all kinds of base optimizers, made into what the base optimizer loads."""

from __future__ import annotations

import copy
from typing import Any

from fastsam.options import COUNTER

__all__ = ["to_base_state_dict", "with_groups", "without_groups"]

FOREIGN_STATE = ("old_p", "e_w")
"""What davda54/sam and pytorch_optimizer (old_p) and Composer (e_w) keep for each parameter."""

BESIDE = "fastsam"
"""Holds FusedSAM's options and counter of each group, beside what a base optimizer saves that leaves them out."""


def to_base_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Drops from a state dict what other SAM optimizers keep in it.

    Args:
        state_dict: of FusedSAM, of a plain optimizer, or of davda54/sam's, pytorch_optimizer's or Composer's SAM. It is
            not changed.

    Returns:
        A state dict that the base optimizer loads.
    """
    if not isinstance(state_dict.get("state"), dict):  # of a layout that only the base optimizer knows
        return state_dict
    state = {}
    for key, entry in state_dict["state"].items():
        kept = {k: v for k, v in entry.items() if k not in FOREIGN_STATE} if isinstance(entry, dict) else entry
        if kept or not entry:
            state[key] = kept
    return {**state_dict, "state": state}


def with_groups(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Adds FusedSAM's keys of the groups to a state dict of the base optimizer's that does not hold them.

    Args:
        state_dict: as the base optimizer gave it. It is not changed.
        groups: the keys of each group.
    """
    saved = state_dict.get("param_groups")
    if isinstance(saved, list) and all(COUNTER in group for group in saved):
        return state_dict
    return {**state_dict, BESIDE: groups}


def without_groups(state_dict: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Takes away what `with_groups` added; returns the state dict, and a copy of that (empty: nothing)."""
    groups = state_dict.get(BESIDE, [])
    return {key: value for key, value in state_dict.items() if key != BESIDE}, copy.deepcopy(groups)
