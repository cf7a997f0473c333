"""Reads a call of FusedSAM, in either of its two forms, and gives the base optimizer's groups what they lack."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from fastsam import backends
from fastsam.direction import DIRECTIONS, check_base
from fastsam.notices import tell_once, warn
from fastsam.options import (
    COUNTER,
    GROUP_DEFAULTS,
    OPTIONS,
    SETTINGS,
    UNPICKLED,
    Group,
    check_one_pass,
    check_options,
    complete_groups,
)

__all__ = ["ContextFactory", "bind"]

ContextFactory = Callable[[], AbstractContextManager[Any]]


def bind(forms: Sequence[inspect.Signature], args: tuple[Any, ...], kwargs: Group) -> tuple[Optimizer, Group, Group]:
    """Reads a call of FusedSAM in either form, checks it, and completes the base optimizer's groups.

    Args:
        forms: the signatures of the two: around a class, around an optimizer.
        args: of the call.
        kwargs: of the call.

    Returns:
        The base optimizer; its groups' new defaults; and what the call gives to every other parameter of FusedSAM's.

    Raises:
        TypeError, ValueError, RuntimeError: as FusedSAM.
    """
    first = args[0] if args else kwargs.get("params", kwargs.get("base_optimizer"))
    around_optimizer = isinstance(first, Optimizer)
    _check_first(first, args, kwargs, forms[1])
    try:
        bound = forms[around_optimizer].bind(None, *args, **kwargs)
    except TypeError as error:
        raise TypeError(f"FusedSAM() {error}") from None
    given = set(bound.arguments)
    bound.apply_defaults()
    values = bound.arguments
    values.pop("self")
    options = check_options(values)
    for name, check in {**SETTINGS, **UNPICKLED}.items():
        values[name] = check(values[name], name)
    base = values.pop("base_optimizer")
    if not around_optimizer:
        base = _make(base, values.pop("params"), values.pop("base_optimizer_kwargs"))
    _check_base(base)
    direction = DIRECTIONS[values["direction"]](base)
    if not direction.two_passes:
        check_base(base)
        check_one_pass(values["closure_passes"], values["first_pass_context"])
    if "rho" not in given:
        options["rho"] = direction.rho
    groups = base.param_groups
    wins = {key: value for key, value in options.items() if key in given}
    complete = complete_groups(
        [{**group, **wins} if COUNTER in group else group for group in groups],
        options,
        max((group[COUNTER] for group in groups if COUNTER in group), default=0),
    )
    for device in {p.device for group in groups for p in group["params"]}:
        backends.load(values["backend"], device)
        if device.type == "cpu" and values["backend"] is None and not os.environ.get("FASTSAM_BACKEND"):
            _warn_without_native()
    # Nothing is written before all is checked: a call that is refused leaves no options behind.
    _tell_left_over(groups, complete, options)
    for group, whole in zip(groups, complete, strict=True):
        group.update(whole)
    return base, options, {name: value for name, value in values.items() if name not in OPTIONS}


def _check_first(first: Any, args: tuple[Any, ...], kwargs: Group, around_optimizer: inspect.Signature) -> None:
    """Raises a TypeError where the first argument is a common mistake."""
    name = type(first).__name__
    if hasattr(first, "first_step") and hasattr(first, "second_step"):
        raise TypeError(
            f"{name} is a SAM optimizer already, and SAM around SAM would climb twice: pass its base_optimizer"
        )
    if isinstance(first, nn.Module) and not isinstance(first, nn.ParameterList):
        raise TypeError(f"params must be the model's parameters, but got the {name} itself: pass model.parameters()")
    if isinstance(first, Optimizer):
        if len(args) > 1 and (isinstance(args[1], type) or callable(args[1])):
            raise TypeError(
                f"FusedSAM({name}(...), {getattr(args[1], '__name__', args[1])}, ...) gives two base optimizers: pass "
                "the optimizer alone, or parameters and a class"
            )
        unknown = [key for key in kwargs if key not in around_optimizer.parameters]
        if unknown and "params" not in kwargs:
            raise TypeError(
                f"FusedSAM({name}(...), {unknown[0]}=...): FusedSAM has no option {unknown[0]!r}; give an option of "
                f"the base optimizer to {name}"
            )
    elif callable(getattr(first, "step", None)):
        inside = next(
            (key for key, value in getattr(first, "__dict__", {}).items() if isinstance(value, Optimizer)), None
        )
        raise TypeError(
            f"{name} has a step() but is not a torch.optim.Optimizer, so FusedSAM can't wrap it: pass "
            + (f"the optimizer inside, its .{inside}, and put {name} around FusedSAM" if inside else "an optimizer")
        )


def _make(base_optimizer: Any, params: Any, kwargs: Group) -> Optimizer:
    """The optimizer that a class, or a function such as a functools.partial, makes."""
    is_class = isinstance(base_optimizer, type)
    if not (issubclass(base_optimizer, Optimizer) if is_class else _is_factory(base_optimizer)):
        raise TypeError(
            "base_optimizer must be a subclass of torch.optim.Optimizer (such as torch.optim.SGD) after params, or an "
            f"optimizer as the first argument, but got {base_optimizer!r}"
        )
    if is_class:
        _check_class(base_optimizer)
    _check_not_sharded()
    base = base_optimizer(params, **kwargs)
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer must make a torch.optim.Optimizer, but {base_optimizer!r} made {base!r}")
    return base


def _is_factory(base_optimizer: object) -> bool:
    return callable(base_optimizer) and not isinstance(base_optimizer, Optimizer)


def _check_base(base: Optimizer) -> None:
    _check_class(type(base))
    taken = [key for key in (*OPTIONS, COUNTER) if key in getattr(base, "defaults", {})]
    if taken:
        raise ValueError(
            f"base_optimizer {type(base).__name__} has an option {taken[0]!r} of its own, which FusedSAM would share "
            "with it in the param groups: use another base optimizer"
        )
    # Of the class: what a scheduler puts in the place of step has another signature than it says.
    _, *parameters = inspect.signature(type(base).step).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        raise ValueError(
            f"base_optimizer {type(base).__name__} can't step without {needed[0]!r}, but FusedSAM computes the "
            f"gradients itself and then calls step(): let it have a default, as in step(self, {needed[0]}=None), or "
            "use another base optimizer"
        )


def _check_class(base_optimizer: type[Optimizer]) -> None:
    if issubclass(base_optimizer, LBFGS):
        raise ValueError(
            "base_optimizer LBFGS evaluates its closure many times a step, which SAM's two passes rule out"
        )
    if issubclass(base_optimizer, SparseAdam):
        raise ValueError("base_optimizer SparseAdam needs sparse gradients; FusedSAM needs dense ones: use Adam")


def _check_not_sharded() -> None:
    """Raises a ValueError inside of ZeroRedundancyOptimizer(params, optimizer_class=FusedSAM)."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = inspect.currentframe() if module is not None else None
    while frame is not None and module is not None:
        if frame.f_globals is vars(module):
            raise ValueError(
                "ZeroRedundancyOptimizer(params, optimizer_class=FusedSAM) would make each rank climb by its own part "
                "of the parameters alone: put FusedSAM around it, FusedSAM(ZeroRedundancyOptimizer(params, "
                "optimizer_class=torch.optim.SGD, lr=0.1))"
            )
        frame = frame.f_back


