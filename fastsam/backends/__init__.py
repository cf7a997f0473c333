"""Backends: norm, perturb and restore of one bucket, five files of one signature. This module picks one.

A backend module offers what `Backend` names, and may have an ``obstacle()`` that says why what could be imported cannot
serve here. A backend knows buckets and the scalars of a device. It knows nothing of optimizers or of other backends.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Protocol, cast

import torch

from fastsam.bucket import ParameterBucket
from fastsam.scalars import Scalars

__all__ = ["BACKENDS", "Backend", "available_backends", "default", "load", "missing"]

BACKENDS = ("triton", "cuda", "cpp", "foreach", "reference")
"""Names, best first."""


class Backend(Protocol):
    """The one signature. All calls are asynchronous on the current stream of the bucket's device."""

    DEVICE: str | None
    """The only device type that the backend serves; None: it serves any."""

    def chunk_size(self, numel: int) -> int:
        """Elements in a chunk, by number of elements in the bucket."""

    def norm(self, bucket: ParameterBucket, scalars: Scalars, finish: bool) -> None:
        """Writes the bucket's entry of ``scalars.square_sums``; with `finish` also what `combine` writes."""

    def combine(self, scalars: Scalars) -> None:
        """Writes ``scalars.norm`` and ``scalars.scale`` from ``scalars.square_sums``."""

    def perturb(self, bucket: ParameterBucket, scalars: Scalars) -> None:
        """Saves the live weights, then w <- w + e_w; where the norm is not finite w stays, bit for bit."""

    def restore(self, bucket: ParameterBucket) -> None:
        """w <- saved w, bit for bit. Where the last perturb saved nothing (it failed), this does nothing."""


def available_backends() -> tuple[str, ...]:
    """The names of the backends that work in this process, best first.

    It does not initialise CUDA, so that processes may still be forked. What only CUDA tells, as that a GPU is too old,
    counts once something else has initialised it.

    Returns:
        Some of ``("triton", "cuda", "cpp", "foreach", "reference")``.
    """
    return tuple(name for name in BACKENDS if missing(name) is None)


def missing(name: str) -> str | None:
    """Why a backend does not work here, and the command that gets it; None when it works.

    Args:
        name: one of `BACKENDS`.
    """
    return _missing(name, torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@functools.cache
def _missing(name: str, cuda_is_initialized: bool) -> str | None:
    """A backend sees for itself whether CUDA is initialised; the argument keeps the answers apart."""
    try:
        module = _module(name)
    except ImportError as error:
        return str(error)
    obstacle: Callable[[], str | None] | None = getattr(module, "obstacle", None)
    return obstacle() if obstacle is not None else None


def default(device: torch.device) -> str:
    """The name of the backend that is used for a device when none is asked for."""
    for name in BACKENDS:
        interpreted = name == "triton" and device.type == "cpu"  # slow: for tests, which ask for it by name
        if not interpreted and missing(name) is None and _module(name).DEVICE in (None, device.type):
            return name
    raise AssertionError("the reference backend serves any device")


def load(name: str | None, device: torch.device) -> Backend:
    """The backend to use for a device.

    Args:
        name: one of `BACKENDS`; None takes the environment variable ``FASTSAM_BACKEND``, or else the default.
        device: of the bucket.

    Raises:
        ValueError: there is no backend of that name, or it does not serve that device.
        RuntimeError: it is missing here; the message says why, and the command that gets it.
    """
    if name is None:
        name = os.environ.get("FASTSAM_BACKEND") or default(device)
    check_name(name)
    reason = missing(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is missing: {reason}")
    module = _module(name)
    if module.DEVICE not in (None, device.type):
        raise ValueError(f"backend {name!r} serves {module.DEVICE} tensors, but a parameter is on {device}")
    return module


def check_name(name: str) -> None:
    """Raises a ValueError that lists the backends, unless `name` is one of them."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, but got {name!r}")


def _module(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"fastsam.backends.{name}"))
