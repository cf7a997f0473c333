"""torch's own operators, a few calls a block of memory, on any device: for where no kernel of fastsam's is built.

The arithmetic is the reference's, operation by operation. A bucket is walked in *blocks* that stay in a CPU's cache
between two operations, so that a parameter is read once to be saved and perturbed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from fastsam.backends import reference
from fastsam.bucket import ParameterBucket
from fastsam.scalars import Scalars

__all__ = ["DEVICE", "chunk_size", "combine", "norm", "perturb", "restore"]

DEVICE: str | None = None

chunk_size = reference.chunk_size

ROW = 512
"""Length of a row. torch takes the norm of a row of at most 512 elements in fp32, then of 512 such norms; the rest is
summed in fp64. The error stays below 6e-7 even when all elements are equal, and the bits do not depend on the number of
threads."""

CPU_BLOCK, BLOCK = 2**21, 2**26
"""Bytes of a block's parameters: on a CPU what stays in its cache, elsewhere what makes launches few."""

CPU_SMALL = 2**14
"""Parameters of at most as many elements are gathered for the norm: a call for each would take longer."""

GRAIN = 2**15 - 1
"""Elements, just below the size from which torch uses several threads: torch.cat is fastest there."""

VECTOR, MANY = 2**11, 8
"""Parameters of one dimension and at most as many elements, where they are not few, are copied by torch.cat, `GRAIN`
elements a call: in a third to a half of the time of a copy for each. Of a whole step of 161 x 64 that is 6 %, of 100 x
1000 with two threads 13 % (AMD EPYC, Zen 4); elsewhere nothing."""

GAP = 64
"""Elements, at the most, that lie between neighbours in the backup, for alignment."""

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
        slices: of the backup, that `weights` are saved in.
    """

    def __init__(self, bucket: ParameterBucket, slots: list[int], start: int = 0, numel: int | None = None) -> None:
        whole = [bucket.weights[i].detach() for i in slots]
        self.group = bucket.groups[slots[0]]
        self.weights = whole if numel is None else [_flat(whole[0])[start : start + numel]]
        self.numel = sum(w.numel() for w in self.weights)
        self.slices: list[Tensor] = []
        self._vectors = all(map(_is_vector, whole))
        self._views: dict[int, list[Tensor]] = {}
        self._slots = slots
        self._start = None if numel is None else start
        self._places = [bucket.offsets[i] + start for i in slots]
        self._filled = _filled(self.weights, self._places) if self._vectors else []
        self._range: Tensor | None = None  # of the backup, that `_filled` fills

    def bind(self, backup: Tensor | None) -> None:
        """Saves in `backup` from now on; None lets go of it."""
        self.slices = [] if backup is None else _views(backup, self.weights, self._places)
        end = self._places[-1] + self.weights[-1].numel()
        self._range = backup[self._places[0] : end] if backup is not None and self._filled else None

    def save(self) -> None:
        """Copies `weights` to the backup: vectors that are neighbours there by one call."""
        if self._range is None:
            torch._foreach_copy_(self.slices, self.weights)
        else:
            torch.cat(self._filled, out=self._range)

    def grads(self, bucket: ParameterBucket) -> list[Tensor]:
        """The gradients of `weights`."""
        whole = cast("list[Tensor]", [bucket.grads[i] for i in self._slots])
        if self._start is None:
            return whole
        return [whole[0].as_strided((self.numel,), (1,), whole[0].storage_offset() + self._start)]

    def read(self, plan: _Plan, index: int, tensors: list[Tensor]) -> Tensor:
        """The elements of tensors like `weights`, one after the other, in the dtype of the arithmetic, ``[numel]``.

        No copy if there is one tensor of that dtype; else a copy in the plan's buffer.
        """
        if len(tensors) == 1 and tensors[0].dtype is plan.wide:
            return _flat(tensors[0])
        buffer = plan.buffer(index)[: self.numel]
        if not self._vectors:
            torch._foreach_copy_(self.views(plan, index), tensors)
        elif tensors[0].dtype is plan.wide:
            torch.cat(tensors, out=buffer)
        else:
            buffer.copy_(torch.cat(tensors))  # which is slow at converting
        return buffer

    def views(self, plan: _Plan, index: int) -> list[Tensor]:
        """Views like `weights` of a buffer of the plan's, one after the other."""
        if index not in self._views:
            starts = itertools.accumulate((w.numel() for w in self.weights), initial=0)
            self._views[index] = _views(plan.buffer(index), self.weights, starts)
        return self._views[index]


