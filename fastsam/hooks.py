"""What FusedSAM hangs on its base optimizer, to see when somebody steps it or clears its gradients."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, Generic, TypeVar, cast

from torch.optim import Optimizer

from fastsam.torch_api import recording

__all__ = ["after_zero_grad", "around_step"]

T = TypeVar("T")

_ZERO_GRAD = Optimizer.zero_grad


def around_step(base: Optimizer, before: Callable[[], T | None], after: Callable[[T | None], None]) -> None:
    """Makes base.step call `before` and, where it succeeds, `after`, as long as the FusedSAM around it lives.

    Args:
        base: the optimizer inside.
        before: a method of the FusedSAM around it, which is not kept alive.
        after: another one, which is given what `before` returned; None where a copy of `base` was stepped.
    """
    around = _Around(base, before, after)
    if getattr(type(base).step, "hooked", False):
        for handle in (
            base.register_step_pre_hook(lambda optimizer, args, kwargs: around.before(optimizer)),
            base.register_step_post_hook(lambda optimizer, args, kwargs: around.after()),
        ):
            weakref.finalize(cast(Any, before).__self__, handle.remove).atexit = False
        return
    # torch puts no hooks around this step. Schedulers want a bound method in its place.
    step = getattr(vars(base).get("step"), "__func__", None)
    if not isinstance(step, _Step) or step.base() is not base:
        step = _Step(base)
        base.step = MethodType(step, base)  # type: ignore[method-assign]
    step.around[:] = [*(other for other in step.around if other.alive), around]


class _Around(Generic[T]):
    """What one FusedSAM does before and after each step of its base optimizer; keeps neither alive."""

    def __init__(self, base: Optimizer, before: Callable[[], T | None], after: Callable[[T | None], None]) -> None:
        self._base = weakref.ref(base)
        self._before, self._after = weakref.WeakMethod(before), weakref.WeakMethod(after)
        self._found: T | None = None

    @property
    def alive(self) -> bool:
        """Whether the FusedSAM is."""
        return self._before() is not None

    def before(self, optimizer: object) -> None:
        """Called before the step of `optimizer`, which may be a copy that brought its hooks along."""
        method = self._before()
        self._found = method() if method is not None and optimizer is self._base() else None

    def after(self) -> None:
        """Called after it."""
        if (method := self._after()) is not None:
            method(self._found)


class _Step:
    """Stands for `step` of one optimizer whose class has no hooks.

    Attributes:
        base: a weak reference to the optimizer.
        around: what to call before and after, of each FusedSAM around the optimizer.
    """

    def __init__(self, base: Optimizer) -> None:
        self.base = weakref.ref(base)
        self.around: list[_Around[Any]] = []
        self._own: Callable[..., Any] | None = vars(base).get("step")  # somebody else's, put there before
        functools.update_wrapper(self, type(base).step, updated=())

    def __call__(self, base: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if base is not self.base():  # but a copy, which brought this along
            return type(base).step(base, *args, **kwargs)
        for around in self.around:
            around.before(base)
        result = type(base).step(base, *args, **kwargs) if self._own is None else self._own(*args, **kwargs)
        for around in self.around:
            around.after()
        return result

    def __get__(self, base: Optimizer, owner: type[Optimizer]) -> MethodType:
        return MethodType(self, base)


class _ZeroGrad:
    """Stands for `zero_grad` of one optimizer. A copy or a pickle of the optimizer has its class's own again.

    Attributes:
        marks: what to call afterwards: a method of each FusedSAM around the optimizer, none of which is kept alive.
    """

    def __init__(self, base: Optimizer) -> None:
        self.marks: list[weakref.WeakMethod[Callable[[bool], None]]] = []
        self._base = weakref.ref(base)
        self._own: Callable[..., None] | None = vars(base).get("zero_grad")  # somebody else's, put there before

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        base = cast(Optimizer, self._base())
        lets_go = type(base).zero_grad is _ZERO_GRAD and (args[0] if args else kwargs.get("set_to_none", True))
        if self._own is not None:
            self._own(*args, **kwargs)
        elif lets_go and not recording():
            # As torch does, but without its label, which takes 12 us.
            for group in base.param_groups:
                for p in group["params"]:
                    p.grad = None
        else:
            type(base).zero_grad(base, *args, **kwargs)
        for ref in self.marks:
            if (mark := ref()) is not None:
                mark(bool(lets_go))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._base(), "zero_grad")


def after_zero_grad(base: Optimizer, mark: Callable[[bool], None]) -> None:
    """Makes base.zero_grad call `mark` afterwards: the zeros that it writes are no gradient of a new backward.

    Args:
        base: the optimizer inside.
        mark: a method of the FusedSAM around it, which is not kept alive; it is told whether all gradients are gone.
    """
    patch = vars(base).get("zero_grad")
    if not isinstance(patch, _ZeroGrad):
        patch = base.zero_grad = _ZeroGrad(base)  # type: ignore[method-assign]
    patch.marks[:] = [*(ref for ref in patch.marks if ref() is not None), weakref.WeakMethod(mark)]
