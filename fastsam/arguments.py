"""The two call forms of FusedSAM, and the checks of what they are given."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.optimizer import ParamsT

from fastsam import amp, backends
from fastsam.distributed import is_fsdp1

__all__ = [
    "COUNTER",
    "DTYPES",
    "OPTIONS",
    "Arguments",
    "ContextFactory",
    "bind",
    "check_group",
    "check_interval",
    "check_options",
    "complete_group",
    "host_value",
    "parameter_name",
]

Group = dict[str, Any]
ContextFactory = Callable[[], AbstractContextManager[Any]]

OPTIONS = ("rho", "epsilon", "adaptive")
"""FusedSAM's options in every param group."""

COUNTER = "sam_step"
"""Steps completed: a group key, since distributed.checkpoint drops top-level ones; the same in every group."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes of parameters that can be perturbed."""


class Arguments(NamedTuple):
    """What a call of FusedSAM comes to, in either form."""

    base_optimizer: Optimizer
    options: Group
    interval: int
    backend: str | None
    first_pass_context: ContextFactory | None
    grad_scaler: GradScaler | None
    flatten_parameters: bool


def bind(*args: Any, **kwargs: Any) -> Arguments:
    """Reads a call of FusedSAM in either form, checks it, and completes the base optimizer's groups.

    Raises:
        TypeError, ValueError, RuntimeError: as FusedSAM.
    """
    first = args[0] if args else kwargs.get("params", kwargs.get("base_optimizer"))
    arguments = (_bind_optimizer if isinstance(first, Optimizer) else _bind_class)(*args, **kwargs)
    _check_context(arguments.first_pass_context)
    amp.check_scaler(arguments.grad_scaler)
    groups = arguments.base_optimizer.param_groups
    for group in groups:
        complete_group(group, arguments.options, 0)
    for i in range(len(groups)):
        check_group(groups, i)
    for device in {p.device for group in groups for p in group["params"]}:
        backends.load(arguments.backend, device)
        if device.type == "cpu" and arguments.backend is None and not os.environ.get("FASTSAM_BACKEND"):
            _warn_without_native()
    return arguments


def _bind_class(
    params: ParamsT,
    base_optimizer: type[Optimizer],
    rho: float | Tensor = 0.05,
    adaptive: bool = False,
    *,
    epsilon: float = 1e-12,
    interval: int = 1,
    backend: str | None = None,
    first_pass_context: ContextFactory | None = None,
    grad_scaler: GradScaler | None = None,
    flatten_parameters: bool = False,
    **base_optimizer_kwargs: Any,
) -> Arguments:
    if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
        raise TypeError(
            "base_optimizer must be a subclass of torch.optim.Optimizer (such as torch.optim.SGD) after params, or an "
            f"optimizer as the first argument, but got {base_optimizer!r}"
        )
    _check_class(base_optimizer)
    options = _checked(rho, epsilon, adaptive, interval)
    base = base_optimizer(params, **base_optimizer_kwargs)
    _check_defaults(base)
    return Arguments(base, options, interval, backend, first_pass_context, grad_scaler, flatten_parameters)


def _bind_optimizer(
    base_optimizer: Optimizer,
    rho: float | Tensor = 0.05,
    epsilon: float = 1e-12,
    interval: int = 1,
    *,
    adaptive: bool = False,
    backend: str | None = None,
    first_pass_context: ContextFactory | None = None,
    grad_scaler: GradScaler | None = None,
    flatten_parameters: bool = False,
) -> Arguments:
    _check_class(type(base_optimizer))
    options = _checked(rho, epsilon, adaptive, interval)
    _check_defaults(base_optimizer)
    return Arguments(base_optimizer, options, interval, backend, first_pass_context, grad_scaler, flatten_parameters)


for _bind in (_bind_class, _bind_optimizer):
    _bind.__name__ = _bind.__qualname__ = "FusedSAM"  # what Python's own messages about a wrong call name


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
    check_options(groups[i], f" of param group {i}")
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


def check_options(options: Group, where: str = "") -> None:
    """Checks rho, epsilon and adaptive.

    Args:
        options: a mapping that has the three.
        where: what an error message adds to the option's name.

    Raises:
        TypeError: one is not of its type.
        ValueError: rho or epsilon is negative or not finite.
    """
    rho, epsilon, adaptive = options["rho"], options["epsilon"], options["adaptive"]
    if isinstance(rho, Tensor):
        if rho.dim() != 0 or not rho.is_floating_point():
            raise ValueError(f"rho{where} must be a float or a 0-d floating point tensor, but got {_show(rho)}")
        rho = host_value(rho)
    for key, value in (("rho", rho), ("epsilon", epsilon)):
        if isinstance(value, Tensor) and key == "rho":  # on a device: to look at it would be to wait for it
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{key}{where} must be a float, but got {_show(value)}")
        if not (0 <= value < math.inf):
            raise ValueError(f"{key}{where} must be finite and >= 0, but got {value}")
    if not isinstance(adaptive, bool):
        raise TypeError(f"adaptive{where} must be True or False, but got {adaptive!r}")


def check_interval(interval: int) -> None:
    """Raises a TypeError or a ValueError unless `interval` is an int >= 1."""
    if isinstance(interval, bool) or not isinstance(interval, int):
        raise TypeError(f"interval must be an int, but got {interval!r}")
    if interval < 1:
        raise ValueError(f"interval must be >= 1, but got {interval}")


def parameter_name(group: Group, group_index: int, index: int) -> str:
    """What a parameter is called in an error message: by its name where the group has names."""
    where = f"parameter {index} of param group {group_index}"
    names = group.get("param_names")
    return f"{where} ({names[index]})" if names else where


def host_value(rho: float | Tensor) -> float | Tensor:
    """rho as a float where that costs no wait."""
    return float(rho) if isinstance(rho, Tensor) and rho.device.type == "cpu" else rho


def _show(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return repr(value)


def _checked(rho: float | Tensor, epsilon: float, adaptive: bool, interval: int) -> Group:
    """The options of a call, checked."""
    options = {"rho": rho, "epsilon": epsilon, "adaptive": adaptive}
    check_options(options)
    check_interval(interval)
    return options


def _check_context(first_pass_context: object) -> None:
    if first_pass_context is not None and not callable(first_pass_context):
        raise TypeError(
            "first_pass_context must be a function that makes a context manager, such as model.no_sync (without "
            f"calling it), but got {first_pass_context!r}"
        )


def _check_class(base_optimizer: type[Optimizer]) -> None:
    if issubclass(base_optimizer, LBFGS):
        raise ValueError(
            "base_optimizer LBFGS evaluates its closure many times a step, which SAM's two passes rule out"
        )
    if issubclass(base_optimizer, SparseAdam):
        raise ValueError("base_optimizer SparseAdam needs sparse gradients; FusedSAM needs dense ones: use Adam")


def _check_defaults(base: Optimizer) -> None:
    taken = [key for key in (*OPTIONS, COUNTER) if key in base.defaults]
    if taken:
        raise ValueError(
            f"base_optimizer {type(base).__name__} has an option {taken[0]!r} of its own, which FusedSAM would share "
            "with it in the param groups: use another base optimizer"
        )


_warned_without_native = False


def _warn_without_native() -> None:
    """Once in a process: an install without a compiler is silent, and its user would only find it slow."""
    global _warned_without_native
    reason = backends.missing("cpp")
    if reason is not None and not _warned_without_native:
        _warned_without_native = True
        warnings.warn(f"FusedSAM runs without its native CPU backend, by torch's foreach: {reason}", stacklevel=4)