class _Rows:
    """The norms of the rows that blocks are cut into.

    Args:
        blocks: what is measured.
        plan: theirs.

    Attributes:
        blocks: as given.
    """

    def __init__(self, blocks: list[_Block], plan: _Plan) -> None:
        self.blocks = blocks
        cuts = [_cut(block.numel) for block in blocks]
        counts = [rows for cut in cuts for _, rows, _ in cut]
        self._norms = plan.one.new_zeros(-(-sum(counts) // ROW), ROW, dtype=plan.wide)
        self._total = self._norms.new_empty(len(self._norms))
        parts = iter(torch.split(self._norms.view(-1)[: sum(counts)], counts))
        self._cuts = [[(start, (rows, n), (n, 1), next(parts)) for start, rows, n in cut] for cut in cuts]

    def measure(self, index: int, elements: Tensor) -> None:
        """Takes the norms of the rows of block `index`, whose elements lie in memory one after the other."""
        for start, shape, strides, norms in self._cuts[index]:
            rows = elements.as_strided(shape, strides, elements.storage_offset() + start)
            torch.linalg.vector_norm(rows, dim=1, out=norms)

    def norms(self) -> Tensor:
        """The norms of what was measured, `ROW` rows each, ``[n]``."""
        torch.linalg.vector_norm(self._norms, dim=1, out=self._total)
        return self._total


class _Plan:
    """How a bucket's live slots are walked. Kept with the bucket, with its buffers: of a block each.

    Attributes:
        live: the slots.
        stream: the CUDA stream that its memory belongs to; elsewhere None.
        blocks: of the ascent.
        blocks_saved: how many of `blocks` the backup holds, from the first on.
        one: 1, 0-d, of the bucket's dtype.
        wide: dtype of the arithmetic.
    """

    def __init__(self, bucket: ParameterBucket) -> None:
        self.live = bucket.live()
        self.stream = bucket.stream
        self.blocks_saved = 0
        self.one = torch.ones((), dtype=bucket.dtype, device=bucket.device)
        self.wide = torch.float64 if bucket.dtype is torch.float64 else torch.float32
        on_cpu = _on_cpu(bucket)
        sizes = [bucket.weights[i].numel() for i in self.live]
        size = min((CPU_BLOCK if on_cpu else BLOCK) // bucket.dtype.itemsize, sum(sizes))
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
        self._measured = self.blocks
        if bucket.dtype is self.wide:
            small = min(CPU_SMALL, size) if on_cpu else size
            little = [i for i, n in zip(self.live, sizes, strict=True) if n <= small]
            others = [_Block(bucket, [i]) for i, n in zip(self.live, sizes, strict=True) if n > small]
            self._measured = [*_together(bucket, little, size), *others]
        self._rows: dict[bool, _Rows] = {}
        self._buffers: dict[int, Tensor] = {}
        self._size = size
        self._backup: Tensor | None = None

    def rows(self, adaptive: bool) -> _Rows:
        """What the norm is taken of: where no product has to be formed, small parameters together, others whole."""
        if adaptive not in self._rows:
            self._rows[adaptive] = _Rows(self.blocks if adaptive else self._measured, self)
        return self._rows[adaptive]

    def buffer(self, index: int) -> Tensor:
        """One of three, flat, made when it is first asked for."""
        if index not in self._buffers:
            self._buffers[index] = torch.empty(self._size, dtype=self.wide, device=self.one.device)
        return self._buffers[index]

    def bind(self, backup: Tensor | None) -> None:
        """Makes `backup` the memory that the blocks are saved in; None lets go of it."""
        if self._backup is not backup:
            for block in self.blocks:
                block.bind(backup)
            self._backup = backup


def norm(bucket: ParameterBucket, scalars: Scalars, finish: bool) -> None:
    """Sums the squares of the bucket's gradients; with `finish` (no other bucket to wait for) also combines."""
    plan = _plan(bucket)
    plan.blocks_saved = 0
    bucket.set_saved(0)
    rows = plan.rows(any(scalars.groups_adaptive))
    for k, block in enumerate(rows.blocks):
        grads = block.grads(bucket)
        if scalars.groups_adaptive[block.group]:
            w, g = block.read(plan, 1, block.weights), block.read(plan, 0, grads)
            rows.measure(k, torch.mul(w, g, out=plan.buffer(0)[: block.numel]))
        elif len(grads) == 1 and bucket.dtype is plan.wide:
            rows.measure(k, grads[0])
        else:
            rows.measure(k, block.read(plan, 0, grads))
    norms = rows.norms()
    if _on_cpu(bucket):
        total = sum([norm * norm for norm in norms.tolist()])
        if plan.wide is torch.float32 and not SAFE[0] < total < SAFE[1]:
            total = _sum_in_fp64(bucket, plan, scalars)
        scalars.host.square_sums[bucket.index] = total
    else:
        square_sum = scalars.square_sums[bucket.index]
        square_sum.copy_(norms.to(square_sum.dtype).square().sum())
    if finish:
        combine(scalars)


def combine(scalars: Scalars) -> None:
    """norm and scale from the sums of all buckets; on a CPU without torch, rounding where it rounds: at each store."""
    if scalars.device.type != "cpu":
        reference.combine(scalars)
        return
    rho, epsilon, square_sums, norm, scale = scalars.host
    norm[0] = math.sqrt(sum(square_sums))
    for i in range(len(scale)):
        scale[i] = norm[0] + epsilon[i]
        scale[i] = 1 / scale[i] if scale[i] else math.inf
        scale[i] *= rho[i]
        if not math.isfinite(scale[i]):
            scale[i] = 0


def perturb(bucket: ParameterBucket, scalars: Scalars) -> None:
    """Saves w, then w <- w + e_w. On a CPU the backup is kept: fresh memory costs more than the pass."""
    on_cpu = _on_cpu(bucket)
    if on_cpu and not math.isfinite(scalars.host.norm[0]):
        return
    not_finite = None if on_cpu else scalars.norm.isfinite().logical_not()
    generation = bucket.next_generation()
    plan = _plan(bucket)
    if bucket.backup is None:
        bucket.backup = bucket.allocate_backup()
    plan.bind(bucket.backup)
    for k, block in enumerate(plan.blocks):
        block.save()
        plan.blocks_saved = k + 1  # before the first write: a signal handler may restore in between
        if plan.blocks_saved == len(plan.blocks):
            bucket.set_saved(generation)
        grads = block.grads(bucket)
        adaptive = scalars.groups_adaptive[block.group]
        if on_cpu and not adaptive:
            # scale * g * 1 + w: a product with 1 is exact, so torch may contract it with the sum, and rounds twice.
            ones = [plan.one] * len(grads)
            torch._foreach_addcmul_(block.weights, grads, ones, value=scalars.host.scale[block.group])
            continue
        e_w, square = (plan.buffer(i)[: block.numel] for i in (0, 2))
        g = block.read(plan, 0, grads)
        w = block.read(plan, 1, block.weights) if adaptive or bucket.dtype is not plan.wide else g
        if adaptive:
            g = torch.mul(torch.mul(w, w, out=square), g, out=e_w)
        torch.mul(g, scalars.scale[block.group].to(plan.wide), out=e_w)
        if not_finite is not None:
            # Select on the device: to look at the norm would be to wait for it. w + -0.0 is w, also for w = -0.0.
            e_w.masked_fill_(not_finite, -0.0)
        if bucket.dtype is plan.wide:
            torch._foreach_add_(block.weights, block.views(plan, 0))
        else:
            w.add_(e_w)
            torch._foreach_copy_(block.weights, block.views(plan, 1))


def restore(bucket: ParameterBucket) -> None:
    """w <- saved w, bit for bit; nothing where nothing was saved."""
    backup, plan = bucket.backup, bucket.plan  # once: a signal handler may restore in between
    if backup is None or not isinstance(plan, _Plan) or not plan.blocks_saved:
        return
    plan.bind(backup)
    done = plan.blocks[: plan.blocks_saved]
    weights = itertools.chain.from_iterable(block.weights for block in done)
    torch._foreach_copy_(list(weights), list(itertools.chain.from_iterable(block.slices for block in done)))
    if not _on_cpu(bucket):
        bucket.free_backup()
        plan.bind(None)


def _on_cpu(bucket: ParameterBucket) -> bool:
    """Whether the host may look at a value, and the backup is kept."""
    return bucket.device.type == "cpu"


def _plan(bucket: ParameterBucket) -> _Plan:
    """That of the last step, where the same slots live, on the same stream."""
    plan = bucket.plan
    if not (isinstance(plan, _Plan) and plan.live == bucket.live() and plan.stream == bucket.stream):
        bucket.plan = plan = _Plan(bucket)
    return plan


def _together(bucket: ParameterBucket, slots: Iterable[int], size: int) -> list[_Block]:
    """Blocks of at most `size` elements, of one param group each; vectors, where there are many, apart."""
    slots = list(slots)
    vectors = {i for i in slots if _is_vector(bucket.weights[i])}
    if len(vectors) < MANY:
        vectors = set()

    def kind(i: int) -> tuple[bool, int]:
        return i in vectors, bucket.groups[i]

    runs: list[list[int]] = []
    room = 0
    for i in sorted(slots, key=kind):
        numel = bucket.weights[i].numel()
        if not runs or numel > room or kind(i) != kind(runs[-1][0]):
            runs.append([])
            room = min(size, GRAIN) if i in vectors else size
        runs[-1].append(i)
        room -= numel
    return [_Block(bucket, run) for run in runs]


def _is_vector(t: Tensor) -> bool:
    return t.dim() == 1 and t.numel() <= VECTOR


def _filled(tensors: list[Tensor], places: list[int]) -> list[Tensor]:
    """Vectors, and zeros between them, that fill their range of the backup; none where others lie there."""
    zeros = tensors[0].new_zeros(GAP)
    fillers: dict[int, Tensor] = {}
    filled = []
    end = places[0]
    for t, place in zip(tensors, places, strict=True):
        gap, end = place - end, place + t.numel()
        if gap > GAP:
            return []
        if gap:
            filled.append(fillers[gap] if gap in fillers else fillers.setdefault(gap, zeros[:gap]))
        filled.append(t)
    return filled


def _cut(numel: int) -> list[tuple[int, int, int]]:
    """Cuts elements into rows of equal length, or all but a rest: (where they start, how many, elements of each)."""
    for length in range(ROW, ROW // 4, -8):
        if numel and numel % length == 0:
            return [(0, numel // length, length)]
    rows, rest = divmod(numel, ROW)
    return [cut for cut in ((0, rows, ROW), (rows * ROW, 1, rest)) if 0 not in cut[1:]]


def _sum_in_fp64(bucket: ParameterBucket, plan: _Plan, scalars: Scalars) -> float:
    """The sum of squares where fp32 squares overflow or vanish: rare, so slowly."""
    total = 0.0
    for block in plan.blocks:
        for w, g in zip(block.weights, block.grads(bucket), strict=True):
            term = g.double() * w.double() if scalars.groups_adaptive[block.group] else g.double()
            for part in torch.split(term.flatten(), GRAIN):
                total += part.square().sum().item()
    return total


def _views(memory: Tensor, like: list[Tensor], places: Iterable[int]) -> list[Tensor]:
    """Views of flat memory, in the shapes and strides of `like`, each from its place on."""
    start = memory.storage_offset()
    return [memory.as_strided(t.shape, t.stride(), start + at) for t, at in zip(like, places, strict=False)]


def _flat(t: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory."""
    return t.as_strided((t.numel(),), (1,), t.storage_offset())