def _tell_left_over(groups: list[Group], complete: list[Group], options: Group) -> None:
    """Says what becomes of the options that an earlier FusedSAM, or its checkpoint, left in the param groups.

    What is given to FusedSAM wins. The rest stays: a checkpoint, or the user, may have put it there.

    Args:
        groups: as they are.
        complete: as they are going to be.
        options: what a group gets that has none.
    """
    replaced, kept = [], []
    for i, (group, whole) in enumerate(zip(groups, complete, strict=True)):
        if COUNTER not in group:  # options of its own, which the user gave it
            continue
        for key in OPTIONS:
            if key in group and group[key] != whole[key]:
                replaced.append(f"{key}={_show(group[key])} of param group {i} by {_show(whole[key])}")
            elif whole[key] != options[key] and key not in GROUP_DEFAULTS:  # which no keyword of FusedSAM's gives
                kept.append(f"{key}={_show(whole[key])} of param group {i} (a new group gets {_show(options[key])})")
    if replaced:
        warn(f"FusedSAM replaced what an earlier one left in the param groups: {', '.join(replaced)}")
    if kept:
        tell_once(
            "left over",
            "FusedSAM keeps what an earlier one, or its checkpoint, left in the param groups: "
            f"{', '.join(kept)}. To have another value in all groups, give it to FusedSAM, as in rho=0.05, or "
            "set it, as in sam.rho = 0.05",
        )


def _show(value: object) -> str:
    return f"{float(value):g}" if isinstance(value, float | Tensor) else str(value)


def _warn_without_native() -> None:
    """An install without a compiler is silent, and its user would only find it slow."""
    reason = backends.missing("cpp")
    if reason is not None:
        tell_once("native", f"FusedSAM runs without its native CPU backend, by torch's foreach: {reason}")
