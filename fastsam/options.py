"""FusedSAM's options, in the param groups and beside them, and the checks of each."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from fastsam.direction import DIRECTIONS
from fastsam.distributed import is_fsdp1

__all__ = [
    "COUNTER",
    "DTYPES",
    "OPTIONS",
    "PASSES",
    "Group",
    "check_direction",
    "check_group",
    "check_interval",
    "check_one_pass",
    "check_options",
    "check_passes",
    "check_start",
    "complete_group",
    "host_value",
    "parameter_name",
]

Group = dict[str, Any]

OPTIONS = ("rho", "epsilon", "adaptive")
"""FusedSAM's options in every param group."""

COUNTER = "sam_step"
"""Steps completed: a group key, since distributed.checkpoint drops top-level ones; the same in every group."""

PASSES = ("auto", "one", "two")
"""What `closure_passes` may be."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes of parameters that can be perturbed."""


def complete_group(group: Group, options: Group, steps: int) -> Group:
    """Adds to a param group what it lacks of FusedSAM's keys; returns it."""
    for key, value in options.items():
        group.setdefault(key, value)
    group.setdefault(COUNTER, steps)
    return group


def check_group(groups: list[Group], i: int) -> None:
    """Checks the options and parameters of param group i.

    Raises:
        TypeError: an option of the wrong type; a parameter that takes a gradient and is complex or integer; one of
            FullyShardedDataParallel's.
        ValueError: an option out of range; a parameter that is there twice.
    """
    groups[i].update(check_options(groups[i], f" of param group {i}"))
    seen = set()
    for j, p in enumerate(groups[i]["params"]):
        if p.requires_grad and p.dtype not in DTYPES:
            raise TypeError(
                f"{parameter_name(groups[i], i, j)} is {p.dtype}; FusedSAM perturbs {', '.join(map(str, DTYPES))}"
            )
        if is_fsdp1(p):
            raise TypeError(
                f"{parameter_name(groups[i], i, j)} belongs to FullyShardedDataParallel, whose shards look like whole "
                "tensors, so the norm over all ranks can't be known; use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if id(p) in seen:
            raise ValueError(f"{parameter_name(groups[i], i, j)} is in the group twice; give each parameter once")
        seen.add(id(p))


def check_options(options: Group, where: str = "") -> Group:
    """Checks rho, epsilon and adaptive.

    Args:
        options: a mapping that has the three.
        where: what an error message adds to the option's name.

    Returns:
        The three, as Python's own numbers; a rho that is a tensor is 0-d, in the same memory.

    Raises:
        TypeError: one is not of its type.
        ValueError: rho or epsilon is negative or not finite.
    """
    rho, epsilon, adaptive = options["rho"], options["epsilon"], options["adaptive"]
    if isinstance(rho, Tensor):
        if rho.numel() != 1 or not rho.is_floating_point():
            raise ValueError(f"rho{where} must be a float or a 0-d floating point tensor, but got {_show(rho)}")
        rho = host_value(rho)
    for key, value in (("rho", rho), ("epsilon", epsilon)):
        if isinstance(value, Tensor) and key == "rho":  # on a device: to look at it would be to wait for it
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real):  # NumPy's scalars are registered as such
            raise TypeError(f"{key}{where} must be a float, but got {_show(value)}")
        if not (0 <= float(value) < math.inf):
            raise ValueError(f"{key}{where} must be finite and >= 0, but got {value}")
    if isinstance(adaptive, Tensor) or adaptive not in (False, True):
        raise TypeError(f"adaptive{where} must be True or False, but got {adaptive!r}")
    return {
        "rho": _as_scalar(options["rho"]),
        "epsilon": float(epsilon),
        "adaptive": bool(adaptive),
    }


def _as_scalar(rho: float | Tensor) -> float | Tensor:
    """A float, or the tensor itself, or a view of it without dimensions."""
    if isinstance(rho, Tensor):
        return rho if rho.dim() == 0 else rho.reshape(())
    return float(rho)


def check_interval(interval: int) -> int:
    """Returns `interval` as an int; raises a TypeError or a ValueError unless it is one, and >= 1."""
    if isinstance(interval, bool) or not isinstance(interval, numbers.Integral):
        raise TypeError(f"interval must be an int, but got {interval!r}")
    if interval < 1:
        raise ValueError(f"interval must be >= 1, but got {interval}")
    return int(interval)


def check_start(start: int) -> int:
    """Returns `start` as an int; raises a TypeError or a ValueError unless it is one, and >= 0."""
    if isinstance(start, bool) or not isinstance(start, numbers.Integral):
        raise TypeError(f"start must be an int, a number of steps, but got {start!r}")
    if start < 0:
        raise ValueError(f"start must be >= 0, but got {start}")
    return int(start)


def check_direction(direction: str) -> str:
    """Returns `direction`; raises a ValueError unless it is one of `DIRECTIONS`."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(map(repr, DIRECTIONS))}, but got {direction!r}")
    return direction


def check_one_pass(closure_passes: str, first_pass_context: object) -> None:
    """Raises a ValueError where an option is for a pass at w, which direction='momentum' does not have."""
    if closure_passes != "auto":
        raise ValueError(
            f"closure_passes={closure_passes!r} is for gradients at w, but direction='momentum' computes only those at "
            "w + e_w: leave it out"
        )
    if first_pass_context is not None:
        raise ValueError(
            "first_pass_context is for the pass at w, but direction='momentum' computes only the gradients at w + e_w, "
            "which all ranks need synchronised: leave it out"
        )


def check_passes(closure_passes: str) -> str:
    """Returns `closure_passes`; raises a ValueError unless it is one of `PASSES`."""
    if closure_passes not in PASSES:
        raise ValueError(f"closure_passes must be one of {', '.join(map(repr, PASSES))}, but got {closure_passes!r}")
    return closure_passes


def parameter_name(group: Group, group_index: int, index: int) -> str:
    """What a parameter is called in an error message: by its name where the group has names."""
    where = f"parameter {index} of param group {group_index}"
    names = group.get("param_names")
    return f"{where} ({names[index]})" if names else where


def host_value(rho: float | Tensor) -> float | Tensor:
    """rho as a float where that costs no wait."""
    if isinstance(rho, Tensor):
        return float(rho) if rho.device.type == "cpu" else rho
    return float(rho) if isinstance(rho, numbers.Real) else rho


def _show(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return repr(value)
