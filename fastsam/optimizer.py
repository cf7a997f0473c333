"""FusedSAM: the state machine around a base optimizer (idle -> perturbed -> idle)."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import get_overloads, overload

from fastsam import amp, closures, misuse
from fastsam.arguments import ContextFactory, bind
from fastsam.checkpoint import is_state_initialisation
from fastsam.closures import Closure, Passes
from fastsam.direction import DIRECTIONS
from fastsam.distributed import ProcessGroup
from fastsam.freshness import ClearingWatch, LeftGradients
from fastsam.hooks import after_zero_grad, around_step
from fastsam.notices import tell_once
from fastsam.options import SETTINGS, UNPICKLED, check_one_pass
from fastsam.perturbation import flatten_groups, no_gradient_error
from fastsam.state import Phase, State
from fastsam.torch_api import compiled, disable_dynamo, grad_mode, hooks, label, uncompiled
from fastsam.wrapper import OptimizerWrapper

__all__ = ["SAM", "FusedSAM"]

P = ParamSpec("P")
R = TypeVar("R")


class FusedSAM(OptimizerWrapper):
    r"""Sharpness-aware minimization around any torch optimizer.

    Foret et al. 2021, arXiv 2010.01412, Eq. 2 with p = 2; ``adaptive=True`` is ASAM, arXiv 2102.11600:

        norm  = sqrt( sum_i ||g_i||^2 )          over all groups;   adaptive: of |w| * g
        e_w   = rho * g / (norm + epsilon)                          adaptive: w^2 * g * rho / (norm + epsilon)
        w    <- w + e_w                          first_step: climb to the worst nearby point
        g'    = gradient at w + e_w              your second forward and backward
        w    <- saved w                          second_step: bit for bit
        the base optimizer steps at w with g'

    Two forms of call, around a class and around an optimizer. The type of the first argument decides which it is.

    ``param_groups`` and ``state`` are the base optimizer's own, so schedulers, checkpoints and hooks see one optimizer.
    ``rho``, ``epsilon`` and ``adaptive`` are keys of the param groups, and may differ between them and change while
    training. So is ``perturb``, True by default: a group with ``perturb=False`` is left out of the norm, of the saved
    weights and of the ascent, and the base optimizer steps it by its gradient at w + e_w. Where the base optimizer
    maximises a group (``maximize=True``), the ascent turns: it goes to the lowest point nearby.

    Args:
        params: parameters as torch's optimizers take them: tensors, (name, tensor) pairs or group dicts.
        base_optimizer: an optimizer class, or another function that makes one from params (first form); or an
            optimizer (second form).
        rho: radius of the neighbourhood, >= 0; a float or a 0-d tensor. Where none is given, direction="momentum" takes
            1.0. What is in the param groups already stays where none is given, as do epsilon and adaptive.
        adaptive: climb by ASAM's scale-invariant rule.
        epsilon: added to the norm, >= 0.
        interval: step k, counted from 0, is a SAM step when (k + 1) is a multiple of it; the others are plain steps of
            the base optimizer.
        backend: one of `fastsam.available_backends()`; None takes ``FASTSAM_BACKEND`` or the best for each device.
        first_pass_context: a function that makes a context manager; `step(closure)` runs the first of two passes in it.
            With ``DistributedDataParallel.no_sync`` each rank climbs by the gradient of its own samples, without
            communication (m-sharpness, section 4.1 of the paper); the replicas stay equal, bit for bit.
        grad_scaler: the `torch.amp.GradScaler` of the losses. Then `step(closure)` and `second_step` step by it, and
            misuses of it are seen; you call ``scaler.update()``. Without it, end a step by ``scaler.step(sam)``.
        flatten_parameters: move the parameters into one flat buffer for each device and dtype, as views of it.
            torch.save of a part of the model then writes the whole buffer: clone the tensors of that part first.
        closure_passes: which gradients `step(closure)` takes for those at w. "one": those that are there, so that the
            closure runs once, at w + e_w, as in davda54/sam; "two": the closure computes both, as in torch.optim,
            Lightning and Composer; "auto": those that are there where a backward wrote them since the last step.
        start: the first step, counted from 0, that may be a SAM step; those before are plain. SAM in the last part of
            training finds flat minima too (arXiv 2410.10373): ``start=int(0.7 * steps)`` costs 1.3 times the base.
        direction: "gradient"; or "momentum", Momentum-SAM (arXiv 2401.12033): e_w = -rho * v / (||v|| + epsilon) with
            the base optimizer's own momentum v, ``momentum_buffer`` or ``exp_avg``. So a step has one gradient, at
            w + e_w: `step(closure)` runs the closure once, and `first_step` comes before the only backward. Parameters
            without momentum yet are not perturbed; the first step, where none has one, is plain.
        process_group: a `torch.distributed.ProcessGroup` whose ranks hold different plain parameters, such as the
            stages of a pipeline: the norm is then over all of them, by one all-reduce of two numbers a step, in which
            every rank takes part, with gradients or without. Not for replicas (DistributedDataParallel). DTensors
            (FSDP2) do not need it: they say how they are sharded.
        **base_optimizer_kwargs: options of the base optimizer (first form).

    Raises:
        TypeError: an argument of the wrong type; a parameter that is complex or integer and takes a gradient.
        ValueError: an argument out of range; a base optimizer that has an option of the same name, or that computes its
            step from closures (LBFGS) or sparse gradients (SparseAdam).
        RuntimeError: the backend that was asked for is missing.

    Examples:
        >>> sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        >>> loss_fn(model(x), y).backward()
        >>> sam.first_step(zero_grad=True)
        >>> loss_fn(model(x), y).backward()
        >>> sam.second_step(zero_grad=True)

    Note:
        Departures from davda54/sam: restoring writes to the parameters' own memory, state_dict holds the base
        optimizer's state, ``step`` returns the loss, 16-bit parameters are perturbed in fp32 arithmetic, and a gradient
        that is not finite perturbs nothing.
    """

    _state: State

    @overload
    def __init__(
        self,
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
        process_group: ProcessGroup | None = None,
        **base_optimizer_kwargs: Any,
    ) -> None: ...

    @overload
    def __init__(
        self,
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
        process_group: ProcessGroup | None = None,
    ) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        base, options, given = bind(self._forms, args, kwargs)
        misuse.restore_left_perturbed(base)
        self.__setstate__(
            {
                "base_optimizer": base,
                "defaults": {**getattr(base, "defaults", {}), **options},
                "flatten_parameters": given["flatten_parameters"],
                "_settings": {name: given[name] for name in SETTINGS},
                "_backend": given["backend"],
                "_of_training": {name: given[name] for name in UNPICKLED},
            }
        )
        if self.flatten_parameters:
            flatten_groups(self.param_groups)

    _forms = cast(Any, tuple(inspect.signature(form, eval_str=True) for form in get_overloads(__init__)))
    __init__.__signature__ = _forms[0]  # type: ignore[attr-defined]

    _step_supports_amp_scaling = True
    """GradScaler then calls step() even when a gradient overflowed, and step() must restore w. `fastsam.amp` skips and
    unscales."""

    # -- the sharpness-aware step --------------------------------------------------------------------------------------

    @property
    def perturbed(self) -> bool:
        """Whether the parameters are at w + e_w."""
        return self._state.perturbed

    @property
    def is_sam_step(self) -> bool:
        """Whether the coming step, or the one under way, is a SAM step; else `start` or `interval` leaves it plain.

        Ask before the first backward where that depends on it: with DistributedDataParallel, under ``no_sync`` the only
        gradient of a plain step would differ between the ranks.
        """
        steps = self._steps
        return steps >= self.start and (steps + 1) % self.interval == 0

    @property
    def ascending(self) -> bool:
        """Whether the coming pass is the one at w of a SAM step, whose gradient only tells where to climb.

        It may do with a part of the batch (m-sharpness, section 4.1 of the paper): the pass at w + e_w takes it whole.
        """
        return self._state.direction.two_passes and self.is_sam_step and not self.perturbed

    @property
    def grad_norm(self) -> Tensor | None:
        """The global gradient norm of the last ascent: a 0-d tensor on the device, None before the first.

        Without the loss scale, where `grad_scaler` is known; else with it. The momentum's under direction="momentum".
        """
        return self._state.perturbation.norm

    @property
    def perturbed_loss(self) -> Tensor | float | None:
        """The loss at w + e_w of the last ``step(closure)``: what the closure returned, detached, on its device.

        None after a step in two calls, a plain step, and a pass that gave no loss. Where `step` returns the loss at w,
        ``sam.perturbed_loss - loss`` is the sharpness. With direction="momentum" no loss is computed at w.
        """
        loss: Tensor | float | None = self._state.perturbed_loss
        return loss

    @disable_dynamo
    @grad_mode(False)
    def _grad_norm(self) -> Tensor:
        """davda54/sam's method: the global norm of the gradients that are there now, 0-d, whatever step this is.

        With the loss scale. `grad_norm` costs nothing: it is the norm that the last ascent computed, and what a CUDA
        graph can hold.
        """
        self._complete_groups()
        misuse.check_process_group(self._lost)
        return self._state.perturbation.gradient_norm(self.param_groups, self.process_group)

    @disable_dynamo
    @grad_mode(False)
    def first_step(self, zero_grad: bool = False) -> bool:
        """Saves w and climbs: w <- w + e_w, by the gradients that are there, or by the momentum.

        Args:
            zero_grad: clear the gradients afterwards, where it returns True.

        Returns:
            True; or False on a plain step, as `start` and `interval` say. Then nothing happened, the gradients are
            kept, and `second_step` is the base optimizer's step. Compute no second gradient then; it would add to the
            first. With direction="momentum" the step's only gradient comes after this call, whatever it returns.

        Raises:
            RuntimeError: already perturbed, or no parameter has a gradient; or `grad_scaler` has unscaled it; or the
                base optimizer's state has no momentum.
            TypeError: a gradient is sparse, or of another dtype than its parameter.
            ValueError: an option in a param group is out of range; a gradient does not fit its parameter.
        """
        self._require_idle("first_step()")
        self._complete_groups()
        state = self._state
        two_passes = state.direction.two_passes
        self._end_between()
        state.perturbed_loss = None
        try:
            climbed = self.is_sam_step and self._perturb()
            if not (two_passes or state.examined):
                misuse.tell_gradient_at_w(state, self._parameters, self._steps, climbed)
            if climbed and zero_grad:
                self.zero_grad()
        except BaseException:
            self._restore()
            raise
        if not climbed:
            self._rehearse()
        if not climbed or (two_passes and not zero_grad):
            state.between = LeftGradients(self._parameters())
        return climbed

    @disable_dynamo
    def second_step(self, zero_grad: bool = False) -> None:
        """Restores w, bit for bit, and steps the base optimizer with the gradients that are there.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: not perturbed, on a step that is a SAM step.
        """
        closures.before_second_step(self)
        state = self._state
        state.will_clear = zero_grad
        try:
            self.step()
            if zero_grad:
                self.zero_grad()
        except BaseException:
            self._mark_stale()
            raise
        finally:
            state.will_clear = False

    @grad_mode(False)
    def step(self, closure: Closure | None = None) -> Any:
        """One whole step with a closure; without one, what `second_step` does.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss. When gradients were
                computed since the last step they are taken for those at w, and the closure runs once, at w + e_w;
                otherwise it runs twice (`closure_passes` says which, whatever is there). On a plain step it runs once,
                or not at all. The gradients are cleared between the passes; with direction="momentum", before the only
                one. After `first_step` it runs once.

        Returns:
            The loss at w, where the closure computed it; else None. That at w + e_w with direction="momentum".

        Raises:
            RuntimeError: no closure, not perturbed, and this is a SAM step; or no gradient at w; or a GradScaler was
                used in a way that can't work.
            Exception: whatever the closure raises, after w is restored bit for bit.
        """
        # Every call comes by `profile_hook_step`, which runs the hooks and restores w after a failure.
        state = self._state
        self._complete_groups()
        if closure is None and not state.perturbed and state.between is None and is_state_initialisation(self):
            self.base_optimizer.step()
            return None
        if not state.perturbed:  # else first_step did, and a trainer's closure may have run since
            state.perturbed_loss = None
        completed = self._steps
        passes = None if closure is None else self._passes(closure)
        if passes is None or passes.computes_nothing:
            self._finish(passes)
            loss, valid = None, True
        else:
            loss, valid = self._run(passes)
        self._restore()
        self._rehearse()
        if valid:
            amp.step(self.grad_scaler, self, self.base_optimizer)
        self._count_step(completed)
        return loss

    @staticmethod
    def profile_hook_step(func: Callable[P, R]) -> Callable[P, R]:
        """What torch puts around `step` to run its hooks: the door by which every call of `step` comes.

        The global hooks are left to the base optimizer's step. torch.compile stays out of all but the closure, at one
        graph break.
        """
        overridden = func.__module__ != __name__  # by a subclass, which looks at gradients as hooks do

        @functools.wraps(func)
        def step(*args: P.args, **kwargs: P.kwargs) -> R:
            sam = cast(FusedSAM, args[0])
            sam._state.stepping = True
            # Around the hooks too: what fails in one must not leave the weights perturbed either.
            try:
                with label(f"Optimizer.step#{type(sam).__name__}.step"):
                    pre_hooks, post_hooks = hooks(sam, "step_pre"), hooks(sam, "step_post")
                    if (args[1] if len(args) > 1 else kwargs.get("closure")) is None:
                        amp.remember_scaler(sam)
                        looked_at = overridden or pre_hooks or post_hooks
                        if looked_at and not amp.unscale_for_hooks(sam.grad_scaler, sam, sam.base_optimizer):
                            pre_hooks = post_hooks = ()
                    for pre_hook in pre_hooks:
                        args, kwargs = _call_pre_hook(pre_hook, sam, args, kwargs)
                    out = func(*args, **kwargs)
                    for post_hook in post_hooks:
                        post_hook(sam, args, kwargs)
                    return out
            except BaseException:
                sam._restore()
                sam._mark_stale()
                amp.clear_scaler_attributes(sam)
                raise
            finally:
                sam._state.stepping = False
                sam._end_between()

        return uncompiled(step)

    @disable_dynamo
    def restore(self) -> None:
        """Back to w, bit for bit, without a step; nothing to do where `first_step` has begun none.

        The interrupted step, a plain one too, ends here and is not counted, and its gradients are done with: before the
        next backward adds to them, `zero_grad` clears them. Call it before saving a model in a signal handler.
        """
        state = self._state
        if state.phase is not Phase.AT_W or state.between is not None:
            self._restore()
            self._end_between()
            self._mark_stale()

    def __enter__(self) -> FusedSAM:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Leaves no perturbation behind, whatever happened in the block."""
        misuse.explain(error, self._state)
        self.restore()

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _finish(self, passes: Passes | None) -> None:
        """The end of a step in two calls: the gradients that are there are those to step by."""
        state = self._state
        if not state.perturbed and self.is_sam_step and (state.direction.two_passes or state.between is None):
            raise RuntimeError(
                "the weights are not perturbed, so there is nothing to step from: call first_step() and compute the "
                "gradients again before step() or second_step(), or pass step() a closure"
                + (closures.advice(amp.in_scaler_step(self)) or "; for a plain step, sam.base_optimizer.step()")
            )
        misuse.check_second_pass(state, self.param_groups)
        if passes is not None:
            self._call(passes.plain)  # for the trainer's hooks

    def _run(self, passes: Passes) -> tuple[Any, bool]:
        """The passes of one step, up to where the weights are still perturbed.

        Returns:
            The loss at w, where the closure computed it, and whether the base optimizer may step by the gradients that
            are there.
        """
        if amp.in_scaler_step(self):
            raise RuntimeError(
                "scaler.step(sam, closure) can't work: the scaler looks for infinite gradients before the closure "
                "computes any. Use FusedSAM(..., grad_scaler=scaler) and sam.step(closure), or first_step(), a second "
                "backward and scaler.step(sam)"
            )
        misuse.check_lost(self._lost)
        if not self._state.direction.two_passes:
            return self._run_along_momentum(passes)
        if not self.is_sam_step and not self._state.perturbed:
            return self._run_plain(passes)
        loss, closure_is_above = None, False
        if not self._state.perturbed:
            closure_is_above = not passes.by_trainer and self._gradients_are_there()
            if not closure_is_above:
                with nullcontext() if self.first_pass_context is None else self.first_pass_context():
                    loss = self._call(passes.at_w)
                if self._state.perturbed:  # w + e_w would be saved as w
                    raise RuntimeError(
                        "first_step() was called in the closure: leave it out, since step(closure) climbs by itself"
                    )
                if passes.by_trainer and loss is None:
                    return None, False
            self._perturb()
            self.zero_grad()
        elif self._state.between is not None and self._state.between.there:  # first_step left them
            self.zero_grad()
        loss_above = self._call_watched(passes.above) if closure_is_above else self._call(passes.above)
        self._check_still_perturbed()
        return loss, not (passes.by_trainer and loss_above is None)

    def _run_plain(self, passes: Passes) -> tuple[Any, bool]:
        """As `_run`, on a step that `start` or `interval` leaves plain."""
        if not passes.by_trainer and self._gradients_are_there():
            return None, True
        # Not in first_pass_context: this gradient is what the base optimizer steps by.
        loss = self._call(passes.plain)
        return loss, not (passes.by_trainer and loss is None)

    def _run_along_momentum(self, passes: Passes) -> tuple[Any, bool]:
        """As `_run`, where the closure runs once: at w + e_w, or on a plain step at w."""
        check_one_pass(self.closure_passes, self.first_pass_context)
        state = self._state
        climbed = state.perturbed
        if not climbed:
            climbed = self.is_sam_step and self._perturb()
            if climbed or state.between is None or state.between.there:  # else they came after first_step
                if not state.examined:
                    misuse.tell_gradient_at_w(state, self._parameters, self._steps, climbed)
                self.zero_grad()  # those at w, of a loop that was written for SAM
        loss = self._call(passes.plain)
        if climbed:
            self._check_still_perturbed()
        return loss, not (passes.by_trainer and loss is None)

    def _check_still_perturbed(self) -> None:
        if not self._state.perturbed:
            raise RuntimeError("restore() was called, by a signal handler, while the closure ran at w + e_w")

    def _rehearse(self) -> None:
        """Meets on the first plain steps what a SAM step would refuse, and makes sure that one comes."""
        perturbation = self._state.perturbation
        if not perturbation.buckets and not perturbation.rehearsed:
            perturbation.rehearse(self.param_groups, self.process_group)
            if perturbation.rehearsed:
                weakref.finalize(self, misuse.tell_without_ascent, self._state, self._settings)

    def _gradients_are_there(self) -> bool:
        """Whether a closure is to find the gradients at w, and not to compute them."""
        if self.closure_passes == "two":
            return False
        # An auxiliary loss of a group that is left out gives no gradient to climb by, nor that of a plain step.
        perturbed = [p for group in self.param_groups if group["perturb"] for p in group["params"]]
        fresh = self._state.stale.any_fresh(perturbed or self._parameters())
        if not fresh and self.closure_passes == "one":
            raise RuntimeError(
                "closure_passes='one' takes the gradients at w that are there, but no backward has written any since "
                "the last step: call loss.backward() before step(closure), or use closure_passes='two'"
            )
        return fresh

    def _call_watched(self, closure: Closure) -> Any:
        """Runs a closure once, at w + e_w, by the gradients that were there; says so where it seems to be a mistake."""
        state = self._state
        moved = None if state.examined or self.closure_passes != "auto" else state.perturbation.smallest()
        if moved is None:
            return self._call(closure)
        state.examined = True
        state.clearing = ClearingWatch(moved)
        try:
            loss = self._call(closure)
        finally:
            cleared, state.clearing = state.clearing.end(), None
        if cleared:
            self.closure_passes = "two"
            tell_once(
                "closure passes",
                "step(closure) took the gradients that were there for those at w, and ran the closure once, at w + e_w "
                "- but the closure clears the gradients, or sets its own, as one does that computes both. From now on "
                "it computes both (closure_passes='two'). If the gradients that were there are those at w, use "
                "FusedSAM(..., closure_passes='one')",
            )
        return loss

    def _count_step(self, completed: int) -> None:
        """Counts the step after `completed` ones, to the same number in each FusedSAM around the base optimizer."""
        self._steps = completed + 1
        if not self._state.will_clear:
            self._mark_stale()

    def _passes(self, closure: Closure) -> Passes:
        return Passes.of(closure)

    @grad_mode(True)
    def _call(self, closure: Closure) -> Any:
        try:
            loss = compiled(closure)
        except RuntimeError as error:
            misuse.explain(error, self._state)
            raise
        self._state.note_loss(loss)
        return loss

    def _perturb(self) -> bool:
        """Climbs; returns False where there is no momentum yet to climb along."""
        state, perturbation = self._state, self._state.perturbation
        misuse.check_shared(self)
        misuse.check_process_group(self._lost)
        amp.check_first_gradient(self.grad_scaler, self, self.base_optimizer)
        there = False
        try:
            there = perturbation.measure(self.param_groups, self.process_group)
        finally:
            if not there:
                perturbation.release()
        if not there:
            if state.direction.two_passes:
                raise no_gradient_error(self.param_groups)
            misuse.check_no_momentum(self.base_optimizer, self._parameters(), self._steps)
            return False
        perturbation.loss_scale = amp.loss_scale(self.grad_scaler) if state.direction.two_passes else None
        # Before the first write: from here on a failure, or a signal handler that calls restore(), finds what to do.
        # Buckets know themselves how far perturb got.
        state.phase = Phase.CLIMBING
        try:
            perturbation.perturb()
            state.phase = Phase.ABOVE if state.phase is Phase.CLIMBING else state.phase
            if state.phase is Phase.INTERRUPTED:
                raise RuntimeError("restore() was called, by a signal handler, while first_step() was under way")
        except BaseException:
            perturbation.restore()
            state.phase = Phase.AT_W
            raise
        # Inside one autocast block the second forward would otherwise use the casts of w that the first one cached.
        torch.clear_autocast_cache()
        return True

    @grad_mode(False)  # an exception may come from where gradients are enabled
    def _restore(self) -> None:
        state = self._state
        if state.phase is Phase.AT_W:
            return
        writing = state.phase is not Phase.ABOVE  # perturb goes on when the signal handler that called is done
        state.perturbation.restore(again=writing)
        state.phase = Phase.INTERRUPTED if writing else Phase.AT_W
        torch.clear_autocast_cache()

    def _start(self) -> None:
        state = self._state = State(self._backend, DIRECTIONS[self.direction](self.base_optimizer))
        after_zero_grad(self.base_optimizer, self._after_zero_grad)
        around_step(self.base_optimizer, self._before_base_step, self._after_base_step)
        if self.closure_passes != "one":
            self._mark_stale()
        misuse.register(self)
        # Not __del__: Lightning's wrapper inherits from this class, and is collected while the step goes on.
        weakref.finalize(self, misuse.restore_unfinished, state).atexit = False

    def _mark_stale(self) -> None:
        self._state.stale.mark(self._parameters())

    def _mark_group_stale(self, params: list[Tensor]) -> None:
        for sam in misuse.around(self.base_optimizer):
            sam._state.stale.mark(params)

    def _after_zero_grad(self, gone: bool) -> None:
        state = self._state
        if state.between is not None:
            state.between.forgive()
        if state.clearing is not None:
            state.clearing.cleared = True
        if not gone:
            self._mark_stale()

    def _before_base_step(self) -> int | None:
        """Returns how many steps are completed where somebody else steps the base optimizer; else None."""
        if self._state.perturbed:
            raise RuntimeError(
                "the base optimizer's step() was called while the weights are perturbed (w + e_w): call second_step(), "
                "which restores w and steps, or restore() first"
            )
        if self._state.stepping or is_state_initialisation(self.base_optimizer):
            return None
        self._complete_groups()
        return self._steps

    def _after_base_step(self, completed: int | None) -> None:
        if completed is not None:
            self._end_between()
            self._count_step(completed)
            self._opt_called = True  # to a scheduler, which would warn that there was no step

    def _end_between(self) -> None:
        if self._state.between is not None:
            self._state.between.end()
            self._state.between = None

    def _require_idle(self, what: str) -> None:
        if self._state.perturbed:
            raise RuntimeError(
                f"{what} while the weights are perturbed (w + e_w): finish the step with second_step(), or call "
                "restore() to go back to w"
            )


def _call_pre_hook(hook: Callable[..., Any], sam: FusedSAM, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of step() after a pre-hook; as torch has it."""
    result = hook(sam, args, kwargs)
    if result is None:
        return args, kwargs
    if isinstance(result, tuple) and len(result) == 2:
        return result
    raise RuntimeError(f"{hook} must return None or a tuple of (new_args, new_kwargs), but got {result!r}")


class SAM(FusedSAM):
    """`FusedSAM` by davda54/sam's name and signature: some training code asks for the name of the class.

    Args:
        params: as in `FusedSAM`.
        base_optimizer: the class of the base optimizer, or another function that makes one from params.
        rho: radius of the neighbourhood, >= 0.
        adaptive: climb by ASAM's scale-invariant rule.
        **kwargs: options of the base optimizer, and the keywords of `FusedSAM`.
    """

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        rho: float | Tensor = 0.05,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    __init__.__signature__ = inspect.signature(get_overloads(__init__)[0], eval_str=True)  # type: ignore[attr-defined]
