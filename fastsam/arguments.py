"""The two call forms of FusedSAM, and the checks of what they are given."""

from __future__ import annotations

import inspect
import math
import numbers
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
from fastsam.direction import DIRECTIONS, check_base
from fastsam.distributed import is_fsdp1
from fastsam.notices import tell_once

__all__ = [
    "COUNTER",
    "DTYPES",
    "OPTIONS",
    "PASSES",
    "Arguments",
    "ContextFactory",
    "bind",
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
    "signature",
]

Group = dict[str, Any]
ContextFactory = Callable[[], AbstractContextManager[Any]]

OPTIONS = ("rho", "epsilon", "adaptive")
"""FusedSAM's options in every param group."""

COUNTER = "sam_step"
"""Steps completed: a group key, since distributed.checkpoint drops top-level ones; the same in every group."""

PASSES = ("auto", "one", "two")
"""What `closure_passes` may be."""

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
    closure_passes: str
    start: int
    direction: str


def bind(*args: Any, **kwargs: Any) -> Arguments:
    """Reads a call of FusedSAM in either form, checks it, and completes the base optimizer's groups.

    Raises:
        TypeError, ValueError, RuntimeError: as FusedSAM.
    """
    first = args[0] if args else kwargs.get("params", kwargs.get("base_optimizer"))
    form = _bind_optimizer if isinstance(first, Optimizer) else _bind_class
    arguments = form(*args, **kwargs)
    _check_context(arguments.first_pass_context)
    amp.check_scaler(arguments.grad_scaler)
    groups = arguments.base_optimizer.param_groups
    given = inspect.signature(form).bind(*args, **kwargs).arguments
    _replace_left_over(groups, {key: value for key, value in arguments.options.items() if key in given})
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
    base_optimizer: Callable[..., Optimizer],
    rho: float | Tensor = 0.05,
    adaptive: bool = False,
    *,
    epsilon: float = 1e-12,
    interval: int = 1,
    backend: str | None = None,
    first_pass_context: ContextFactory | None = None,
    grad_scaler: GradScaler | None = None,
    flatten_parameters: bool = False,
    closure_passes: str = "auto",
    start: int = 0,
    direction: str = "gradient",
    **base_optimizer_kwargs: Any,
) -> Arguments:
    if not _makes_optimizers(base_optimizer):
        raise TypeError(
            "base_optimizer must be a subclass of torch.optim.Optimizer (such as torch.optim.SGD) after params, or an "
            f"optimizer as the first argument, but got {base_optimizer!r}"
        )
    if isinstance(base_optimizer, type):
        _check_class(base_optimizer)
    options = _checked(rho, epsilon, adaptive)
    checked = check_interval(interval), check_passes(closure_passes), check_start(start), check_direction(direction)
    base = base_optimizer(params, **base_optimizer_kwargs)
    if not isinstance(base, Optimizer):  # a factory's, such as a functools.partial
        raise TypeError(f"base_optimizer must make a torch.optim.Optimizer, but {base_optimizer!r} made {base!r}")
    return _arguments(base, options, *checked, backend, first_pass_context, grad_scaler, flatten_parameters)


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
    closure_passes: str = "auto",
    start: int = 0,
    direction: str = "gradient",
) -> Arguments:
    options = _checked(rho, epsilon, adaptive)
    checked = check_interval(interval), check_passes(closure_passes), check_start(start), check_direction(direction)
    return _arguments(base_optimizer, options, *checked, backend, first_pass_context, grad_scaler, flatten_parameters)


def _arguments(
    base: Optimizer,
    options: Group,
    interval: int,
    closure_passes: str,
    start: int,
    direction: str,
    backend: str | None,
    first_pass_context: ContextFactory | None,
    grad_scaler: GradScaler | None,
    flatten_parameters: bool,
) -> Arguments:
    _check_class(type(base))
    _check_defaults(base)
    if direction == "momentum":
        check_base(base)
        check_one_pass(closure_passes, first_pass_context)
    return Arguments(
        base,
        options,
        interval,
        backend,
        first_pass_context,
        grad_scaler,
        flatten_parameters,
        closure_passes,
        start,
        direction,
    )


for _bind in (_bind_class, _bind_optimizer):
    _bind.__name__ = _bind.__qualname__ = "FusedSAM"  # what Python's own messages about a wrong call name


def signature() -> inspect.Signature:
    """That of FusedSAM.__init__, as tools see it: the first form's, with `self`."""
    bound = inspect.signature(_bind_class, eval_str=True)
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *bound.parameters.values()]
    return bound.replace(parameters=parameters, return_annotation=None)


def _replace_left_over(groups: list[Group], given: Group) -> None:
    """What is given to FusedSAM wins over what an earlier one, or its checkpoint, left in the groups, and says so."""
    replaced = []
    for i, group in enumerate(groups):
        if COUNTER not in group:  # options of its own, which the user gave it
            continue
        for key, value in given.items():
            if key in group and float(group[key]) != float(value):
                replaced.append(f"{key}={float(group[key]):g} of param group {i} by {float(value):g}")
            group[key] = value
    if replaced:
        warnings.warn(
            f"FusedSAM replaced what an earlier one left in the param groups: {', '.join(replaced)}", stacklevel=4
        )


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


def _checked(rho: float | Tensor, epsilon: float, adaptive: bool) -> Group:
    """The options of a call, checked."""
    return check_options({"rho": rho, "epsilon": epsilon, "adaptive": adaptive})


def _check_context(first_pass_context: object) -> None:
    if first_pass_context is not None and not callable(first_pass_context):
        raise TypeError(
            "first_pass_context must be a function that makes a context manager, such as model.no_sync (without "
            f"calling it), but got {first_pass_context!r}"
        )


def _makes_optimizers(base_optimizer: object) -> bool:
    """Whether this is an optimizer class or, by its looks, a function that makes one."""
    if isinstance(base_optimizer, type):
        return issubclass(base_optimizer, Optimizer)
    return callable(base_optimizer) and not isinstance(base_optimizer, Optimizer)


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


def _warn_without_native() -> None:
    """An install without a compiler is silent, and its user would only find it slow."""
    reason = backends.missing("cpp")
    if reason is not None:
        tell_once("native", f"FusedSAM runs without its native CPU backend, by torch's foreach: {reason}", stacklevel=4)
