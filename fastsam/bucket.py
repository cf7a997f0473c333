"""Flat parameter buckets: one address space for all parameters of one device and dtype.

Kernels do not see tensors. They see chunks of a flat address space and two tables of pointers, so that one pass over a
bucket is one launch (one parallel region on CPU), whatever the number of tensors.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Container, Sequence
from types import NoneType
from typing import cast

import torch
from torch import Tensor

from fastsam.device import capturing, shared_zeros, upload, wait_for
from fastsam.direction import GRADIENT, Direction
from fastsam.distributed import in_memory, is_dtensor, local, local_grad
from fastsam.places import Places

__all__ = ["ParameterBucket", "PointerTable", "flatten_"]

ALIGNMENT = 64
"""Bytes: a cache line, and four 128-bit vectors."""

PLAIN = {Tensor, NoneType}
"""Types of gradients that have memory of their own, or are none."""


class PointerTable:
    """Addresses of tensors, where kernels find them; written only when one of them changed.

    A CUDA graph gets a table of its own, in its memory pool, which it writes at every replay from addresses that are
    baked into its kernels. Later steps do not change what the graph reads, and replays do not change what later steps
    read.

    Attributes:
        tensor: the addresses, int64 ``[n]`` on the device.
        complete: whether none is 0.
        graphs: how many tables CUDA graphs took from here.
        refreshes: how often a table was written.
    """

    def __init__(self, pointers: list[int], device: torch.device) -> None:
        self._host = array("q", pointers)
        # A view of the host's array: on CPU it is the table itself.
        self._view = torch.frombuffer(self._host, dtype=torch.int64)
        self.tensor = self._view if device.type == "cpu" else self._view.to(device)
        self._eager = self.tensor
        self._captured: list[int] | None = None
        self.graphs = 0
        self._behind = False  # the device may lack what the host's array says: an upload failed
        self.complete = all(pointers)
        self.refreshes = 1

    @property
    def pointers(self) -> list[int]:
        """The addresses as the host knows them; 0 says that there is no tensor."""
        return self._host.tolist() if self._captured is None else self._captured

    @property
    def captured(self) -> bool:
        """Whether the last update went into a CUDA graph: nothing has written the table before a replay."""
        return self._captured is not None

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """As torch's: another stream uses the memory."""
        self._eager.record_stream(stream)

    def update(self, pointers: list[int]) -> None:
        """Writes `pointers` when they differ from those of the last call; as many as at construction."""
        if capturing(self._eager.device):
            self.tensor = torch.zeros_like(self._eager)
            torch._foreach_add_(self.tensor.unbind(), pointers)
            self._captured = pointers
            self.graphs += 1
            self.complete = all(pointers)
            self.refreshes += 1
            return
        found = array("q", pointers)
        changed = self._behind or found != self._host
        if changed:
            self._behind = True
            self._host[:] = found
        self._updated(changed)

    def take(self, tensors: list[Tensor | None], like: Places) -> bool:
        """Does as `update` with the tensors' addresses, by the native library.

        Args:
            tensors: as many as at construction; None: there is none.
            like: of tensors that they must equal in dtype, device, shape and strides.

        Returns:
            False, and nothing is done, where one does not, or is no plain tensor; or where it takes `update`.
        """
        if capturing(self._eager.device):
            return False
        behind, self._behind = self._behind, True  # whatever interrupts
        found = like.survey(tensors, self._view)
        if found == 0:
            self._behind = behind
            return False
        self._updated(behind or found == 2)
        return True

    def _updated(self, changed: bool) -> None:
        """Brings the host's array, which `changed`, to the device."""
        if changed and self._eager is not self._view:
            upload(self._eager, self._view)
        self.refreshes += changed
        if changed or self._captured is not None:
            self.complete = all(self._host)
        self.tensor = self._eager
        self._captured = None
        self._behind = False


