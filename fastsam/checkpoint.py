"""State dicts of other SAM optimizers, and of all kinds of base optimizers, made into what the base optimizer loads."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastsam.distributed import local
from fastsam.notices import tell_once
from fastsam.options import COUNTER, SETTINGS, Group

__all__ = [
    "check_settings",
    "is_state_initialisation",
    "to_base_state_dict",
    "with_options",
    "without_options",
]

FOREIGN_STATE = ("old_p", "e_w")
"""What davda54/sam and pytorch_optimizer (old_p) and Composer (e_w) keep for each parameter."""

BESIDE = "fastsam"
"""Holds FusedSAM's options and counter of each group, beside what a base optimizer saves that leaves them out."""

SETTINGS_KEY = "fastsam_settings"
"""Holds what FusedSAM was built with, to tell where it differs. distributed.checkpoint drops it, as all such keys."""


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


def with_options(state_dict: Group, groups: list[Group], settings: Group) -> Group:
    """Adds FusedSAM's settings, and its keys of the groups where they are missing, to the base optimizer's state dict.

    Args:
        state_dict: as the base optimizer gave it. It is not changed.
        groups: the keys of each group.
        settings: those beside the groups.
    """
    state_dict = {**state_dict, SETTINGS_KEY: {name: settings[name] for name in SETTINGS}}
    saved = state_dict.get("param_groups")
    if isinstance(saved, list) and all(COUNTER in group for group in saved):
        return state_dict
    return {**state_dict, BESIDE: groups}


def without_options(state_dict: Group) -> tuple[Group, list[Group], Group]:
    """Takes away what `with_options` added; returns the state dict, a copy of the groups' keys, and the settings."""
    base = {key: value for key, value in state_dict.items() if key not in (BESIDE, SETTINGS_KEY)}
    return base, copy.deepcopy(state_dict.get(BESIDE, [])), state_dict.get(SETTINGS_KEY, {})


def check_settings(saved: Group, settings: Group) -> None:
    """Tells where a checkpoint was saved with other settings than those of the FusedSAM that loads it."""
    differing = [name for name in SETTINGS if name in saved and saved[name] != settings[name]]
    if differing:
        tell_once(
            f"settings {differing}",
            "the checkpoint was saved with "
            + ", ".join(f"{name}={saved[name]!r} (here {settings[name]!r})" for name in differing)
            + ": these are no part of a state dict, so what FusedSAM(...) was given here stays",
        )


def is_state_initialisation(optimizer: Optimizer) -> bool:
    """Whether this is torch.distributed.checkpoint filling an optimizer's state: lr 0, gradients zero or none.

    It does so only where there is no state. The host looks at gradients, and waits for the device, at most where
    FusedSAM.step() without a closure is an error otherwise, or in the first plain step of a schedule from lr 0 on.
    """
    if optimizer.state:
        return False
    for group in optimizer.param_groups:
        lr = group.get("lr", 0.0)
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            return False
        if lr != 0:
            return False
    params = (p for group in optimizer.param_groups for p in group["params"])
    return not any(local(p.grad).any() for p in params if p.grad is not None)
