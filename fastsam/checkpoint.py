"""State dicts of other SAM optimizers, and of all kinds of base optimizers, made into what the base optimizer loads."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from fastsam.distributed import local
from fastsam.notices import tell_once
from fastsam.options import SETTINGS, Group

__all__ = [
    "check_settings",
    "is_state_initialisation",
    "to_base_state_dict",
    "with_settings",
]

FOREIGN_STATE = ("old_p", "e_w")
"""What davda54/sam and pytorch_optimizer (old_p) and Composer (e_w) keep for each parameter."""

SETTINGS_KEY = "fastsam_settings"
"""Holds what FusedSAM was built with, to tell where it differs. distributed.checkpoint drops it, as all such keys."""


def to_base_state_dict(state_dict: Group) -> Group:
    """Drops from a state dict what FusedSAM adds to it, and what other SAM optimizers keep in it.

    Args:
        state_dict: of FusedSAM, of a plain optimizer, or of davda54/sam's, pytorch_optimizer's or Composer's SAM. It is
            not changed.

    Returns:
        A state dict that the base optimizer loads.
    """
    base = {key: value for key, value in state_dict.items() if key != SETTINGS_KEY}
    if not isinstance(base.get("state"), dict):  # of a layout that only the base optimizer knows
        return base
    state = {}
    for key, entry in base["state"].items():
        kept = {k: v for k, v in entry.items() if k not in FOREIGN_STATE} if isinstance(entry, dict) else entry
        if kept or not entry:
            state[key] = kept
    return {**base, "state": state}


def with_settings(state_dict: Group, settings: Group) -> Group:
    """Adds FusedSAM's settings to the base optimizer's state dict, which is not changed."""
    return {**state_dict, SETTINGS_KEY: {name: settings[name] for name in SETTINGS}}


def check_settings(state_dict: Group, settings: Group) -> None:
    """Tells where a checkpoint was saved with other settings than those of the FusedSAM that loads it."""
    saved = state_dict.get(SETTINGS_KEY, {})
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