class ParameterBucket:
    """All parameters of one (device, dtype) that had a gradient, across param groups, as one flat address space.

    Every parameter owns a *slot*: a range of the bucket that starts at the parameter's own misalignment modulo 64
    bytes, so that one peeled head aligns a parameter and its backup together. The bucket is cut into chunks of at most
    `chunk_size` elements; a chunk never spans two parameters.

    Kernels address memory linearly. A parameter that is dense in some order of its dimensions (channels_last,
    transposed) is reached in place; one with gaps goes through a dense copy, *staged* around each pass. A gradient
    whose strides differ from its parameter's is copied to them for the step.

    Args:
        params: the parameters, at least one, all of one device and dtype.
        groups: index of each parameter's group.
        names: what each parameter is called in an error message.
        index: of this bucket among the buckets of its device.
        chunk_size: elements in a chunk, by number of elements in the bucket.
        direction: what stands for the gradient of each parameter.

    Attributes:
        weights: what kernels write to: the parameters themselves, their local shards, or staged copies of these.
        grads: the gradients of the ascent under way (None: no gradient), from `gather` to `release`.
        chunks: int64 ``[n_chunks, 4]`` on the device: slot, length | group << 32, offset in the parameter, offset in
            the backup (both in elements); ordered by the last.
        offsets: offset of each slot in the backup, in elements.
        numel: size of the backup, in elements.
        weight_table: addresses of `weights`.
        grad_table: addresses of the gradients of the last ascent; it tells what a restore has to restore.
        partials: room for a partial sum of squares of each chunk, float64 (float32 where there is none), for kernels.
        counter: int32 0-d on the device, in which a norm kernel's blocks count themselves, so that the last one knows
            that it is the last; 0 between launches.
        backup: the saved weights, ``[numel]``; None while nothing is saved (a backend may keep it).
        plan: what a backend keeps with the bucket.
        stream: the CUDA stream of the last pass; elsewhere None.
        saved: int32 0-d on the device: `generation` once `backup` holds the weights of this step, which perturb writes;
            norm writes 0. So where perturb never ran, as in a CUDA graph's capture that failed, nothing is restored.
        generation: counts the calls of perturb; never 0.

    Raises:
        RuntimeError: a parameter has no memory; a CUDA graph is being captured.
        ValueError: two parameters, or two elements of one, share memory.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        groups: Sequence[int],
        names: Sequence[str],
        index: int,
        chunk_size: Callable[[int], int],
        direction: Direction = GRADIENT,
    ) -> None:
        if capturing(params[0].device):
            raise RuntimeError(
                "the parameters that have gradients are not those of the last step, and a CUDA graph is being "
                "captured: take a step with these before the capture"
            )
        self.params = list(params)
        self.groups = list(groups)
        self.names = list(names)
        self.index = index
        self.direction = direction
        self.device = self.params[0].device
        self.dtype = self.params[0].dtype
        self._any_dtensor = any(map(is_dtensor, self.params))
        shards = self._shards()
        self._sizes = [p.numel() for p in shards]
        self._dtypes = [self.dtype] * len(shards)
        _check_memory(shards, self.names)

        dense = [_is_dense(p) for p in shards]
        self._staged = [i for i, d in enumerate(dense) if not d]
        self.weights = [
            p if d else p.detach().clone(memory_format=torch.contiguous_format)
            for p, d in zip(shards, dense, strict=True)
        ]
        self._views = [(w.shape, w.stride()) for w in self.weights]
        self._grad_strides = [w.stride() for w in self.weights]
        self._places = Places(shards)
        self._like = Places(self.weights) if self._staged else self._places
        self._conformed = False
        self._single = [i for i, w in enumerate(self.weights) if w.numel() == 1]

        pointers = [w.data_ptr() for w in self.weights]
        sizes = [w.numel() for w in self.weights]
        self.offsets, self.numel = _slots(pointers, sizes, self.dtype.itemsize)
        chunks = _chunks(sizes, self.groups, self.offsets, chunk_size(self.numel))
        self.chunks = chunks.to(self.device)
        self.weight_table = PointerTable(pointers, self.device)
        self.grad_table = PointerTable([0] * len(pointers), self.device)
        sums = torch.float32 if self.device.type == "mps" else torch.float64
        self.partials = torch.zeros(max(1, len(chunks)), dtype=sums, device=self.device)
        self.counter = torch.zeros((), dtype=torch.int32, device=self.device)
        saved, self._saved = shared_zeros(1, torch.int32, self.device)
        self.saved = saved[0]
        self.generation = 1  # never 0, which norm writes
        self.grads: list[Tensor | None] = []
        self.backup: Tensor | None = None
        self.plan: object = None
        self.stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def moved(self) -> bool:
        """Whether a parameter has other memory, dtype, shape or strides than this bucket was laid out for."""
        return self._places.moved(self._shards())

    def restorable(self) -> bool:
        """Whether the parameters are still what was perturbed, whatever their shapes."""
        return self._places.in_place(self._shards())

    def follow(self) -> bool:
        """Orders the coming pass after the last, where that ran on another CUDA stream: `with sam:` may be around it.

        Returns:
            Whether it did. Memory belongs to the stream that it was made on, and once it is freed that stream may use
            it again: so whatever else the passes use has to be recorded for the new `stream` too.
        """
        if self.stream is None or (stream := torch.cuda.current_stream(self.device)) == self.stream:
            return False
        wait_for(self.stream)
        self.weight_table.record_stream(stream)
        self.grad_table.record_stream(stream)
        staged = [self.weights[i] for i in self._staged]
        for t in (self.chunks, self.partials, self.counter, self.saved, *staged):
            t.record_stream(stream)
        self.stream = stream
        return True

    def gather(self) -> None:
        """Takes up this step's gradients, and the values of staged parameters. Writes to no parameter.

        Raises:
            TypeError: a gradient is sparse, without memory of its own, or of another dtype than its parameter.
            ValueError: a gradient is of another shape, or on another device, than its parameter.
        """
        if self._any_dtensor:
            pairs = zip(self.params, self.names, strict=True)
            grads = [local_grad(p, self.direction.of(p), name) for p, name in pairs]
        else:
            grads = list(map(self.direction.of, self.params))
        if not (self.grad_table.take(grads, self._like) and not self._any_negated(grads)):
            if not PLAIN.issuperset(map(type, grads)):
                noun, names = self.direction.noun, self.names
                grads = [g if g is None else in_memory(g, f"{noun} of {names[i]}") for i, g in enumerate(grads)]
            present = grads if NoneType not in map(type, grads) else _or_else(grads, self.weights)
            if not self._conformed or not self._fit(cast("list[Tensor]", present)):
                grads = [None if g is None else self._conform(i, g) for i, g in enumerate(grads)]
                self._conformed = True
            self.grad_table.update([0 if g is None else g.data_ptr() for g in grads])
        self.grads = grads
        for i in self._staged:
            self.weights[i].copy_(local(self.params[i]))

    def release(self) -> None:
        """Lets go of the gradients: only the ascent needs them."""
        self.grads = []

    def unstage(self) -> None:
        """Brings what kernels wrote to the parameters: out of staged copies, and to the versions of DTensors."""
        pointers = self.grad_table.pointers if self._staged else []
        for i in self._staged:
            if pointers[i]:
                local(self.params[i]).copy_(self.weights[i])
        self._increment_versions()

    def restore_moved(self, but: Container[int] = ()) -> None:
        """Restores parameters one by one: some got other memory, or another dtype, while they were perturbed.

        Args:
            but: slots that stay as they are.
        """
        if self.backup is None or bool(self.saved != self.generation):  # kept from an earlier step
            return
        for i, view in zip(self.live(), self.live_views(self.backup), strict=True):
            if i not in but:
                local(self.params[i]).copy_(view)
        self.free_backup()
        self._increment_versions()

    def live(self) -> list[int]:
        """The slots that had a gradient in the last ascent: those that are perturbed, and restored."""
        if self.grad_table.complete:
            return list(range(len(self.params)))
        return [i for i, pointer in enumerate(self.grad_table.pointers) if pointer]

    def live_params(self) -> list[Tensor]:
        """The parameters of `live`."""
        return self.params if self.grad_table.complete else [self.params[i] for i in self.live()]

    def terms(self) -> list[tuple[int, Tensor, Tensor]]:
        """(group, w, g) of every live slot."""
        slots = zip(self.groups, self.weights, self.grads, self.grad_table.pointers, strict=True)
        return [(group, w, g) for group, w, g, pointer in slots if pointer and g is not None]

    def live_weights(self) -> list[Tensor]:
        """w of every live slot."""
        if self.grad_table.complete:
            return self.weights
        return [w for w, pointer in zip(self.weights, self.grad_table.pointers, strict=True) if pointer]

    def live_views(self, backup: Tensor) -> list[Tensor]:
        """For every live slot its range of `backup`, in the shape and strides that the weight had when it was saved."""
        return [backup.as_strided(*self._views[i], self.offsets[i]) for i in self.live()]

    def next_generation(self) -> int:
        """That of the perturb under way: an int32 that is not 0."""
        self.generation = self.generation % (2**31 - 1) + 1
        return self.generation

    def set_saved(self, generation: int) -> None:
        """saved <- generation, for backends without kernels that write it."""
        if self.device.type == "cpu":
            self._saved[0] = generation
        else:
            self.saved.fill_(generation)

    def abandoned(self) -> bool:
        """Whether the ascent was captured into a CUDA graph that never ran: nothing is to be restored or unstaged.

        Waits for the device, but only where a restore is not part of the capture.
        """
        return self.grad_table.captured and not capturing(self.device) and bool(self.saved != self.generation)

    def allocate_backup(self) -> Tensor:
        """Uninitialised memory for all slots, ``[numel]``; not yet the backup.

        Not by torch.empty, which fills it under torch.use_deterministic_algorithms: nothing reads what was not written.
        """
        size = self.numel * self.dtype.itemsize
        storage = torch.UntypedStorage(size, device=self.device)  # type: ignore[no-untyped-call]
        return torch.empty(0, dtype=self.dtype, device=self.device).set_(storage)

    def free_backup(self) -> None:
        """Lets go of the backup: its memory is used again only after what the current stream has still to do."""
        backup = self.backup
        if backup is not None and backup.is_cuda:
            backup.record_stream(torch.cuda.current_stream(self.device))  # perturb may have run on another one
        self.backup = None

    def _shards(self) -> list[Tensor]:
        """The parameters as this rank has them. FSDP2 may give a parameter another shard, as `module.to` does."""
        return [local(p) for p in self.params] if self._any_dtensor else self.params

    def _increment_versions(self) -> None:
        """Tells autograd, which looks at the version of a DTensor, of a write to its shard."""
        if self._any_dtensor:
            torch.autograd.graph.increment_version([self.params[i] for i in self.live()])

    def _fit(self, grads: Sequence[Tensor]) -> bool:
        """Whether all gradients lie in memory as their parameters do; lists, since each step asks."""
        try:
            return (
                [g.dtype for g in grads] == self._dtypes
                and list(map(Tensor.numel, grads)) == self._sizes
                and list(map(Tensor.stride, grads)) == self._grad_strides
                and (self.direction is GRADIENT or all(g.device == self.device for g in grads))
                and not self._any_negated(grads)
            )
        except RuntimeError:  # a sparse gradient has no strides
            return False

    def _any_negated(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether torch's negative bit is set on a gradient, whose memory then holds -g.

        `_fit` rejects such views by their strides already, except those of a single element.
        """
        return any(g.is_neg() for i in self._single if (g := grads[i]) is not None)

    def _conform(self, i: int, g: Tensor) -> Tensor:
        """The gradient of slot i, checked, in its weight's strides."""
        w, name, noun = self.weights[i], self.names[i], self.direction.noun
        if g.layout is not torch.strided:
            raise TypeError(
                f"the {noun} of {name} is sparse ({g.layout}); FusedSAM needs dense gradients: "
                "use nn.Embedding(..., sparse=False), or a param group of its own in another optimizer"
            )
        if g.dtype is not w.dtype:
            raise TypeError(
                f"the {noun} of {name} is {g.dtype} but the parameter is {w.dtype}; "
                f"convert one of them, or clear the {noun}s after converting the model"
            )
        if g.device != w.device:
            raise ValueError(
                f"the {noun} of {name} is on {g.device} but the parameter is on {w.device}; "
                f"clear the {noun}s after moving the model"
            )
        if g.shape != w.shape:
            raise ValueError(
                f"the {noun} of {name} has shape {tuple(g.shape)} but the parameter has {tuple(w.shape)}; "
                f"clear the {noun}s after changing the parameter"
            )
        if not g.is_neg() and all(n == 1 or a == b for n, a, b in zip(g.shape, g.stride(), w.stride(), strict=True)):
            # Equal but for dimensions of size 1, whose strides mean nothing: expect these from now on.
            self._grad_strides[i] = g.stride()
            return g
        return torch.empty_strided(w.shape, w.stride(), dtype=g.dtype, device=g.device).copy_(g)


