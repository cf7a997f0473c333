"""torch._foreach_*: a few calls a bucket on any device, for where no kernel of fastsam's own is built.

The arithmetic is the reference's, operation by operation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsam.ascent import Ascent
from fastsam.backends import reference
from fastsam.bucket import ParameterBucket

__all__ = ["chunk_size", "combine", "norm", "perturb", "restore"]

chunk_size = reference.chunk_size
combine = reference.combine


def norm(bucket: ParameterBucket, ascent: Ascent, finish: bool) -> None:
    """Sums the squares of the bucket's gradients; with `finish` (no other bucket to wait for) also combines."""
    bucket.saved.zero_()
    bucket.backup = None
    norms: list[Tensor] = []
    for group, weights, grads in _by_group(bucket):
        terms = grads
        if ascent.groups_adaptive[group]:
            terms = [*torch._foreach_abs(_widen(weights))]
            torch._foreach_mul_(terms, _widen(grads))
        # CPU: torch's fp32 norm of 1e8 elements is 0.8 % short. Elsewhere it is a tree of partial sums.
        dtype = torch.float64 if bucket.device.type == "cpu" else ascent.dtype
        norms += torch._foreach_norm(terms, dtype=dtype)
    square_sum = ascent.square_sums[bucket.index]
    if norms:
        square_sum.copy_(torch.stack(norms).to(square_sum.dtype).square().sum())
    else:
        square_sum.zero_()
    if finish:
        combine(ascent)


def perturb(bucket: ParameterBucket, ascent: Ascent) -> None:
    """Saves w, then w <- w + e_w."""
    live = bucket.live_weights()
    if not live:  # torch._foreach_* take no empty list
        return
    backup = bucket.allocate_backup()
    torch._foreach_copy_(bucket.live_views(backup), live)
    bucket.backup = backup
    bucket.saved.fill_(1)
    not_finite = ascent.norm.isfinite().logical_not()
    if bucket.device.type == "cpu" and not_finite:
        return
    for group, weights, grads in _by_group(bucket):
        w = _widen(weights)
        scale = ascent.scale[group].to(w[0].dtype)
        if ascent.groups_adaptive[group]:
            e_w = torch._foreach_mul(w, w)
            torch._foreach_mul_(e_w, _widen(grads))
            torch._foreach_mul_(e_w, scale)
        else:
            e_w = torch._foreach_mul(_widen(grads), scale)
        if bucket.device.type != "cpu":  # select on the device: to look at the norm would be to wait for it
            for e in e_w:
                e.masked_fill_(not_finite, -0.0)  # w + -0.0 is w, also for w = -0.0
        if w[0] is weights[0]:
            torch._foreach_add_(weights, e_w)
        else:
            torch._foreach_copy_(weights, torch._foreach_add(w, e_w))


def restore(bucket: ParameterBucket) -> None:
    """w <- saved w, bit for bit; nothing where nothing was saved."""
    backup = bucket.backup  # once: a signal handler may restore in between
    if backup is not None:
        torch._foreach_copy_(bucket.live_weights(), bucket.live_views(backup))
        bucket.backup = None


def _by_group(bucket: ParameterBucket) -> list[tuple[int, list[Tensor], list[Tensor]]]:
    """(group, weights, grads) for every group that has a live slot."""
    groups: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    for group, w, g in bucket.terms():
        weights, grads = groups.setdefault(group, ([], []))
        weights.append(w)
        grads.append(g)
    return [(group, weights, grads) for group, (weights, grads) in groups.items()]


def _widen(tensors: list[Tensor]) -> list[Tensor]:
    return [reference.widen(t) for t in tensors]
