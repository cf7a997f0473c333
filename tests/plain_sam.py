"""SAM around a torch optimizer in plain PyTorch, with the rules of FusedSAM's calls, in whatever order they come.

No buckets, no kernels, no hooks: an optimizer that knows the SAMs around it, and a SAM that keeps a clone of each
weight.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Hooks = OrderedDict[int, Callable[..., Any]]


class Refused(Exception):
    """An error that a call has to raise, and after which nothing has changed."""


class Company:
    """The SAMs that are alive. `refused`: FusedSAM raised an error in the call under way, as in places it may."""

    def __init__(self) -> None:
        self.sams: list[PlainSAM] = []
        self.refused = False
        self.cleared = False  # the gradients, by a closure

    def may_refuse(self) -> None:
        if self.refused:
            raise Refused("as FusedSAM did")


def dense(t: Tensor) -> Tensor:
    """The values of a tensor that keeps them in another one."""
    return getattr(t, "values", t) if type(t) is not Tensor else t


class PlainBase:
    """A base optimizer, with the steps that were counted: those since the first SAM around it, while there is one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.count = 0
        self.sams: list[PlainSAM] = []

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def step(self, by: Callable[[Optimizer], object] = Optimizer.step) -> None:
        if any(sam.saved for sam in self.sams):
            raise Refused("perturbed")
        self.optimizer.step() if by is Optimizer.step else by(self.optimizer)
        self.count += bool(self.sams)
        for sam in self.sams:
            sam.mark()
            sam.announced = None
            sam.left = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)
        for sam in self.sams:
            sam.mark()
            if sam.announced is not None:
                sam.announced = {}
            sam.left = []

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(group)

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        return self.optimizer.register_step_pre_hook(hook)

    def state_dict(self) -> dict[str, Any]:
        return {**self.optimizer.state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "count"})
        self.count = state_dict["count"]


