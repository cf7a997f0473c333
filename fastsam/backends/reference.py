"""The algorithm, one parameter at a time, in plain PyTorch: what every other backend is tested against.

Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving Generalization", arXiv 2010.01412, Eq. 2 with
p = 2, and its adaptive form (ASAM), Kwon et al. 2021, arXiv 2102.11600:

    norm  = sqrt( sum_i ||g_i||^2 )            adaptive: || |w| * g ||
    e_w   = g * scale                          adaptive: w^2 * g * scale,     scale = rho / (norm + epsilon)
    w    <- w + e_w

Deviations: none in the arithmetic of davda54/sam in fp32 and fp64. For 16-bit parameters all of it is done in fp32 and
rounded once, at the store. Where the norm is not finite the weights stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsam.bucket import ParameterBucket
from fastsam.scalars import Scalars

__all__ = ["DEVICE", "chunk_size", "combine", "norm", "perturb", "restore"]

DEVICE: str | None = None


def chunk_size(numel: int) -> int:
    """Elements in a chunk: this backend uses none."""
    return max(numel, 1)


def norm(bucket: ParameterBucket, scalars: Scalars, finish: bool) -> None:
    """Sums the squares of the bucket's gradients; with `finish` (no other bucket to wait for) also combines."""
    bucket.set_saved(0)
    bucket.free_backup()
    square_sum = torch.zeros_like(scalars.square_sums[bucket.index])
    for group, w, g in bucket.terms():
        term = g
        if scalars.groups_adaptive[group]:
            term = widen(w).abs() * g
        # In fp64: on CPU, torch's fp32 norm of 1e8 elements is 0.8 % short.
        square_sum += torch.linalg.vector_norm(term, dtype=square_sum.dtype) ** 2
    scalars.square_sums[bucket.index] = square_sum
    if finish:
        combine(scalars)


def combine(scalars: Scalars) -> None:
    """norm and scale from the sums of all buckets."""
    scalars.norm.copy_(scalars.square_sums.sum().sqrt())
    scale = (scalars.norm + scalars.epsilon).reciprocal() * scalars.rho
    scalars.scale.copy_(torch.where(scalars.norm.isfinite() & scale.isfinite(), scale, 0))


def perturb(bucket: ParameterBucket, scalars: Scalars) -> None:
    """Saves w, then w <- w + e_w."""
    backup = bucket.allocate_backup()
    for view, w in zip(bucket.live_views(backup), bucket.live_weights(), strict=True):
        view.copy_(w)
    bucket.backup = backup
    bucket.set_saved(bucket.next_generation())
    finite = scalars.norm.isfinite()
    for group, weight, g in bucket.terms():
        w = widen(weight)
        scale = scalars.scale[group].to(w.dtype)
        if scalars.groups_adaptive[group]:
            e_w = w**2 * g * scale
        else:
            e_w = g.to(w.dtype) * scale
        weight.copy_(torch.where(finite, w + e_w, w))


def restore(bucket: ParameterBucket) -> None:
    """w <- saved w, bit for bit; nothing where nothing was saved."""
    backup = bucket.backup  # once: a signal handler may restore in between
    if backup is None:
        return
    for w, view in zip(bucket.live_weights(), bucket.live_views(backup), strict=True):
        w.copy_(view)
    bucket.free_backup()


def widen(w: Tensor) -> Tensor:
    """w in the dtype of the arithmetic: fp64 for fp64, else fp32."""
    return w.to(torch.float64 if w.dtype is torch.float64 else torch.float32)
