"""What users are told once in a process, however many optimizers they build and steps they take."""

from __future__ import annotations

import inspect
import warnings

__all__ = ["tell_once", "told", "warn"]

told: set[str] = set()
"""What was said already."""


_BETWEEN = frozenset({"contextlib", "fastsam", "torch", "weakref"})
"""The packages between a line of the user's and a warning: fastsam, and what calls or surrounds its functions."""


def warn(text: str) -> None:
    """Warns, and names the user's line that led here: the first that is none of fastsam's, nor of torch's around it."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def tell_once(what: str, text: str) -> None:
    """Warns, the first time that it is asked to.

    Args:
        what: which notice this is.
        text: the warning.
    """
    if what not in told:
        told.add(what)
        warn(text)
