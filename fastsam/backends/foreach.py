"""torch's own operators, a few calls a block of memory, on any device: for where no kernel of fastsam's is built.

The arithmetic is the reference's, operation by operation. A bucket is walked in *blocks* that stay in a CPU's cache
between two operations, so that a parameter is read once to be saved and perturbed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from fastsam.ascent import Ascent
from fastsam.backends import reference
from fastsam.bucket import ParameterBucket

__all__ = ["chunk_size", "combine", "norm", "perturb", "restore"]

chunk_size = reference.chunk_size
combine = reference.combine

ROW = 512
"""Elements whose norm is taken in fp32, by one thread: few enough for 3e-7, where all are equal too; the same bits
whatever the number of threads. The norms of rows are squared and summed in fp64."""

CPU_BLOCK, BLOCK = 2**19, 2**24
"""Elements of a block: on a CPU what stays in its cache, elsewhere what makes launches few."""

CPU_SMALL = 2**14
"""Parameters of at most as many elements are gathered for the norm: a call for each would take longer."""

GRAIN = 2**14
"""Fewer than torch shares between threads, so that a sum of them is always the same."""

SAFE = (1e-20, 1e38)
"""Sums of squares that fp32 squares are good for; what is out of it is summed again in fp64, on a CPU."""


class _Block:
    """Parameters of one param group that are worked on at a time: several whole ones, or a piece of one.

    Args:
        bucket: theirs.
        slots: of the parameters.
        start: where a piece lies in its parameter, in elements.
        numel: of a piece; None for whole parameters.

    Attributes:
        group: the param group.
        numel: elements of all.
        weights: what is written to: the parameters, or the piece, flat.
        saved: where these are saved, in the backup.
    """

    def __init__(self, bucket: ParameterBucket, slots: list[int], start: int = 0, numel: int | None = None) -> None:
        whole = [bucket.weights[i].detach() for i in slots]
        self.group = bucket.groups[slots[0]]
        self.weights = whole if numel is None else [_flat(whole[0])[start : start + numel]]
        self.numel = sum(w.numel() for w in self.weights)
        self.saved: list[Tensor] = []
        self._packed: dict[int, list[Tensor]] = {}
        self._slots = slots
        self._start = None if numel is None else start
        self._places = [bucket.offsets[i] + start for i in slots]

    def bind(self, backup: Tensor) -> None:
        """Saves in `backup` from now on."""
        self.saved = _views(backup, self.weights, self._places)

    def grads(self, bucket: ParameterBucket) -> list[Tensor]:
        """The gradients of `weights`."""
        whole = [cast(Tensor, bucket.grads[i]) for i in self._slots]
        return whole if self._start is None else [_flat(whole[0])[self._start : self._start + self.numel]]

    def pack(self, plan: _Plan, buffer: int, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Copies tensors like `weights` into a buffer of the plan's, one after the other.

        Returns:
            What is filled of it, flat, and as views like `weights`.
        """
        memory = plan.buffer(buffer)
        views = self._packed.get(buffer)
        if views is None:
            starts = itertools.accumulate((w.numel() for w in self.weights), initial=0)
            views = self._packed[buffer] = _views(memory, self.weights, starts)
        torch._foreach_copy_(views, tensors)
        return memory[: self.numel], views


