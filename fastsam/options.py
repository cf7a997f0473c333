"""FusedSAM's options: those in the param groups, those beside them, and the check of each.

A keyword of FusedSAM is said in four places: in the overloads of `FusedSAM.__init__`, in their docstring, in the tables
of checks here, and as a property in wrapper.py. Two are in no table, and stay as given: ``backend``, which backends/
checks, and ``flatten_parameters``, which counts as true or false.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from fastsam.direction import DIRECTIONS
from fastsam.distributed import ProcessGroup, is_fsdp1

__all__ = [
    "COUNTER",
    "GROUP_DEFAULTS",
    "OPTIONS",
    "SETTINGS",
    "UNPICKLED",
    "Group",
    "check_dtype",
    "check_group",
    "check_one_pass",
    "check_options",
    "complete_group",
    "complete_groups",
    "host_value",
    "parameter_name",
]

Group = dict[str, Any]

COUNTER = "sam_step"
"""Steps completed: a group key, since distributed.checkpoint drops top-level ones; the same in every group."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes of parameters that can be perturbed."""


# -- the check of each: takes the value and what an error message calls it, returns the value as it is kept -----------


def _check_number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # NumPy's scalars are registered as such
        raise TypeError(f"{name} must be a float, but got {_show(value)}")
    if not (0 <= float(value) < math.inf):
        raise ValueError(f"{name} must be finite and >= 0, but got {value}")
    return float(value)


def _check_rho(rho: Any, name: str) -> float | Tensor:
    if not isinstance(rho, Tensor):
        return _check_number(rho, name)
    if rho.numel() != 1 or not rho.is_floating_point():
        raise ValueError(f"{name} must be a float or a 0-d floating point tensor, but got {_show(rho)}")
    if rho.device.type == "cpu":  # on a device: to look at it would be to wait for it
        _check_number(float(rho), name)
    return rho if rho.dim() == 0 else rho.reshape(())  # in the same memory, where a graph reads it


def _check_bool(value: Any, name: str) -> bool:
    if isinstance(value, Tensor) or value not in (False, True):
        raise TypeError(f"{name} must be True or False, but got {value!r}")
    return bool(value)


def _check_int(value: Any, name: str, least: int, what: str = "an int") -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be {what}, but got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, but got {value}")
    return int(value)


def _check_one_of(value: Any, name: str, names: tuple[str, ...]) -> str:
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}, but got {value!r}")
    return str(value)


def _check_context(value: Any, name: str) -> Any:
    if value is not None and not callable(value):
        raise TypeError(
            f"{name} must be a function that makes a context manager, such as model.no_sync (without calling it), but "
            f"got {value!r}"
        )
    return value


def _check_scaler(value: Any, name: str) -> Any:
    if value is not None and not isinstance(value, GradScaler):
        raise TypeError(f"{name} must be a torch.amp.GradScaler or None, but got {value!r}")
    return value


def _check_process_group(value: Any, name: str) -> Any:
    if value is not None and not isinstance(value, ProcessGroup):
        hint = ""
        if isinstance(value, int):
            hint = ", which new_group() returns on a rank that is no member: its parameters belong to another group"
        elif hasattr(value, "get_group"):
            hint = ": pass its get_group()"
        raise TypeError(f"{name} must be a torch.distributed.ProcessGroup or None, but got {value!r}{hint}")
    return value


Check = Callable[[Any, str], Any]

OPTIONS: dict[str, Check] = {
    "rho": _check_rho,
    "epsilon": _check_number,
    "adaptive": _check_bool,
    "perturb": _check_bool,
}
"""The keys of every param group."""

GROUP_DEFAULTS = {"perturb": True}
"""What a group gets that no keyword of FusedSAM gives."""

SETTINGS: dict[str, Check] = {
    "interval": partial(_check_int, least=1),
    "start": partial(_check_int, least=0, what="an int, a number of steps"),
    "closure_passes": partial(_check_one_of, names=("auto", "one", "two")),
    "direction": partial(_check_one_of, names=tuple(DIRECTIONS)),
}
"""One value for all groups."""

UNPICKLED: dict[str, Check] = {
    "first_pass_context": _check_context,
    "grad_scaler": _check_scaler,
    "process_group": _check_process_group,
}
"""What belongs to the training and not to the optimizer: a deepcopy shares it, and a pickle leaves it behind."""


def check_options(options: Group, where: str = "") -> Group:
    """Checks the options of a param group.

    Args:
        options: a mapping; those that it lacks get their defaults where there are any.
        where: what an error message adds to the option's name.

    Returns:
        The options, as Python's own numbers; a rho that is a tensor is 0-d, in the same memory.

    Raises:
        TypeError: one is not of its type.
        ValueError: rho or epsilon is negative or not finite.
    """
    options = {**GROUP_DEFAULTS, **options}
    return {name: check(options[name], f"{name}{where}") for name, check in OPTIONS.items()}


def complete_group(group: Group, options: Group, steps: int) -> Group:
    """Adds to a param group what it lacks of FusedSAM's keys; returns it."""
    for key, value in {**GROUP_DEFAULTS, **options}.items():
        group.setdefault(key, value)
    group.setdefault(COUNTER, steps)
    return group


def complete_groups(groups: list[Group], options: Group, steps: int) -> list[Group]:
    """What the param groups are with all of FusedSAM's keys, each checked as by `check_group`; changes none of them.

    Who writes it to the groups does so when nothing can be refused any more: a group that has the keys counts as
    checked.
    """
    complete = [complete_group(dict(group), options, steps) for group in groups]
    for i in range(len(complete)):
        check_group(complete, i)
    return complete


def check_group(groups: list[Group], i: int) -> None:
    """Checks the options and parameters of param group i.

    Raises:
        TypeError: an option of the wrong type; a parameter that takes a gradient, is to be perturbed and is complex or
            integer; one of FullyShardedDataParallel's.
        ValueError: an option out of range; a parameter that is there twice.
    """
    groups[i].update(check_options(groups[i], f" of param group {i}"))
    seen = set()
    for j, p in enumerate(groups[i]["params"]):
        if p.requires_grad and groups[i]["perturb"]:
            check_dtype(p, parameter_name(groups[i], i, j))
        if is_fsdp1(p):
            raise TypeError(
                f"{parameter_name(groups[i], i, j)} belongs to FullyShardedDataParallel, whose shards look like whole "
                "tensors, so the norm over all ranks can't be known; use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if id(p) in seen:
            raise ValueError(f"{parameter_name(groups[i], i, j)} is in the group twice; give each parameter once")
        seen.add(id(p))


def check_dtype(p: Tensor, name: str) -> None:
    """Raises a TypeError where a parameter that is to be perturbed is complex or integer."""
    if p.dtype not in DTYPES:
        raise TypeError(
            f"{name} is {p.dtype}; FusedSAM perturbs {', '.join(map(str, DTYPES))}: put it into a param group with "
            "perturb=False, which the base optimizer steps all the same, or give it to another optimizer"
        )


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


def parameter_name(group: Group, group_index: int, index: int) -> str:
    """What a parameter is called in an error message: by its name where the group has names."""
    where = f"parameter {index} of param group {group_index}"
    names = group.get("param_names")
    return f"{where} ({names[index]})" if names else where


def host_value(rho: float | Tensor) -> float | Tensor:
    """rho as a float where that costs no wait."""
    if type(rho) is float:
        return rho
    if isinstance(rho, Tensor):
        return float(rho) if rho.device.type == "cpu" else rho
    return float(rho) if isinstance(rho, numbers.Real) else rho


def _show(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return repr(value)
