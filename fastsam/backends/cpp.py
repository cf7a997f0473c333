"""The native library: C++ on CPU, one parallel region for each pass over a bucket (on CUDA: cuda.py).

The ops are private. They reach memory through pointer tables, which no schema can tell of: so they are called only
where torch.compile does not trace, and the versions of the weights are incremented here.
"""

from __future__ import annotations

import importlib

import torch

from fastsam._distribution import why_missing
from fastsam.bucket import ParameterBucket
from fastsam.scalars import Scalars

try:
    importlib.import_module("fastsam._C")
except ImportError as error:
    raise ImportError(why_missing(error)) from None

__all__ = ["DEVICE", "chunk_size", "combine", "norm", "perturb", "restore"]

DEVICE: str | None = "cpu"

_ops = torch.ops.fastsam


def chunk_size(numel: int) -> int:
    """Elements in a chunk: 64 KB of fp32, which stays in a core's cache between two uses."""
    return 16384


def norm(bucket: ParameterBucket, scalars: Scalars, finish: bool) -> None:
    """Sums the squares of the bucket's gradients; with `finish` (no other bucket to wait for) also combines."""
    _norm(
        bucket.chunks,
        bucket.weight_table.tensor,
        bucket.grad_table.tensor,
        bucket.dtype,
        bucket.index,
        finish,
        bucket.partials,
        scalars.adaptive,
        scalars.rho,
        scalars.epsilon,
        scalars.square_sums,
        scalars.norm,
        scalars.scale,
        bucket.saved,
        bucket.counter,
    )


def combine(scalars: Scalars) -> None:
    """norm and scale from the sums of all buckets."""
    _combine(scalars.rho, scalars.epsilon, scalars.square_sums, scalars.norm, scalars.scale)


def perturb(bucket: ParameterBucket, scalars: Scalars) -> None:
    """Saves w and w <- w + e_w, in one pass. On CPU the backup is kept: fresh memory costs more than the pass."""
    if bucket.backup is None:
        bucket.backup = bucket.allocate_backup()
    _perturb(
        bucket.chunks,
        bucket.weight_table.tensor,
        bucket.grad_table.tensor,
        scalars.adaptive,
        scalars.norm,
        scalars.scale,
        bucket.backup,
        bucket.saved,
        bucket.next_generation(),
    )
    torch.autograd.graph.increment_version(bucket.live_weights())


def restore(bucket: ParameterBucket) -> None:
    """w <- saved w, bit for bit; nothing where nothing was saved."""
    backup = bucket.backup  # once: a signal handler may restore in between
    if backup is None:
        return
    _restore(
        bucket.chunks, bucket.weight_table.tensor, bucket.grad_table.tensor, backup, bucket.saved, bucket.generation
    )
    torch.autograd.graph.increment_version(bucket.live_weights())


_norm = _ops.norm.default
_combine = _ops.combine.default
_perturb = _ops.perturb.default
_restore = _ops.restore.default
