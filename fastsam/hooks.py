"""What FusedSAM hangs on its base optimizer, to see when somebody steps it, loads it or clears its gradients."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, Generic, TypeVar, cast

from torch.optim import Optimizer

from fastsam.torch_api import recording

__all__ = ["after_zero_grad", "around_load", "around_step"]

T = TypeVar("T")

_ZERO_GRAD = Optimizer.zero_grad


def around_step(base: Optimizer, before: Callable[[], T | None], after: Callable[[T | None], None]) -> None:
    """Makes base.step call `before` and, where it succeeds, `after`, as long as the FusedSAM around it lives.

    Args:
        base: the optimizer inside.
        before: a method of the FusedSAM around it, which is not kept alive.
        after: another one, which is given what `before` returned; None where a copy of `base` was stepped.
    """
    _hang(base, "step", getattr(type(base).step, "hooked", False), _Around(base, before, after))


def around_load(base: Optimizer, before: Callable[[], T | None], after: Callable[[T | None], None]) -> None:
    """As `around_step`, of base.load_state_dict."""
    inherited = type(base).load_state_dict is Optimizer.load_state_dict
    by_hooks = inherited and hasattr(base, "_optimizer_load_state_dict_pre_hooks")
    _hang(base, "load_state_dict", by_hooks, _Around(base, before, after))


def _hang(base: Optimizer, name: str, by_hooks: bool, around: _Around[Any]) -> None:
    """Hangs `around` on a method of the base optimizer: by hooks, where torch calls them around this method."""
    if by_hooks:
        for kind, hook in (("pre", around.before), ("post", around.after)):
            handle = getattr(base, f"register_{name}_{kind}_hook")(hook)
            weakref.finalize(around.sam, handle.remove).atexit = False
        return
    # Schedulers want a bound method in the place of step.
    method = getattr(vars(base).get(name), "__func__", None)
    if not isinstance(method, _Method) or method.base() is not base:
        method = _Method(base, name)
        setattr(base, name, MethodType(method, base))
    method.around[:] = [*(other for other in method.around if other.sam is not None), around]


class _Around(Generic[T]):
    """What one FusedSAM does before and after each call of a method of its base optimizer; keeps neither alive."""

    def __init__(self, base: Optimizer, before: Callable[[], T | None], after: Callable[[T | None], None]) -> None:
        self._base = weakref.ref(base)
        self._before, self._after = weakref.WeakMethod(before), weakref.WeakMethod(after)
        self._found: T | None = None

    @property
    def sam(self) -> Any:
        """The FusedSAM; None when it is gone."""
        return getattr(self._before(), "__self__", None)

    def before(self, optimizer: object, *_: Any) -> None:
        """Called before the method of `optimizer`, which may be a copy that shares its hooks."""
        method = self._before()
        self._found = method() if method is not None and optimizer is self._base() else None

    def after(self, *_: Any) -> None:
        """Called after it."""
        if (method := self._after()) is not None:
            method(self._found)

    def __getstate__(self) -> dict[str, Any]:
        """In a copy or a pickle of a base optimizer that brings its hooks along: there is no FusedSAM around that."""
        return dict.fromkeys(vars(self), _nobody)


def _nobody() -> None:
    """What stands for the weak references there."""


class _Method:
    """Stands for a method of one optimizer around which torch calls no hooks.

    Attributes:
        base: a weak reference to the optimizer.
        around: what to call before and after, of each FusedSAM around the optimizer.
    """

    def __init__(self, base: Optimizer, name: str) -> None:
        self.base = weakref.ref(base)
        self.around: list[_Around[Any]] = []
        self._name = name
        self._own: Callable[..., Any] | None = vars(base).get(name)  # somebody else's, put there before
        functools.update_wrapper(self, getattr(type(base), name), updated=())

    def __call__(self, base: Optimizer, *args: Any, **kwargs: Any) -> Any:
        of_class = getattr(type(base), self._name)
        if base is not self.base():  # but a copy, which brought this along
            return of_class(base, *args, **kwargs)
        for around in self.around:
            around.before(base)
        result = of_class(base, *args, **kwargs) if self._own is None else self._own(*args, **kwargs)
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
