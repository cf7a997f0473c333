"""Backends: norm, perturb and restore of one bucket, four files of one signature. This module picks one.

A backend module offers what `Backend` names, and may have an ``obstacle()`` that says why what could be imported cannot
serve here. It knows buckets and the scalars of an ascent, and nothing of optimizers or of other backends.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Protocol, cast

import torch

from fastsam.ascent import Ascent
from fastsam.bucket import ParameterBucket

__all__ = ["BACKENDS", "Backend", "available_backends", "default", "load", "missing"]

BACKENDS = ("triton", "cuda", "cpp", "foreach", "reference")
"""Names, best first."""

_DEVICES = {"triton": "cuda", "cuda": "cuda", "cpp": "cpu"}
"""The only device type that a backend serves; those not named serve any. Under TRITON_INTERPRET=1 Triton serves CPU
tensors instead, slowly: for tests, and never by default."""

_MODULES = {"cpp": "native"}
"""The file of a backend, where its name is not the backend's."""


class Backend(Protocol):
    """The one signature. All calls are asynchronous on the current stream of the bucket's device."""

    def chunk_size(self, numel: int) -> int:
        """Elements in a chunk, by number of elements in the bucket."""

    def norm(self, bucket: ParameterBucket, ascent: Ascent, finish: bool) -> None:
        """Writes the bucket's entry of ``ascent.square_sums``; with `finish` also what `combine` writes."""

    def combine(self, ascent: Ascent) -> None:
        """Writes ``ascent.norm`` and ``ascent.scale`` from ``ascent.square_sums``."""

    def perturb(self, bucket: ParameterBucket, ascent: Ascent) -> None:
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
    names = [name for name in BACKENDS if _DEVICES.get(name, device.type) == device.type == _device_type(name, device)]
    return next(name for name in names if missing(name) is None)


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
    device_type = _device_type(name, device)
    if device_type != device.type:
        raise ValueError(f"backend {name!r} serves {device_type} tensors, but a parameter is on {device}")
    reason = missing(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is missing: {reason}")
    return _module(name)


def check_name(name: str) -> None:
    """Raises a ValueError that lists the backends, unless `name` is one of them."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, but got {name!r}")


def _device_type(name: str, device: torch.device) -> str:
    """The device type that a backend serves: the one of `device` where it serves any."""
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    return _DEVICES.get(name, device.type)


def _module(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"fastsam.backends.{_MODULES.get(name, name)}"))