def flatten_(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Moves parameters, of one device and dtype, into one flat buffer, in place: they become views of it.

    Values, shapes and strides stay; addresses change once. Parameters with gaps or without elements are left alone.

    Args:
        params: the parameters.
        names: what each is called in an error message.

    Raises:
        RuntimeError, ValueError: as ParameterBucket: flattening would part what shares memory.
    """
    _check_memory(params, names)
    movable = [p for p in params if p.numel() and _is_dense(p)]
    if not movable:
        return
    first = movable[0]
    offsets, numel = _slots([0] * len(movable), [p.numel() for p in movable], first.dtype.itemsize)
    flat = torch.zeros(numel, dtype=first.dtype, device=first.device)
    for p, offset in zip(movable, offsets, strict=True):
        p.data = flat.as_strided(p.shape, p.stride(), offset).copy_(p.detach())


def _or_else(grads: Sequence[Tensor | None], weights: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, and the weight where there is none."""
    return [w if g is None else g for g, w in zip(grads, weights, strict=True)]


def _runs(t: Tensor) -> tuple[int, list[tuple[int, int]]]:
    """How the elements of t lie in memory, in any order of the dimensions.

    Returns:
        How many lie side by side, without a gap; and the (stride, size) of each dimension that repeats such a run.
    """
    length, repeats = 1, []
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1):
        if stride == length:
            length *= size
        else:
            repeats.append((stride, size))
    return length, repeats


