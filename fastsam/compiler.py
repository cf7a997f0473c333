"""torch.compile stays out of FusedSAM, for one graph break a call, but not out of the closures that a step runs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch._compile import _disable_dynamo

try:
    from torch._C._dynamo.eval_frame import set_eval_frame
except ImportError:  # there is no compiler: nothing to keep out

    def set_eval_frame(callback: Any) -> Any:  # type: ignore[misc]
        return None


__all__ = ["compiled", "uncompiled"]

P = ParamSpec("P")
R = TypeVar("R")


class _Outside(threading.local):
    """What compiles frames where the step under way was called; None where nothing does."""

    callback: Any = None


_outside = _Outside()


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Keeps the compiler out of `function` and of all that it calls, but for what it calls by `compiled`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        callback = set_eval_frame(None)
        before, _outside.callback = _outside.callback, callback
        try:
            return function(*args, **kwargs)
        finally:
            _outside.callback = before
            set_eval_frame(callback)

    return _disable_dynamo(run, recursive=False)


def compiled(function: Callable[[], R]) -> R:
    """Calls `function` with the compiler on again, where the `uncompiled` one around was called with it on."""
    callback = set_eval_frame(_outside.callback)
    try:
        return function()
    finally:
        set_eval_frame(callback)