class _Plan:
    """How a bucket's live slots are walked. Kept with the bucket, with its buffers: of a block each.

    Attributes:
        live: the slots.
        blocks: of the ascent.
        measured: blocks of the norm: small parameters together, others alone.
        saved: how many of `blocks` the backup holds, from the first on.
        one: 1, 0-d, of the bucket's dtype.
        wide: dtype of the arithmetic.
    """

    def __init__(self, bucket: ParameterBucket) -> None:
        self.live = bucket.live()
        self.saved = 0
        self.one = torch.ones((), dtype=bucket.dtype, device=bucket.device)
        self.wide = torch.float64 if bucket.dtype is torch.float64 else torch.float32
        on_cpu = _on_cpu(bucket)
        sizes = [bucket.weights[i].numel() for i in self.live]
        size = min(CPU_BLOCK if on_cpu else BLOCK, sum(sizes))
        small = min(CPU_SMALL, size) if on_cpu else size
        pieces = [
            _Block(bucket, [i], start, min(size, n - start))
            for i, n in zip(self.live, sizes, strict=True)
            if n > size
            for start in range(0, n, size)
        ]
        self.blocks = [
            *_together(bucket, [i for i, n in zip(self.live, sizes, strict=True) if n <= size], size),
            *pieces,
        ]
        self.measured = self.blocks
        if bucket.dtype is self.wide:
            little = [i for i, n in zip(self.live, sizes, strict=True) if n <= small]
            others = [_Block(bucket, [i]) for i, n in zip(self.live, sizes, strict=True) if n > small]
            self.measured = [*_together(bucket, little, size), *others]
        self._buffers: dict[int, Tensor] = {}
        self._size = size
        self._backup: Tensor | None = None

    def buffer(self, index: int) -> Tensor:
        """One of two, flat, made when it is first asked for."""
        if index not in self._buffers:
            self._buffers[index] = torch.empty(self._size, dtype=self.wide, device=self.one.device)
        return self._buffers[index]

    def bind(self, backup: Tensor | None) -> None:
        """Makes `backup` the memory that the blocks are saved in; None lets go of it."""
        if self._backup is not backup:
            for block in self.blocks:
                if backup is None:
                    block.saved = []
                else:
                    block.bind(backup)
            self._backup = backup


def norm(bucket: ParameterBucket, ascent: Ascent, finish: bool) -> None:
    """Sums the squares of the bucket's gradients; with `finish` (no other bucket to wait for) also combines."""
    plan = _plan(bucket)
    plan.saved = 0
    bucket.saved.zero_()
    adaptive = any(ascent.groups_adaptive)
    norms: list[Tensor] = []
    for block in plan.blocks if adaptive else plan.measured:
        term = _term(bucket, plan, block, ascent.groups_adaptive[block.group])
        rows, rest = divmod(block.numel, ROW)
        if rows:
            whole = term if rest == 0 else term[: rows * ROW]
            norms.append(torch.linalg.vector_norm(whole.view(rows, ROW), dim=1))
        if rest:
            norms.append(torch.linalg.vector_norm(term[rows * ROW :]).view(1))
    square_sum = ascent.square_sums[bucket.index].zero_()
    if norms:
        parts = torch.split(torch.cat(norms), GRAIN)
        square_sum.copy_(torch.stack([part.to(square_sum.dtype).square().sum() for part in parts]).sum())
    if _on_cpu(bucket) and plan.wide is torch.float32 and not SAFE[0] < square_sum.item() < SAFE[1]:
        square_sum.copy_(_sum_in_fp64(bucket, plan, ascent))
    if finish:
        combine(ascent)


def perturb(bucket: ParameterBucket, ascent: Ascent) -> None:
    """Saves w, then w <- w + e_w. On a CPU the backup is kept: fresh memory costs more than the pass."""
    on_cpu = _on_cpu(bucket)
    not_finite = ascent.norm.isfinite().logical_not()
    if on_cpu and not_finite:
        return
    generation = bucket.next_generation()
    plan = _plan(bucket)
    if bucket.backup is None:
        bucket.backup = bucket.allocate_backup()
    plan.bind(bucket.backup)
    scales = ascent.scale.to(plan.wide)
    host_scales = scales.tolist() if on_cpu else []
    for k, block in enumerate(plan.blocks):
        torch._foreach_copy_(block.saved, block.weights)
        plan.saved = k + 1  # before the first write: a signal handler may restore in between
        if plan.saved == len(plan.blocks):
            bucket.saved.fill_(generation)
        grads = block.grads(bucket)
        if ascent.groups_adaptive[block.group]:
            g, _ = block.pack(plan, 0, grads)
            w, grads = block.pack(plan, 1, block.weights)
            w.mul_(w).mul_(g)
        if on_cpu:
            # w + scale * g / 1: the division keeps torch from contracting product and sum, which then round twice.
            ones = [plan.one] * len(grads)
            torch._foreach_addcdiv_(block.weights, grads, ones, value=host_scales[block.group])
            continue
        e_w, views = block.pack(plan, 0, grads)
        # Select on the device: to look at the norm would be to wait for it. w + -0.0 is w, also for w = -0.0.
        e_w.mul_(scales[block.group]).masked_fill_(not_finite, -0.0)
        if bucket.dtype is plan.wide:
            torch._foreach_add_(block.weights, views)
        else:
            w, above = block.pack(plan, 1, block.weights)
            w.add_(e_w)
            torch._foreach_copy_(block.weights, above)


