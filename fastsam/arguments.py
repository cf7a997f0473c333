"""The two call forms of FusedSAM, and the checks of what they are given; those of the options are in options.py."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.optimizer import ParamsT

from fastsam import amp, backends
from fastsam.direction import check_base
from fastsam.notices import tell_once
from fastsam.options import (
    COUNTER,
    OPTIONS,
    Group,
    check_direction,
    check_group,
    check_interval,
    check_one_pass,
    check_options,
    check_passes,
    check_start,
    complete_group,
)

__all__ = ["Arguments", "ContextFactory", "bind", "signature"]

ContextFactory = Callable[[], AbstractContextManager[Any]]


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
