"""What users are told once in a process, however many optimizers they build and steps they take."""

from __future__ import annotations

import warnings

__all__ = ["tell_once", "told"]

told: set[str] = set()
"""What was said already."""


def tell_once(what: str, text: str, stacklevel: int = 1) -> None:
    """Warns, the first time that it is asked to.

    Args:
        what: which notice this is.
        text: the warning.
        stacklevel: of the caller, as for `warnings.warn`.
    """
    if what not in told:
        told.add(what)
        warnings.warn(text, stacklevel=stacklevel + 1)