def restore(bucket: ParameterBucket) -> None:
    """w <- saved w, bit for bit; nothing where nothing was saved."""
    backup, plan = bucket.backup, bucket.plan  # once: a signal handler may restore in between
    if backup is None or not isinstance(plan, _Plan) or not plan.saved:
        return
    plan.bind(backup)
    done = plan.blocks[: plan.saved]
    weights = itertools.chain.from_iterable(block.weights for block in done)
    torch._foreach_copy_(list(weights), list(itertools.chain.from_iterable(block.saved for block in done)))
    if not _on_cpu(bucket):
        bucket.free_backup()
        plan.bind(None)


def _on_cpu(bucket: ParameterBucket) -> bool:
    """Whether the host may look at a value, and the backup is kept."""
    return bucket.device.type == "cpu"


def _plan(bucket: ParameterBucket) -> _Plan:
    """That of the last step, where the same slots live."""
    plan = bucket.plan
    if not (isinstance(plan, _Plan) and plan.live == bucket.live()):
        bucket.plan = plan = _Plan(bucket)
    return plan


def _together(bucket: ParameterBucket, slots: Iterable[int], size: int) -> list[_Block]:
    """Blocks of at most `size` elements, of one param group each."""
    runs: list[list[int]] = []
    room = 0
    for i in slots:
        numel = bucket.weights[i].numel()
        if not runs or numel > room or bucket.groups[i] != bucket.groups[runs[-1][0]]:
            runs.append([])
            room = size
        runs[-1].append(i)
        room -= numel
    return [_Block(bucket, run) for run in runs]


def _term(bucket: ParameterBucket, plan: _Plan, block: _Block, adaptive: bool) -> Tensor:
    """What the norm is of, flat, in the dtype of the arithmetic."""
    grads = block.grads(bucket)
    if not adaptive and len(grads) == 1 and bucket.dtype is plan.wide:
        return _flat(grads[0])
    term, _ = block.pack(plan, 0, grads)
    if adaptive:
        w, _ = block.pack(plan, 1, block.weights)
        term.mul_(w)
    return term


def _sum_in_fp64(bucket: ParameterBucket, plan: _Plan, ascent: Ascent) -> Tensor:
    """The sum of squares where fp32 squares overflow or vanish: rare, so slowly."""
    total = torch.zeros((), dtype=torch.float64)
    for block in plan.blocks:
        for w, g in zip(block.weights, block.grads(bucket), strict=True):
            term = g.double() * w.double() if ascent.groups_adaptive[block.group] else g.double()
            for part in torch.split(term.flatten(), GRAIN):
                total += part.square().sum()
    return total


def _views(memory: Tensor, like: list[Tensor], places: Iterable[int]) -> list[Tensor]:
    """Views of flat memory, in the shapes and strides of `like`, each from its place on."""
    start = memory.storage_offset()
    return [memory.as_strided(t.shape, t.stride(), start + at) for t, at in zip(like, places, strict=False)]


def _flat(t: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory."""
    return t.as_strided((t.numel(),), (1,), t.storage_offset())
