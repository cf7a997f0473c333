"""Triton kernels: the default on CUDA. One launch each for norm, perturb and restore of a bucket.

A program takes a chunk (norm: a few), finds its addresses in the bucket's pointer tables and peels it: the up to 15
elements before the first and after the last 16-byte boundary are the *edge*, one masked tile; all between moves by
128-bit vectors. The pointers are integers until then, so each one is told to be aligned where it is made: a hint on
anything but the pointer itself is lost, and the compiler would fall back to 32-bit accesses.

Under TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly: for tests.
"""

# A kernel's arguments have no types that Python knows.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

from fastsam._distribution import no_gpu
from fastsam.bucket import ParameterBucket
from fastsam.scalars import Scalars

DEVICE: str | None = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

try:
    import triton
    import triton.language as tl
except Exception as error:  # a broken install raises anything
    reason = no_gpu() if DEVICE == "cuda" else None
    raise ImportError(reason or f"Triton cannot be imported ({error!r}): pip install --upgrade triton") from None

__all__ = ["DEVICE", "chunk_size", "combine", "norm", "obstacle", "perturb", "restore"]

OLDEST_TRITON = (3, 2)
OLDEST_CAPABILITY = (8, 0)

EDGE: tl.constexpr = tl.constexpr(16)
"""Tile of an edge: at most 7 + 7 elements of a 16-bit type. A shape that nothing else has, because loads of one shape
share one layout, and vectors would then stride the edge's scalars."""

SUMS: tl.constexpr = tl.constexpr(512)
"""Tile of the reduction over programs: 4 partial sums a thread."""

FEW: tl.constexpr = tl.constexpr(32)
"""Tile over param groups and over buckets."""

MOST_PROGRAMS = 2048
"""Of norm. The last one sums up a partial of each, while the device idles."""

WARPS = 4
VECTORS = 2
"""Vectors that a thread loads from each operand at once."""

UNFUSED = {"enable_fp_fusion": False}
"""Of perturb: w + e_w * scale is rounded twice, as in the reference."""

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _chunk(chunks, index):
    """Slot, length, group, offset in the parameter, offset in the backup: of one chunk."""
    record = chunks + index.to(tl.int64) * 4
    packed = tl.load(record + 1)
    return tl.load(record), packed.to(tl.int32), packed >> 32, tl.load(record + 2), tl.load(record + 3)


