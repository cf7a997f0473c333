"""FusedSAM: the state machine around a base optimizer (idle -> perturbed -> idle)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar, cast, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fastsam import amp, closures, misuse
from fastsam.arguments import ContextFactory, bind, signature
from fastsam.closures import Closure, Passes
from fastsam.compiler import compiled, uncompiled
from fastsam.direction import GRADIENT, momentum_of
from fastsam.distributed import local
from fastsam.freshness import ClearingWatch, PlainStep, after_zero_grad, around_step
from fastsam.grad_mode import grad_mode
from fastsam.notices import tell_once
from fastsam.options import COUNTER, check_one_pass
from fastsam.perturbation import flatten_groups, gradient_norm, no_gradient_error
from fastsam.profiler import label
from fastsam.state import State
from fastsam.wrapper import OptimizerWrapper, or_default

__all__ = ["SAM", "FusedSAM"]

P = ParamSpec("P")
R = TypeVar("R")


class FusedSAM(OptimizerWrapper):
    r"""Sharpness-aware minimization around any torch optimizer.

    Foret et al. 2021, arXiv 2010.01412, Eq. 2 with p = 2; ``adaptive=True`` is ASAM, arXiv 2102.11600:

    .. code-block:: text

        norm  = sqrt( sum_i ||g_i||^2 )          over all groups;   adaptive: of |w| * g
        e_w   = rho * g / (norm + epsilon)                          adaptive: w^2 * g * rho / (norm + epsilon)
        w    <- w + e_w                          first_step: climb to the worst nearby point
        g'    = gradient at w + e_w              your second forward and backward
        w    <- saved w                          second_step: bit for bit
        the base optimizer steps at w with g'

    Two forms of call. The type of the first argument decides:

    .. code-block:: text

        FusedSAM(params, base_optimizer_class, rho=0.05, adaptive=False, *, epsilon=1e-12, interval=1, backend=None,
                 first_pass_context=None, grad_scaler=None, flatten_parameters=False, closure_passes="auto",
                 start=0, direction="gradient", **base_optimizer_kwargs)
        FusedSAM(base_optimizer, rho=0.05, epsilon=1e-12, interval=1, *, adaptive=False, backend=None,
                 first_pass_context=None, grad_scaler=None, flatten_parameters=False, closure_passes="auto",
                 start=0, direction="gradient")

    ``param_groups`` and ``state`` are the base optimizer's own, so schedulers, checkpoints and hooks see one optimizer.
    ``rho``, ``epsilon`` and ``adaptive`` are keys of the param groups, and may differ between them and change while
    training.

    Args:
        params: parameters as torch's optimizers take them: tensors, (name, tensor) pairs or group dicts.
        base_optimizer: an optimizer class, or another function that makes one from params (first form); or an
            optimizer (second form).
        rho: radius of the neighbourhood, >= 0; a float or a 0-d tensor.
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
        closure_passes: which gradients `step(closure)` takes for those at w. "one": those that are there, so that the
            closure runs once, at w + e_w, as in davda54/sam; "two": the closure computes both, as in torch.optim,
            Lightning and Composer; "auto": those that are there where a backward wrote them since the last step.
        start: the first step, counted from 0, that may be a SAM step; those before are plain. SAM in the last part of
            training finds flat minima too (arXiv 2410.10373): ``start=int(0.7 * steps)`` costs 1.3 times the base.
        direction: "gradient"; or "momentum", Momentum-SAM (arXiv 2401.12033): e_w = -rho * v / (||v|| + epsilon) with
            the base optimizer's own momentum v, ``momentum_buffer`` or ``exp_avg``. So a step has one gradient, at
            w + e_w: `step(closure)` runs the closure once, and `first_step` comes before the only backward. Parameters
            without momentum yet are not perturbed; the first step, where none has one, is plain.
        **base_optimizer_kwargs: options of the base optimizer (first form).

    Raises:
        TypeError: an argument of the wrong type; a parameter that is complex or integer and takes a gradient.
        ValueError: an argument out of range; a base optimizer that has an option of the same name, or that computes its
            step from closures (LBFGS) or sparse gradients (SparseAdam).
        RuntimeError: the backend that was asked for is missing.

    Example:
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
    ) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        arguments = bind(*args, **kwargs)
        base = arguments.base_optimizer
        misuse.restore_left_perturbed(base)
        self.__setstate__(
            {
                "base_optimizer": base,
                "defaults": {**base.defaults, **arguments.options},
                "_settings": {
                    "interval": arguments.interval,
                    "closure_passes": arguments.closure_passes,
                    "start": arguments.start,
                    "direction": arguments.direction,
                },
                "first_pass_context": arguments.first_pass_context,
                "grad_scaler": arguments.grad_scaler,
                "flatten_parameters": arguments.flatten_parameters,
                "_backend": arguments.backend,
            }
        )
        if self.flatten_parameters:
            flatten_groups(self.param_groups)

    __init__.__signature__ = signature()  # type: ignore[attr-defined]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """A GradScaler then always calls step(), which must undo the perturbation, and leaves the rest to fastsam.amp.

        In a closure it is Lightning that asks, before it clips: it clips no gradients that may carry a loss scale.
        """
        return not self._state.clippable

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
        return self.direction == "gradient" and self.is_sam_step and not self.perturbed

    @property
    def grad_norm(self) -> Tensor | None:
        """The global gradient norm of the last ascent: a 0-d tensor on the device, None before the first.

        Without the loss scale, where `grad_scaler` is known; else with it. The momentum's under direction="momentum".
        """
        norm, scale = self._state.perturbation.norm, self._state.loss_scale
        if norm is None:
            return None
        return norm.clone() if scale is None else norm / scale.to(norm.device, non_blocking=True)

    @_disable_dynamo
    @grad_mode(False)
    def _grad_norm(self) -> Tensor:
        """davda54/sam's method: the global norm of the gradients that are there now, 0-d, whatever step this is.

        `grad_norm` is for nothing, and of the ascent.
        """
        return gradient_norm(self.param_groups)

    @_disable_dynamo
    @grad_mode(False)
    def first_step(self, zero_grad: bool = False) -> bool:
        """Saves w and climbs: w <- w + e_w, by the gradients that are there, or by the momentum.

        Args:
            zero_grad: clear the gradients afterwards.

        Returns:
            True; or False on a plain step, as `start` and `interval` say: then nothing happened, the gradients are
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
        try:
            climbed = self.is_sam_step and self._perturb()
            if climbed and zero_grad:
                self.zero_grad()
        except BaseException:
            self._restore()
            raise
        if not climbed:
            self._rehearse()
            self._end_plain_step()
            self._state.plain_step = PlainStep(self._parameters() if self.direction == "gradient" else ())
        return climbed

    @_disable_dynamo
    def second_step(self, zero_grad: bool = False) -> None:
        """Restores w, bit for bit, and steps the base optimizer with the gradients that are there.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: not perturbed, on a step that is a SAM step.
        """
        closures.before_second_step(self)
        state = self._state
        state.clears = zero_grad
        try:
            self.step()
            if zero_grad:
                self.zero_grad()
        except BaseException:
            self._mark_stale()
            raise
        finally:
            state.clears = False

    @grad_mode(False)
    def step(self, closure: Closure | None = None) -> Any:
        """One whole step with a closure; without one, what `second_step` does.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss. When gradients were
                computed since the last step they are taken for those at w, and the closure runs once, at w + e_w;
                otherwise it runs twice (`closure_passes` says which, whatever is there). On a plain step it runs once,
                or not at all. The gradients are cleared between the passes. After `first_step` it runs once.

        Returns:
            The loss at w, where the closure computed it; else None. That at w + e_w with direction="momentum".

        Raises:
            RuntimeError: no closure, not perturbed, and this is a SAM step; or no gradient at w; or a GradScaler was
                used in a way that can't work.
            Exception: whatever the closure raises, after w is restored bit for bit.
        """
        self._complete_groups()
        idle = not (self._state.perturbed or self._state.plain_step)
        if closure is None and idle and self._is_state_initialisation():
            self.base_optimizer.step()
            return None
        loss, valid = self._run(closure)
        self._restore()
        self._rehearse()
        if valid:
            amp.step(self.grad_scaler, self, self.base_optimizer)
        self._count_step()
        return loss

    @staticmethod
    def profile_hook_step(func: Callable[P, R]) -> Callable[P, R]:
        """What torch puts around `step` to run the hooks; the global ones are left to the base optimizer's step.

        torch.compile stays out of it too, for one graph break, but for the closure.
        """

        @functools.wraps(func)
        def step(*args: P.args, **kwargs: P.kwargs) -> R:
            sam = cast(FusedSAM, args[0])
            sam._state.stepping = True
            # Around the hooks too: what fails in one must not leave the weights perturbed either.
            try:
                with label(f"Optimizer.step#{type(sam).__name__}.step"):
                    for pre_hook in sam._optimizer_step_pre_hooks.values():
                        args, kwargs = or_default(pre_hook(sam, args, kwargs), (args, kwargs))
                    out = func(*args, **kwargs)
                    for post_hook in sam._optimizer_step_post_hooks.values():
                        post_hook(sam, args, kwargs)
                    return out
            except BaseException:
                sam._restore()
                sam._mark_stale()
                amp.forget(sam)
                raise
            finally:
                sam._state.stepping = False
                sam._end_plain_step()

        return uncompiled(step)

    @_disable_dynamo
    def restore(self) -> None:
        """Back to w, bit for bit, without a step; nothing to do when not perturbed.

        The interrupted step ends here and is not counted. Call it before saving a model in a signal handler.
        """
        if self._state.perturbed or self._state.perturbing:
            self._restore()
            self._mark_stale()

    def __enter__(self) -> FusedSAM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Leaves no perturbation behind, whatever happened in the block."""
        self.restore()

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _run(self, closure: Closure | None) -> tuple[Any, bool]:
        """The passes of one step, up to where the weights are still perturbed.

        Returns:
            The loss at w, and whether the base optimizer may step by the gradients that are there.
        """
        passes = None if closure is None else self._passes(closure)
        if passes is None or passes.empty:
            plain = self.direction == "momentum" and self._state.plain_step is not None
            if not self._state.perturbed and self.is_sam_step and not plain:
                raise RuntimeError(
                    "the weights are not perturbed, so there is nothing to step from: call first_step() and compute "
                    "the gradients again before step() or second_step(), or pass step() a closure"
                    + closures.advice(amp.in_scaler_step(self))
                )
            misuse.check_second_pass(self._state, self.param_groups, self.direction == "momentum")
            if passes is not None:
                self._call(passes.plain)  # for the trainer's hooks
            return None, True
        if amp.in_scaler_step(self):
            raise RuntimeError(
                "scaler.step(sam, closure) can't work: the scaler looks for infinite gradients before the closure "
                "computes any. Use FusedSAM(..., grad_scaler=scaler) and sam.step(closure), or first_step(), a second "
                "backward and scaler.step(sam)"
            )
        misuse.check_lost(self._lost, self.grad_scaler, self.first_pass_context)
        if self.direction == "momentum":
            return self._run_only_pass(passes)
        loss, taken = None, False
        if not self._state.perturbed:
            is_sam_step = self.is_sam_step
            taken = not passes.by_trainer and self._gradients_are_there()
            if not taken:
                # Not around the only pass of a plain step: that gradient is what the base optimizer steps by.
                context = self.first_pass_context if is_sam_step else None
                with nullcontext() if context is None else context():
                    loss = self._call(passes.at_w if is_sam_step else passes.plain)
                if passes.by_trainer and loss is None:
                    return None, False
            if not is_sam_step:
                return loss, True
            self._perturb()
            self.zero_grad()
        loss_above = self._call_above(passes.above) if taken else self._call(passes.above)
        self._check_still_perturbed()
        return loss, not (passes.by_trainer and loss_above is None)

    def _run_only_pass(self, passes: Passes) -> tuple[Any, bool]:
        """As `_run`, along the momentum: the closure runs once, where that leads."""
        check_one_pass(self.closure_passes, self.first_pass_context)
        climbed = self._state.perturbed
        if not climbed and self.is_sam_step and self._perturb():
            climbed = True
            self.zero_grad()  # those at w, of a loop that was written for SAM
        loss = self._call(passes.plain)
        if climbed:
            self._check_still_perturbed()
        return loss, not (passes.by_trainer and loss is None)

    def _check_still_perturbed(self) -> None:
        if not self._state.perturbed:
            raise RuntimeError("restore() was called, by a signal handler, while the closure ran at w + e_w")

    def _rehearse(self) -> None:
        """Meets on the first plain step what a SAM step would refuse: `start` must not fail at 70 % of a run."""
        if not self._state.rehearsed and not self._state.perturbation.buckets:
            self._state.rehearsed = self._state.perturbation.rehearse(self.param_groups)

    def _gradients_are_there(self) -> bool:
        """Whether a closure is to find the gradients at w, and not to compute them."""
        if self.closure_passes == "two":
            return False
        fresh = self._state.stale.any_fresh(self._parameters())
        if not fresh and self.closure_passes == "one":
            raise RuntimeError(
                "closure_passes='one' takes the gradients at w that are there, but no backward has written any since "
                "the last step: call loss.backward() before step(closure), or use closure_passes='two'"
            )
        return fresh

    def _call_above(self, closure: Closure) -> Any:
        """Runs a closure once, at w + e_w, by the gradients that were there; says so where it seems to be a mistake."""
        state = self._state
        moved = None if state.watched or self.closure_passes != "auto" else state.perturbation.smallest()
        if moved is None:
            return self._call(closure)
        state.watched = True
        state.clearing = ClearingWatch(moved)
        try:
            loss = self._call(closure)
        finally:
            cleared, state.clearing = state.clearing.end(), None
        if cleared:
            tell_once(
                "closure passes",
                "step(closure) took the gradients that were there for those at w, and ran the closure once, at w + e_w "
                "- but the closure clears the gradients, as one does that computes both. If it is to compute both, use "
                "FusedSAM(..., closure_passes='two'), or clear the gradients before step(closure); if those that were "
                "there are the ones at w, use closure_passes='one'",
            )
        return loss

    def _count_step(self) -> None:
        for group in self.param_groups:
            group[COUNTER] += 1
        if not self._state.clears:
            self._mark_stale()

    def _passes(self, closure: Closure) -> Passes:
        return Passes.of(closure)

    @grad_mode(True)
    def _call(self, closure: Closure) -> Any:
        with self._clippable():
            return compiled(closure)

    @contextmanager
    def _clippable(self) -> Generator[None, None, None]:
        """Where Lightning may clip; see `_step_supports_amp_scaling`."""
        self._state.clippable = True
        try:
            yield
        finally:
            self._state.clippable = False

    def _perturb(self) -> bool:
        """Climbs; returns False where there is no momentum yet to climb along."""
        state = self._state
        amp.check_first_gradient(self.grad_scaler, self, self.base_optimizer)
        there = False
        try:
            there = state.perturbation.measure(self.param_groups)
        finally:
            if not there:
                state.perturbation.release()
        if self.direction == "momentum":
            misuse.check_momentum(state, self.base_optimizer, self._parameters(), self._steps, there)
        elif not there:
            raise no_gradient_error()
        if not there:
            return False
        state.loss_scale = amp.loss_scale(self.grad_scaler) if self.direction == "gradient" else None
        # Before the first write: from here on a failure, or a signal handler that calls restore(), finds what to do.
        # Buckets know themselves how far perturb got.
        state.perturbing = state.perturbed = True
        try:
            state.perturbation.perturb()
            if not state.perturbed:
                raise RuntimeError("restore() was called, by a signal handler, while first_step() was under way")
        except BaseException:
            state.perturbation.restore()
            state.perturbed = False
            raise
        finally:
            state.perturbing = False
        state.witness = state.perturbation.witness()
        # Inside one autocast block the second forward would otherwise use the casts of w that the first one cached.
        torch.clear_autocast_cache()
        return True

    @grad_mode(False)  # an exception may come from where gradients are enabled
    def _restore(self) -> None:
        # Also after a first signal, in whose wake perturb still writes.
        if self._state.perturbed or self._state.perturbing:
            self._state.perturbation.restore(again=self._state.perturbing)
            self._state.perturbed = False
            torch.clear_autocast_cache()

    def _is_state_initialisation(self) -> bool:
        """Whether this is torch.distributed.checkpoint filling the base's state: lr 0, gradients zero or none.

        It does so only where there is no state. So the host looks at gradients, and waits for the device, at most where
        step() without a closure is an error otherwise, or the first plain step of a schedule that begins at lr 0.
        """
        if self.state:
            return False
        for group in self.param_groups:
            lr = group.get("lr", 0.0)
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                return False
            if lr != 0:
                return False
        return not any(local(p.grad).any() for p in self._parameters() if p.grad is not None)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _start(self) -> None:
        direction = momentum_of(self.base_optimizer) if self.direction == "momentum" else GRADIENT
        state = self._state = State(self._backend, direction)
        after_zero_grad(self.base_optimizer, self._after_zero_grad)
        around_step(self.base_optimizer, self._before_base_step, self._after_base_step)
        if self.closure_passes != "one":
            self._mark_stale()
        misuse.alive.add(self)
        # Not __del__: Lightning's wrapper inherits from this class, and is collected while the step goes on.
        weakref.finalize(self, misuse.restore_collected, state).atexit = False

    def _mark_stale(self, params: list[Tensor] | None = None) -> None:
        self._state.stale.mark(self._parameters() if params is None else params)

    def _after_zero_grad(self, gone: bool) -> None:
        state = self._state
        if state.plain_step is not None:
            state.plain_step.forgive()
        if state.clearing is not None:
            state.clearing.cleared = True
        if not gone:
            self._mark_stale()

    def _before_base_step(self) -> None:
        if self._state.perturbed:
            raise RuntimeError(
                "the base optimizer's step() was called while the weights are perturbed (w + e_w): call second_step(), "
                "which restores w and steps, or restore() first"
            )

    def _after_base_step(self) -> None:
        if not self._state.stepping:  # somebody steps the base optimizer by itself
            self._mark_stale()

    def _end_plain_step(self) -> None:
        if self._state.plain_step is not None:
            self._state.plain_step.end()
            self._state.plain_step = None

    def _require_idle(self, what: str) -> None:
        if self._state.perturbed:
            raise RuntimeError(
                f"{what} while the weights are perturbed (w + e_w): finish the step with second_step(), or call "
                "restore() to go back to w"
            )


class SAM(FusedSAM):
    """`FusedSAM` by davda54/sam's name and signature: some training code asks for the name of the class.

    Args:
        params: as in `FusedSAM`.
        base_optimizer: the class of the base optimizer, or another function that makes one from params.
        rho: radius of the neighbourhood, >= 0.
        adaptive: climb by ASAM's scale-invariant rule.
        **kwargs: options of the base optimizer, and the keywords of `FusedSAM`.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        rho: float | Tensor = 0.05,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho, adaptive, **kwargs)
