"""What FusedSAM is beside the step: an optimizer around another, with its groups, options, checkpoints and copies."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any, cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from fastsam.arguments import ContextFactory
from fastsam.checkpoint import check_settings, to_base_state_dict, with_settings
from fastsam.distributed import ProcessGroup
from fastsam.hooks import around_load
from fastsam.options import (
    COUNTER,
    GROUP_DEFAULTS,
    OPTIONS,
    SETTINGS,
    UNPICKLED,
    Group,
    check_group,
    check_one_pass,
    check_options,
    complete_group,
    complete_groups,
)
from fastsam.perturbation import flatten_groups
from fastsam.torch_api import disable_dynamo, hooks

__all__ = ["OptimizerWrapper", "or_default"]

_KEYS = frozenset((*OPTIONS, COUNTER))
PICKLED = ("base_optimizer", "defaults", "flatten_parameters", "_settings", "_backend")


class OptimizerWrapper(Optimizer):
    """An optimizer that steps another one: groups and state are the other's own, so all see one optimizer."""

    base_optimizer: Optimizer
    flatten_parameters: bool
    _forms: tuple[inspect.Signature, inspect.Signature]
    # Objects that are changed in place: Lightning's wrapper has attributes of its own.
    _settings: Group  # with "steps"
    _of_training: Group
    _backend: str | None
    _lost: set[str]  # which of the training a pickle left behind, and nobody has set since

    # -- for the state machine to say ----------------------------------------------------------------------------------

    def _require_idle(self, what: str) -> None:
        """Raises a RuntimeError where the weights are perturbed."""
        raise NotImplementedError

    def _start(self) -> None:
        """A new state machine: at construction, and in a copy."""
        raise NotImplementedError

    def _mark_group_stale(self, params: list[Tensor]) -> None:
        """Takes the gradients of these for done with, in each wrapper of the base optimizer."""
        raise NotImplementedError

    # -- the base optimizer's own --------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[Group]:
        """The base optimizer's param groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    def __getattr__(self, name: str) -> Any:
        """``train`` and ``eval`` where the base optimizer has them, as schedule-free ones do."""
        base = self.__dict__.get("base_optimizer")
        if name in ("train", "eval") and hasattr(base, name):
            return functools.partial(self._call_base, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _call_base(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self._require_idle(f"{name}()")
        return getattr(self.base_optimizer, name)(*args, **kwargs)

    @disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, as the base optimizer does.

        Args:
            set_to_none: let go of them; False writes zeros.
        """
        if set_to_none:
            self.base_optimizer.zero_grad()  # some optimizers take no argument
        else:
            self.base_optimizer.zero_grad(set_to_none=False)

    # -- options -------------------------------------------------------------------------------------------------------

    @property
    def rho(self) -> float | Tensor:
        """The radius, a key of all param groups; setting it sets it in each. ValueError where they differ."""
        return cast("float | Tensor", self._option("rho"))

    @rho.setter
    def rho(self, rho: float | Tensor) -> None:
        self._set_option("rho", rho)

    @property
    def epsilon(self) -> float:
        """What is added to the norm, a key of all param groups, as `rho`."""
        return cast(float, self._option("epsilon"))

    @epsilon.setter
    def epsilon(self, epsilon: float) -> None:
        self._set_option("epsilon", epsilon)

    @property
    def adaptive(self) -> bool:
        """Whether the ascent is ASAM's, a key of all param groups, as `rho`."""
        return cast(bool, self._option("adaptive"))

    @adaptive.setter
    def adaptive(self, adaptive: bool) -> None:
        self._set_option("adaptive", adaptive)

    @property
    def interval(self) -> int:
        """Step k, counted from 0, is a SAM step when (k + 1) is a multiple of it."""
        return cast(int, self._settings["interval"])

    @interval.setter
    def interval(self, interval: int) -> None:
        self._settings["interval"] = SETTINGS["interval"](interval, "interval")

    @property
    def start(self) -> int:
        """The first step, counted from 0, that may be a SAM step."""
        return cast(int, self._settings["start"])

    @start.setter
    def start(self, start: int) -> None:
        self._settings["start"] = SETTINGS["start"](start, "start")

    @property
    def closure_passes(self) -> str:
        """Which gradients ``step(closure)`` takes for those at w: "auto", "one" or "two"."""
        return cast(str, self._settings["closure_passes"])

    @closure_passes.setter
    def closure_passes(self, closure_passes: str) -> None:
        closure_passes = SETTINGS["closure_passes"](closure_passes, "closure_passes")
        if self.direction == "momentum":
            check_one_pass(closure_passes, None)
        self._settings["closure_passes"] = closure_passes

    @property
    def direction(self) -> str:
        """What the ascent climbs along, "gradient" or "momentum"; as given at construction."""
        return cast(str, self._settings["direction"])

    @property
    def first_pass_context(self) -> ContextFactory | None:
        """Makes the context manager in which `step(closure)` runs the first of two passes."""
        return cast("ContextFactory | None", self._of_training["first_pass_context"])

    @first_pass_context.setter
    def first_pass_context(self, first_pass_context: ContextFactory | None) -> None:
        self._set_of_training("first_pass_context", first_pass_context)

    @property
    def grad_scaler(self) -> GradScaler | None:
        """The `torch.amp.GradScaler` of the losses."""
        return cast("GradScaler | None", self._of_training["grad_scaler"])

    @grad_scaler.setter
    def grad_scaler(self, grad_scaler: GradScaler | None) -> None:
        self._set_of_training("grad_scaler", grad_scaler)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The `torch.distributed.ProcessGroup` whose ranks hold different plain parameters."""
        return cast("ProcessGroup | None", self._of_training["process_group"])

    @process_group.setter
    def process_group(self, process_group: ProcessGroup | None) -> None:
        self._set_of_training("process_group", process_group)

    def _set_of_training(self, name: str, value: Any) -> None:
        self._of_training[name] = UNPICKLED[name](value, name)
        self._lost.discard(name)

    def _option(self, name: str) -> Any:
        self._complete_groups()
        values = [group[name] for group in self.param_groups] or [self.defaults[name]]
        if any(value is not values[0] and value != values[0] for value in values):
            raise ValueError(
                f"{name} differs between the param groups: read param_groups[i][{name!r}], {len(values)} of them"
            )
        return values[0]

    def _set_option(self, name: str, value: Any) -> None:
        self._complete_groups()  # a group that came past this class would count as the user's own options
        self.defaults[name] = value = OPTIONS[name](value, name)
        for group in self.param_groups:
            group[name] = value

    # -- groups --------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Adds a param group to the base optimizer.

        Args:
            param_group: ``params`` and options, as torch takes them; also rho, epsilon, adaptive, perturb.

        Raises:
            RuntimeError: perturbed.
            TypeError, ValueError: as at construction.
        """
        self._require_idle("add_param_group()")
        groups = self.param_groups
        options = {key: self.defaults[key] for key in OPTIONS}
        self.base_optimizer.add_param_group(complete_group(dict(param_group), options, self._steps))
        try:
            check_group(groups, len(groups) - 1)
            if self.flatten_parameters:
                flatten_groups(groups, len(groups) - 1)
            self._mark_group_stale(groups[-1]["params"])
        except BaseException:
            groups.pop()
            raise

    def _complete_groups(self) -> None:
        """Gives FusedSAM's keys to groups that came to the base optimizer past this class."""
        groups = self.param_groups
        if not all(group.keys() >= _KEYS for group in groups):
            steps = max((int(group[COUNTER]) for group in groups if COUNTER in group), default=self._settings["steps"])
            complete = complete_groups(groups, {key: self.defaults[key] for key in OPTIONS}, steps)
            for group, whole in zip(groups, complete, strict=True):
                if COUNTER not in group:
                    self._mark_group_stale(group["params"])
                group.update(whole)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _steps(self) -> int:
        """How many are completed; remembered while there are no groups, which some callers clear and add again."""
        groups = self.param_groups
        if groups:
            if COUNTER not in groups[0]:
                self._complete_groups()
            self._settings["steps"] = int(groups[0][COUNTER])
        return int(self._settings["steps"])

    @_steps.setter
    def _steps(self, steps: int) -> None:
        self._settings["steps"] = steps
        for group in self.param_groups:
            group[COUNTER] = steps

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict; its groups hold FusedSAM's options and the count of steps too.

        Raises:
            RuntimeError: perturbed.
        """
        self._require_idle("state_dict()")
        self._complete_groups()  # a group that came past this class is saved with the same count as the others
        for pre_hook in hooks(self, "state_dict_pre"):
            pre_hook(self)
        state_dict = with_settings(self.base_optimizer.state_dict(), self._settings)
        for post_hook in hooks(self, "state_dict_post"):
            state_dict = or_default(post_hook(self, state_dict), state_dict)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave; or a plain base optimizer's, davda54/sam's, pytorch_optimizer's or Composer's.

        Options that the saved groups do not have stay as they are. A ``rho`` that is a tensor keeps its identity and
        takes the saved value.

        Args:
            state_dict: the saved state. It is not changed.

        Raises:
            RuntimeError: perturbed.
            ValueError: it does not fit this optimizer's groups, or an option in it is out of range.
        """
        self._require_idle("load_state_dict()")
        state_dict = state_dict.copy()  # hooks may write to it
        for pre_hook in hooks(self, "load_state_dict_pre"):
            state_dict = or_default(pre_hook(self, state_dict), state_dict)
        self._complete_groups()
        check_settings(state_dict, self._settings)
        state_dict = to_base_state_dict(state_dict)
        for i, (options, saved) in enumerate(
            zip(self._own_options(), state_dict.get("param_groups", []), strict=False)
        ):
            check_options({**options, **saved}, f" of param group {i} of the state dict")
        self.base_optimizer.load_state_dict(state_dict)  # which calls `_keep_options`
        self._steps = self._steps  # the same in each group: one may have been saved without it
        for post_hook in hooks(self, "load_state_dict_post"):
            post_hook(self)

    def _own_options(self) -> list[Group]:
        return [{key: group[key] for key in (*OPTIONS, COUNTER) if key in group} for group in self.param_groups]

    def _keep_options(self, before: list[Group] | None) -> None:
        """Gives the groups their own options again, where a state dict that was loaded did not bring them."""
        for group, options in zip(self.param_groups, before or (), strict=False):
            if isinstance(rho := options.get("rho"), Tensor) and "rho" in group:
                with torch.no_grad():
                    group["rho"] = rho.copy_(torch.as_tensor(group["rho"]))
            for key, value in options.items():
                group.setdefault(key, value)

    # -- copies --------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        self._require_idle("pickle and deepcopy")
        # A bound no_sync would bring the whole model along, and the loss scale of the copy would be another one.
        there = {name for name, value in self._of_training.items() if value is not None}
        if self.grad_scaler is not None and not self.grad_scaler.is_enabled():
            there.remove("grad_scaler")
        lost = self._lost | there
        return {name: getattr(self, name) for name in PICKLED} | {"_lost": lost}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {"_of_training": dict.fromkeys(UNPICKLED), **state, "_lost": set(state.get("_lost", ()))}
        # A pickle may come from before an option.
        defaults = {name: parameter.default for name, parameter in self._forms[0].parameters.items()}
        options = {name: defaults[name] for name in OPTIONS if name in defaults}
        state["defaults"] = {**GROUP_DEFAULTS, **options, **state["defaults"]}
        state["_settings"] = {**{name: defaults[name] for name in SETTINGS}, "steps": 0, **state["_settings"]}
        super().__setstate__(state)
        self._start()
        around_load(self.base_optimizer, self._own_options, self._keep_options)
        self._settings["steps"] = self._steps

    def __copy__(self) -> OptimizerWrapper:
        """Another one around the same base optimizer."""
        return self._fill(type(self).__new__(type(self)), self.__getstate__())

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizerWrapper:
        """One around a copy of the base optimizer."""
        state = copy.deepcopy(self.__getstate__(), memo)
        return self._fill(type(self).__new__(type(self)), state)

    def _fill(self, copied: OptimizerWrapper, state: dict[str, Any]) -> OptimizerWrapper:
        """Makes a copy, which shares what belongs to the training and not to the optimizer."""
        copied.__setstate__({**state, "_of_training": dict(self._of_training), "_lost": self._lost})
        return copied


def or_default(result: Any, default: Any) -> Any:
    """What a hook returned, where it returned something."""
    return default if result is None else result