class PlainSAM:
    """FusedSAM, one parameter at a time. `saved`: w of each perturbed parameter, with its version at w + e_w."""

    def __init__(
        self,
        base: PlainBase,
        company: Company,
        rho: float,
        adaptive: bool = False,
        interval: int = 1,
        start: int = 0,
        direction: str = "gradient",
        closure_passes: str = "auto",
    ) -> None:
        held = set(base.params())
        for other in company.sams:
            if other.saved and held & set(other.base.params()):
                other.abandon()
        self.base_optimizer = self.base = base
        self.company, self.interval, self.start, self.direction = company, interval, start, direction
        self.closure_passes, self.options = closure_passes, {"rho": rho, "adaptive": adaptive}
        for group in base.param_groups:
            group.update(self.options)
        self.saved: dict[Tensor, tuple[Tensor, int]] | None = None
        self.announced: dict[Tensor, tuple[Tensor, int]] | None = None  # a plain step, by these gradients
        self.left: list[tuple[Tensor, Tensor, int]] = []  # first and last gradient that an ascent left: p, it, version
        self.norm: float | None = None
        self.perturbed_loss: Tensor | None = None
        self.pre_hooks: Hooks = OrderedDict()
        self.post_hooks: Hooks = OrderedDict()
        self.grad_scaler: Any = None
        self.examined = False
        self.known: dict[Tensor, tuple[Tensor, int]] = {}
        if closure_passes != "one":
            self.mark()
        base.sams.append(self)
        company.sams.append(self)

    # -- what it is asked ----------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def perturbed(self) -> bool:
        return self.saved is not None

    @property
    def is_sam_step(self) -> bool:
        if self.param_groups and not self.options.keys() <= self.param_groups[0].keys():
            self.complete_groups()
        return self.base.count >= self.start and (self.base.count + 1) % self.interval == 0

    @property
    def ascending(self) -> bool:
        return self.direction == "gradient" and self.is_sam_step and not self.perturbed

    # -- freshness -----------------------------------------------------------------------------------------------------

    def mark(self, params: list[Tensor] | None = None) -> None:
        self.known.update(versions(self.base.params() if params is None else params))

    def fresh(self) -> bool:
        """Whether a gradient is another object, or was written to, since the last mark."""
        perturbed = [p for group in self.param_groups if group.get("perturb", True) for p in group["params"]]
        now = versions(perturbed or self.base.params())
        return any(not same(self.known.get(p), grad) for p, grad in now.items())

    # -- the step ------------------------------------------------------------------------------------------------------

    def directions(self) -> list[tuple[dict[str, Any], Tensor, Tensor]]:
        """(group, p, what p climbs along)."""
        found = []
        if self.param_groups and not any(group.get("perturb", True) for group in self.param_groups):
            self.company.may_refuse()  # nothing is perturbed: better met before the first SAM step
        for group in self.param_groups:
            for p in group["params"] if group.get("perturb", True) else ():
                if self.direction == "momentum":
                    state = self.base.state.get(p, {}) if p.requires_grad else {}
                    v, sign = state.get("exp_avg", state.get("momentum_buffer")), -1.0
                else:  # maximising, the worst nearby point is the lowest
                    v, sign = p.grad, -1.0 if group["maximize"] else 1.0
                if v is not None:
                    if type(v) is not Tensor or v.dtype is not p.dtype:
                        self.company.may_refuse()
                    found.append((group, p, sign * dense(v.detach()).to(p.dtype)))
        return found

    @torch.no_grad()
    def climb(self) -> bool:
        self.require_idle()
        if any(other.saved and set(other.base.params()) & set(self.base.params()) for other in self.company.sams):
            self.company.may_refuse()
        terms = self.directions()
        if not terms and self.direction == "gradient":
            raise Refused("no gradient")
        if not terms:
            return False
        if any(self.rho_of(group) < 0 for group in self.param_groups):
            raise Refused("rho out of range")
        squares = [((p.abs() * g if group["adaptive"] else g).double() ** 2).sum() for group, p, g in terms]
        norm = torch.stack(squares).sum().sqrt()
        self.norm = float(norm)
        self.saved = {}
        for group, p, g in terms:
            w = p.detach().clone()
            if norm.isfinite():
                p.add_((p * p * g if group["adaptive"] else g) * (self.rho_of(group) / (self.norm + 1e-12)))
            else:
                p.add_(0)
            self.saved[p] = (w, p._version)
        return True

    def rho_of(self, group: dict[str, Any]) -> float:
        return float(group.setdefault("rho", self.options["rho"]))

    @torch.inference_mode(False)
    def first_step(self, zero_grad: bool = False) -> bool:
        self.require_idle()
        self.complete_groups()
        self.perturbed_loss = None
        self.left, self.announced = [], None
        if self.is_sam_step and self.climb():
            if zero_grad:
                self.zero_grad()
            elif self.direction == "gradient":
                self.leave()
            return True
        self.directions()  # what an ascent would refuse is better met now
        self.announced = versions(self.base.params())
        if self.direction == "momentum":
            self.leave()
        return False

    def leave(self) -> None:
        """Remembers the gradients that are there, until a backward finds that they were cleared in place."""
        found = [(p, g, g._version) for p in self.base.params() if (g := p.grad) is not None and p.requires_grad]
        self.left = left = found[:1] + found[-1:]

        def see(p: Tensor) -> None:
            handle.remove()
            if self.left is left and (p.grad is not left[1][1] or p.grad._version != left[1][2] + 1):
                self.left = []

        if left:
            handle = left[1][0].register_post_accumulate_grad_hook(see)

    def second_step(self, zero_grad: bool = False) -> None:
        self.step() if self.grad_scaler is None else self.scaler_step(self.grad_scaler)
        if zero_grad:
            self.zero_grad()

    @torch.inference_mode(False)
    def step(self, closure: Callable[[], Tensor] | None = None, by: Any = Optimizer.step) -> Tensor | None:
        try:
            if by is Optimizer.step:
                self.run(self.pre_hooks)
            self.complete_groups()
            loss = self.whole_step(closure, by)
            if by is Optimizer.step:
                self.run(self.post_hooks)
            return loss
        except BaseException:
            self.back()
            self.mark()
            raise
        finally:
            self.announced = None
            self.left = []

    def whole_step(self, closure: Callable[[], Tensor] | None, by: Any) -> Tensor | None:
        loss = None
        if self.saved is None:
            self.perturbed_loss = None
        if closure is None:
            only_pass = self.direction == "momentum" and self.announced is not None
            if self.saved is None and self.is_sam_step and not only_pass:
                raise Refused("nothing to step from")
            if self.announced and any(p.grad is not g or g._version != v for p, (g, v) in self.announced.items()):
                self.company.may_refuse()  # a second gradient was added to that of a plain step, or seems to be
        elif self.direction == "momentum":
            left = self.announced is None or any(p.grad is g for p, g, _ in self.left)
            if self.saved is None and ((self.is_sam_step and self.climb()) or left):
                self.zero_grad()
            climbed = self.saved is not None
            loss = self.call(closure)
            self.require_perturbed(climbed)
        else:
            taken = False
            if self.saved is None:
                taken = self.gradients_are_there()
                is_sam_step = self.is_sam_step
                if not taken:
                    loss = self.call(closure)
                if is_sam_step:
                    self.climb()
                    self.zero_grad()
            elif any(p.grad is g for p, g, _ in self.left):
                self.zero_grad()
            if self.saved is not None:
                watched = taken and self.closure_passes == "auto" and not self.examined
                self.examined |= watched
                self.company.cleared = False
                self.call(closure)
                if watched and self.company.cleared:  # one that clears the gradients computes both, from now on
                    self.closure_passes = "two"
                self.require_perturbed(True)
        self.back()
        self.directions()
        self.base.step(by if self.grad_scaler is None else self.grad_scaler.step)
        return loss

    def call(self, closure: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            loss = closure()
        if self.saved is not None:
            self.perturbed_loss = loss.detach()
        return loss

    def scaler_step(self, scaler: Any) -> None:
        """What an unmodified ``scaler.step(sam)`` has to come to: the hooks see what they would see on the base."""
        handles = [self.base.optimizer.register_step_pre_hook(hook) for hook in self.pre_hooks.values()]
        try:
            self.step(by=scaler.step)
        finally:
            for handle in handles:
                handle.remove()

    def gradients_are_there(self) -> bool:
        if self.closure_passes == "one" and not self.fresh():
            raise Refused("no gradients at w")
        return self.closure_passes != "two" and self.fresh()

    def restore(self) -> None:
        if self.saved is not None or self.announced is not None:
            self.back()
            self.mark()
            self.announced = None
        self.left = []

    @torch.no_grad()
    def back(self) -> None:
        saved, self.saved = self.saved, None
        for p, (w, _) in (saved or {}).items():
            p.copy_(w)

    def abandon(self) -> None:
        """Nobody will finish the step: what somebody has written to since the ascent stays as it is."""
        if self.saved is not None:
            self.saved = {p: (w, version) for p, (w, version) in self.saved.items() if p._version == version}
        self.restore()

    def drop(self) -> None:
        self.abandon()
        self.base.sams.remove(self)
        self.company.sams.remove(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        return register(hook, self.pre_hooks)

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        return register(hook, self.post_hooks)

    def run(self, hooks: Hooks) -> None:
        for hook in hooks.values():
            hook(self, (), {})

    # -- groups and checkpoints ----------------------------------------------------------------------------------------

    def complete_groups(self) -> None:
        """Takes in the groups that came past this class: what gradients they bring is stale."""
        for group in self.param_groups:
            if not self.options.keys() <= group.keys():
                self.mark_group(group)
            for key, value in self.options.items():
                group.setdefault(key, value)

    def mark_group(self, group: dict[str, Any]) -> None:
        for sam in self.base.sams:
            sam.mark(group["params"])

    @property
    def rho(self) -> Any:
        return self.options["rho"]

    @rho.setter
    def rho(self, rho: float | Tensor) -> None:
        self.options["rho"] = rho
        for group in self.param_groups:
            group["rho"] = rho

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.require_idle()
        if group.get("rho", 0) < 0:
            raise Refused("rho out of range")
        self.base.add_param_group({**self.options, **group})
        self.mark_group(self.param_groups[-1])

    def state_dict(self) -> dict[str, Any]:
        self.require_idle()
        self.complete_groups()
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.require_idle()
        before = [{key: group.get(key, value) for key, value in self.options.items()} for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        for group, options in zip(self.param_groups, before, strict=True):
            if isinstance(options["rho"], Tensor) and "rho" in group:
                group["rho"] = options["rho"].fill_(float(group["rho"]))
            for key, value in options.items():
                group.setdefault(key, value)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: no hooks, and nothing about the gradients, which stay with the original."""
        self.require_idle()
        left = {"known": {}, "announced": None, "left": [], "examined": False, "perturbed_loss": None}
        return {**vars(self), **left, "pre_hooks": OrderedDict(), "post_hooks": OrderedDict()}

    def require_idle(self) -> None:
        if self.saved is not None:
            raise Refused("perturbed")

    def require_perturbed(self, climbed: bool) -> None:
        if climbed and self.saved is None:
            raise Refused("restore() was called in the closure")


def versions(params: list[Tensor]) -> dict[Tensor, tuple[Tensor, int]]:
    """The gradients that there are, each with its version."""
    return {p: (p.grad, p.grad._version) for p in params if p.grad is not None}


def register(hook: Callable[..., Any], hooks: Hooks) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def same(known: tuple[Tensor, int] | None, now: tuple[Tensor, int]) -> bool:
    return known is not None and known[0] is now[0] and known[1] == now[1]