@triton.jit
def _peel(address, n, VEC: tl.constexpr):
    """(elements before the first 16-byte boundary, elements in whole vectors after it) of n elements at address."""
    head = tl.minimum((16 - (address & 15) & 15).to(tl.int32) // (16 // VEC), n)
    return head, (n - head) // VEC * VEC


@triton.jit
def _edge(head, body):
    """Indices of the elements before and after the body."""
    k = tl.arange(0, EDGE)
    return tl.where(k < head, k, k + body)


@triton.jit
def _square_tile(g_ptr, w_ptr, o, inside, inside_w, adaptive, ADAPTIVE: tl.constexpr, REAL: tl.constexpr):
    """g^2; adaptive: (|w| * g)^2."""
    t = tl.load(g_ptr + o, mask=inside, other=0.0).to(REAL)
    if ADAPTIVE:
        w = tl.load(w_ptr + o, mask=inside_w, other=0.0).to(REAL)
        t = tl.where(adaptive != 0, tl.abs(w) * t, t)
    return t * t


@triton.jit
def _square_body(
    g_ptr, w_ptr, n, adaptive, ADAPTIVE: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr
):
    sums = tl.zeros((BLOCK // VEC,), REAL)
    n_w = n * adaptive  # w is not read where the group is plain
    for i in range(0, n, BLOCK):
        o = i + tl.arange(0, BLOCK)
        squares = _square_tile(g_ptr, w_ptr, o, o < n, o < n_w, adaptive, ADAPTIVE, REAL)
        sums += tl.sum(tl.reshape(squares, (BLOCK // VEC, VEC)), 1)  # within a thread: no shuffle in the loop
    return sums


@triton.jit
def _write_scale(square_sum, rho, epsilon, n_groups, norm, scale):
    """norm = sqrt(sum of squares); scale = (1 / (norm + epsilon)) * rho; each operation rounded as torch's."""
    REAL: tl.constexpr = scale.dtype.element_ty  # not norm: Triton 3.2 would take it for the function below
    total = tl.sqrt(square_sum).to(REAL)  # the root in fp64: correctly rounded
    tl.store(norm, total)
    for i in range(0, n_groups, FEW):
        k = i + tl.arange(0, FEW)
        inside = k < n_groups
        divisor = total + tl.load(epsilon + k, mask=inside, other=1.0)
        # In fp64 and then rounded: correctly rounded to fp32 too. In fp32 `/` is approximate, and Triton 3.3's div_rn.
        reciprocal = (1.0 / divisor.to(tl.float64)).to(REAL)
        s = reciprocal * tl.load(rho + k, mask=inside, other=0.0)
        s = tl.where(tl.abs(s) < float("inf"), s, 0.0)
        tl.store(scale + k, tl.where(total < float("inf"), s, 0.0), mask=inside)


@triton.jit(do_not_specialize=["per_program", "longer", "index", "n_groups"])
def _norm(
    chunks,
    per_program,
    longer,
    weights,
    grads,
    adaptive,
    partials,
    counter,
    saved,
    square_sums,
    index,
    rho,
    epsilon,
    n_groups,
    norm,
    scale,
    DTYPE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    FINISH: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    POINTER: tl.constexpr = tl.pointer_type(DTYPE)
    REAL: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    SIZE: tl.constexpr = 16 // VEC
    pid = tl.program_id(0)
    # fp32 within a chunk, fp64 across chunks: equal gradients would otherwise all round in one direction.
    sums = tl.zeros((BLOCK // VEC,), tl.float64)
    edge_sums = tl.zeros((EDGE,), tl.float64)
    first = pid * per_program + tl.minimum(pid, longer)
    for j in range(per_program + (pid < longer).to(tl.int32)):
        slot, n, group, offset, _ = _chunk(chunks, first + j)
        g = tl.load(grads + slot)
        # Not a branch, below which the compiler would sink the loads of offset and length: they would wait for g first.
        n *= (g != 0).to(tl.int32)
        g += offset * SIZE
        w = g
        flag = 0
        if ADAPTIVE:
            w = tl.load(weights + slot) + offset * SIZE
            flag = tl.load(adaptive + group)
        head, body = _peel(g, n, VEC)
        g_body = tl.multiple_of((g + head * SIZE).to(POINTER), 16)
        if ((w ^ g) & 15) == 0:
            w_body = tl.multiple_of((w + head * SIZE).to(POINTER), 16)
            sums += _square_body(g_body, w_body, body, flag, ADAPTIVE, VEC, BLOCK, REAL).to(tl.float64)
        else:
            w_body = (w + head * SIZE).to(POINTER)
            sums += _square_body(g_body, w_body, body, flag, ADAPTIVE, VEC, BLOCK, REAL).to(tl.float64)
        inside = tl.arange(0, EDGE) < n - body
        inside_w = tl.arange(0, EDGE) < (n - body) * flag
        o = _edge(head, body)
        squares = _square_tile(g.to(POINTER), w.to(POINTER), o, inside, inside_w, flag, ADAPTIVE, REAL)
        edge_sums += squares.to(tl.float64)
    tl.store(partials + pid, tl.sum(sums) + tl.sum(edge_sums))
    # The last program to get here sums up, in an order of its own: the same whichever it is. The release makes its
    # partial visible before the count, the acquire makes the others' visible to it.
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        totals = tl.zeros((SUMS,), tl.float64)
        for i in range(0, tl.num_programs(0), SUMS):
            k = i + tl.arange(0, SUMS)
            totals += tl.load(partials + k, mask=k < tl.num_programs(0), other=0.0, cache_modifier=".cg")
        total = tl.sum(totals)
        tl.store(counter, 0)
        tl.store(saved, 0)
        tl.store(square_sums + index, total)
        if FINISH:
            _write_scale(total, rho, epsilon, n_groups, norm, scale)


@triton.jit(do_not_specialize=["n_buckets", "n_groups"])
def _combine(square_sums, n_buckets, rho, epsilon, n_groups, norm, scale):
    totals = tl.zeros((FEW,), tl.float64)
    for i in range(0, n_buckets, FEW):
        k = i + tl.arange(0, FEW)
        totals += tl.load(square_sums + k, mask=k < n_buckets, other=0.0)
    _write_scale(tl.sum(totals), rho, epsilon, n_groups, norm, scale)


@triton.jit
def _perturb_tile(w_ptr, g_ptr, b_ptr, o, inside, written, scale, adaptive, ADAPTIVE: tl.constexpr, REAL: tl.constexpr):
    """backup <- w; w <- w + e_w with e_w = g * scale; adaptive: e_w = w^2 * g * scale."""
    g = tl.load(g_ptr + o, mask=inside, eviction_policy="evict_first")
    saved = tl.load(w_ptr + o, mask=inside)
    tl.store(b_ptr + o, saved, mask=inside, eviction_policy="evict_first")
    w = saved.to(REAL)
    e_w = g.to(REAL)
    if ADAPTIVE:
        e_w = tl.where(adaptive != 0, w * w * e_w, e_w)
    tl.store(w_ptr + o, (w + e_w * scale).to(saved.dtype), mask=written)


@triton.jit
def _perturb_body(
    w_ptr, g_ptr, b_ptr, n, finite, scale, adaptive, ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr
):
    n_written = n * finite
    for i in range(0, n, BLOCK):
        o = i + tl.arange(0, BLOCK)
        _perturb_tile(w_ptr, g_ptr, b_ptr, o, o < n, o < n_written, scale, adaptive, ADAPTIVE, REAL)


@triton.jit(do_not_specialize=["generation"])
def _perturb(
    chunks,
    weights,
    grads,
    adaptive,
    norm,
    scale,
    backup,
    saved,
    generation,
    ADAPTIVE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    POINTER: tl.constexpr = backup.dtype
    REAL: tl.constexpr = tl.float64 if backup.dtype.element_ty == tl.float64 else tl.float32
    SIZE: tl.constexpr = 16 // VEC
    pid = tl.program_id(0)
    if pid == 0:
        tl.store(saved, generation)
    # Backwards: what norm read last is still in the L2 cache.
    slot, n, group, offset, backup_offset = _chunk(chunks, tl.num_programs(0) - 1 - pid)
    g = tl.load(grads + slot)
    w = tl.load(weights + slot) + offset * SIZE
    s = tl.load(scale + group).to(REAL)
    finite = (tl.load(norm) < float("inf")).to(tl.int32)
    flag = 0
    if ADAPTIVE:
        flag = tl.load(adaptive + group)
    n *= (g != 0).to(tl.int32)  # not a branch; see _norm
    g += offset * SIZE
    b = backup.to(tl.int64) + backup_offset * SIZE
    # By the boundaries of w: those of the backup are the same.
    head, body = _peel(w, n, VEC)
    w_body = tl.multiple_of((w + head * SIZE).to(POINTER), 16)
    b_body = tl.multiple_of((b + head * SIZE).to(POINTER), 16)
    if ((w ^ g) & 15) == 0:
        g_body = tl.multiple_of((g + head * SIZE).to(POINTER), 16)
        _perturb_body(w_body, g_body, b_body, body, finite, s, flag, ADAPTIVE, BLOCK, REAL)
    else:
        g_body = (g + head * SIZE).to(POINTER)
        _perturb_body(w_body, g_body, b_body, body, finite, s, flag, ADAPTIVE, BLOCK, REAL)
    inside = tl.arange(0, EDGE) < n - body
    written = tl.arange(0, EDGE) < (n - body) * finite
    o = _edge(head, body)
    _perturb_tile(w.to(POINTER), g.to(POINTER), b.to(POINTER), o, inside, written, s, flag, ADAPTIVE, REAL)


@triton.jit
def _restore_tile(w_ptr, b_ptr, o, inside):
    """w <- backup."""
    tl.store(w_ptr + o, tl.load(b_ptr + o, mask=inside, eviction_policy="evict_first"), mask=inside)


@triton.jit(do_not_specialize=["generation"])
def _restore(chunks, weights, grads, backup, saved, generation, VEC: tl.constexpr, BLOCK: tl.constexpr):
    POINTER: tl.constexpr = backup.dtype
    SIZE: tl.constexpr = 16 // VEC
    # Before the tables are read: where perturb never ran, as in the capture of a graph that failed, they hold anything.
    if tl.load(saved) == generation:
        slot, n, _, offset, backup_offset = _chunk(chunks, tl.program_id(0))
        g = tl.load(grads + slot)
        w = tl.load(weights + slot) + offset * SIZE
        if g != 0:
            b = backup.to(tl.int64) + backup_offset * SIZE
            head, body = _peel(w, n, VEC)
            w_body = tl.multiple_of((w + head * SIZE).to(POINTER), 16)
            b_body = tl.multiple_of((b + head * SIZE).to(POINTER), 16)
            for i in range(0, body, BLOCK):
                o = i + tl.arange(0, BLOCK)
                _restore_tile(w_body, b_body, o, o < body)
            inside = tl.arange(0, EDGE) < n - body
            _restore_tile(w.to(POINTER), b.to(POINTER), _edge(head, body), inside)


# ---- launchers -------------------------------------------------------------------------------------------------------


def chunk_size(numel: int) -> int:
    """Elements in a chunk: enough programs to fill a GPU, or fewer, longer ones where there are many anyway."""
    return 4096 if numel < 50_000_000 else 8192


def norm(bucket: ParameterBucket, scalars: Scalars, finish: bool) -> None:
    """Sums the squares of the bucket's gradients; with `finish` (no other bucket to wait for) also combines."""
    n_chunks = len(bucket.chunks)
    # By the number of chunks alone: the same sums in the same order on every GPU. The first programs take one more.
    programs = min(max(n_chunks, 1), MOST_PROGRAMS)
    with _on(bucket.device):
        _norm[(programs,)](
            bucket.chunks,
            n_chunks // programs,
            n_chunks % programs,
            bucket.weight_table.tensor,
            bucket.grad_table.tensor,
            scalars.adaptive,
            bucket.partials,
            bucket.counter,
            bucket.saved,
            scalars.square_sums,
            bucket.index,
            scalars.rho,
            scalars.epsilon,
            len(scalars.rho),
            scalars.norm,
            scalars.scale,
            DTYPE=DTYPES[bucket.dtype],
            ADAPTIVE=any(scalars.groups_adaptive),
            FINISH=finish,
            **shape(bucket.dtype),
        )


def combine(scalars: Scalars) -> None:
    """norm and scale from the sums of all buckets."""
    with _on(scalars.device):
        _combine[(1,)](
            scalars.square_sums,
            len(scalars.square_sums),
            scalars.rho,
            scalars.epsilon,
            len(scalars.rho),
            scalars.norm,
            scalars.scale,
            num_warps=1,
        )


def perturb(bucket: ParameterBucket, scalars: Scalars) -> None:
    """Saves w and w <- w + e_w, in one pass."""
    bucket.backup = bucket.allocate_backup()
    if len(bucket.chunks):
        with _on(bucket.device):
            _perturb[(len(bucket.chunks),)](
                bucket.chunks,
                bucket.weight_table.tensor,
                bucket.grad_table.tensor,
                scalars.adaptive,
                scalars.norm,
                scalars.scale,
                bucket.backup,
                bucket.saved,
                bucket.next_generation(),
                ADAPTIVE=any(scalars.groups_adaptive),
                **UNFUSED,
                **shape(bucket.dtype),
            )
    torch.autograd.graph.increment_version(bucket.live_weights())


def restore(bucket: ParameterBucket) -> None:
    """w <- saved w, bit for bit; nothing where nothing was saved."""
    backup = bucket.backup  # once: a signal handler may restore in between
    if backup is None:
        return
    if len(bucket.chunks):
        with _on(bucket.device):
            _restore[(len(bucket.chunks),)](
                bucket.chunks,
                bucket.weight_table.tensor,
                bucket.grad_table.tensor,
                backup,
                bucket.saved,
                bucket.generation,
                **shape(bucket.dtype),
            )
    torch.autograd.graph.increment_version(bucket.live_weights())
    bucket.free_backup()


def shape(dtype: torch.dtype) -> dict[str, int]:
    """The shape that a kernel is compiled in, by dtype of the bucket."""
    vec = 16 // dtype.itemsize
    return {"VEC": vec, "BLOCK": WARPS * 32 * vec * VECTORS, "num_warps": WARPS}


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def obstacle() -> str | None:
    """Why Triton cannot serve here, and what to do; None when it can."""
    reason = no_gpu() if DEVICE == "cuda" else None
    if reason is not None:
        return reason
    oldest = ".".join(map(str, OLDEST_TRITON))
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {oldest}: pip install --upgrade torch triton"
    if DEVICE == "cpu" or not torch.cuda.is_initialized():
        return None
    for i in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(i) < OLDEST_CAPABILITY:
            needed = ".".join(map(str, OLDEST_CAPABILITY))
            return f"{torch.cuda.get_device_name(i)} is older than capability {needed}, which the kernels need"
    try:
        triton.runtime.driver.active.get_current_target()  # compiles a part of Triton, the first time
    except Exception as error:
        return f"Triton finds no C compiler, Python headers or driver ({error!r}): apt install gcc python3-dev"
    return None