def _is_dense(t: Tensor) -> bool:
    """Whether the elements of t fill a range of memory, in any order of the dimensions, without gap or overlap."""
    return t.numel() == 0 or not _runs(t)[1]


def _check_memory(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raises where a parameter has no memory, or an element is there twice."""
    spans, runs = [], []
    for p, name in zip(params, names, strict=True):
        if p.numel() == 0:
            continue
        if p.data_ptr() == 0:
            raise RuntimeError(f"{name} has no memory (device {p.device}); materialise it before the step")
        length, repeats = _runs(p)
        if repeats and repeats[0][0] < length:
            raise ValueError(
                f"elements of {name} share memory (strides {p.stride()}); use a parameter of its own memory"
            )
        extent = length + sum(stride * (size - 1) for stride, size in repeats)
        spans.append((p.data_ptr(), p.data_ptr() + extent * p.element_size()))
        runs.append((p, length, repeats, name))
    spans.sort()
    if any(start < end for (_, end), (start, _) in itertools.pairwise(spans)):
        _check_runs(runs)


def _check_runs(runs: list[tuple[Tensor, int, list[tuple[int, int]], str]]) -> None:
    """Raises where two parameters share an element: between the columns of one lie others, which are not shared."""
    starts, lengths, owners = [], [], []
    with torch.device("cpu"):  # whatever torch.set_default_device says
        for i, (p, length, repeats, _) in enumerate(runs):
            start = torch.tensor([p.data_ptr()])
            for stride, size in repeats:
                start = (start[:, None] + torch.arange(size) * (stride * p.element_size())).flatten()
            starts.append(start)
            lengths.append(torch.full_like(start, length * p.element_size()))
            owners.append(torch.full_like(start, i))
        start, order = torch.cat(starts).sort(stable=True)
        shared = torch.nonzero(start[1:] < start[:-1] + torch.cat(lengths)[order[:-1]])
        if not len(shared):
            return
        i = int(shared[0])
        one, other = sorted(runs[slot][-1] for slot in torch.cat(owners)[order[i : i + 2]].tolist())
    raise ValueError(f"{one} and {other} share memory but are two parameters; tie them by using one nn.Parameter twice")


def _slots(pointers: Sequence[int], sizes: Sequence[int], itemsize: int) -> tuple[list[int], int]:
    """Offsets of the slots, each misaligned as its pointer is, and the size of all of them, in elements."""
    line = ALIGNMENT // itemsize
    offsets = []
    end = 0
    for pointer, size in zip(pointers, sizes, strict=True):
        start = -(-end // line) * line + pointer % ALIGNMENT // itemsize
        offsets.append(start)
        end = start + size
    return offsets, end


def _chunks(sizes: Sequence[int], groups: Sequence[int], offsets: Sequence[int], chunk_size: int) -> Tensor:
    """The chunk table on the host; see `ParameterBucket.chunks`."""
    with torch.device("cpu"):  # whatever torch.set_default_device says
        size = torch.tensor(sizes, dtype=torch.int64)
        counts = (size + chunk_size - 1) // chunk_size
        slot = torch.repeat_interleave(torch.arange(len(sizes)), counts)
        first = counts.cumsum(0) - counts
        offset = (torch.arange(len(slot)) - first[slot]) * chunk_size
        length = (size[slot] - offset).clamp(max=chunk_size)
        group = torch.tensor(groups, dtype=torch.int64)[slot]
        backup = torch.tensor(offsets, dtype=torch.int64)[slot] + offset
        return torch.stack((slot, length | group << 32, offset, backup), dim=1).contiguous()
