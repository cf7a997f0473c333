"""Which bucket each parameter belongs to, and one perturbation over all buckets."""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastsam import backends
from fastsam.bucket import ParameterBucket, flatten_
from fastsam.device import capturing
from fastsam.direction import GRADIENT, Direction
from fastsam.distributed import ProcessGroup, Shardings, is_dtensor
from fastsam.notices import tell_once, warn
from fastsam.options import Group, check_dtype, check_options, host_value, parameter_name
from fastsam.scalars import Scalars

__all__ = ["Perturbation", "check_any_perturbed", "flatten_groups", "no_gradient_error"]


class Perturbation:
    """One perturbation over all buckets: measured, written and taken back.

    The buckets are laid out again when parameters come, move or change. A parameter enters a bucket with its first
    gradient, so that frozen ones cost nothing.

    Args:
        backend: the name to ask every device's backend by; None for the default of each.
        direction: what stands for the gradient of each parameter.

    Attributes:
        direction: as given.
        buckets: with the backend of each.
        rehearsed: whether `rehearse` found gradients.
        loss_scale: what the gradients of the last ascent were multiplied by, 0-d, where it is known and not 1.
    """

    def __init__(self, backend: str | None, direction: Direction = GRADIENT) -> None:
        self.direction = direction
        self.buckets: list[tuple[backends.Backend, ParameterBucket]] = []
        self.loss_scale: Tensor | None = None
        self._backend = backend
        self._scalars: dict[torch.device, Scalars] = {}
        self._measured: dict[torch.device, Scalars] = {}  # those of the last ascent, which a new layout does not have
        self._combiners: dict[torch.device, backends.Backend] = {}
        self._shardings = Shardings([])
        self._sharding_of: list[int] = []
        self._slotless: list[Tensor] = []
        self._on_cuda: list[ParameterBucket] = []
        self._in_graphs: list[object] = []  # what a CUDA graph reads and writes at every replay lives as long as this
        self._params: list[list[Tensor]] = []
        self._process_group: ProcessGroup | None = None
        self._options: list[tuple[Any, ...]] | None = None
        self._versions: list[list[int]] = []
        self.rehearsed = False
        self._warned = False

    @property
    def norm(self) -> Tensor | None:
        """The global norm of the last ascent, 0-d, on the first bucket's device; None before the first.

        Without the loss scale, where that is known.
        """
        for scalars in self._measured.values():
            if self.loss_scale is None:
                return scalars.norm.clone()
            return scalars.norm / self.loss_scale.to(scalars.norm.device, non_blocking=True)
        return None

    def measure(self, groups: list[Group], process_group: ProcessGroup | None = None) -> bool:
        """Computes norm and scale from the gradients that are there. Writes to no parameter.

        Args:
            groups: the param groups, each with FusedSAM's options.
            process_group: whose ranks hold other parameters, which count in the norm too.

        Returns:
            Whether there are any, on one of the ranks; else there is nothing to `perturb` by.

        Raises:
            RuntimeError: all groups are left out.
            TypeError: a gradient or parameter of a kind that can't be perturbed.
            ValueError: an option out of range; a gradient that does not fit its parameter.
        """
        if (
            not self._same_parameters(groups)
            or process_group is not self._process_group
            or any(bucket.moved() for _, bucket in self.buckets)
            or any(g is not None for g in map(self.direction.of, self._slotless))
        ):
            self._process_group = process_group
            self._lay_out(groups)
            self._params = [list(self._perturbed(group)) for group in groups]
        for bucket in self._on_cuda:
            self._follow(bucket)
        for _, bucket in self.buckets:
            bucket.gather()
        collective = self._shardings.collective
        no_gradient = not any(g is not None for _, bucket in self.buckets for g in bucket.grads)
        if no_gradient and not collective:
            check_any_perturbed(groups)
            return False
        self._set_options(groups)
        finish = len(self.buckets) == 1 and not collective
        for backend, bucket in self.buckets:
            backend.norm(bucket, self._scalars[bucket.device], finish)
        if collective or len(self._scalars) > 1:
            ranks = self._sum_over_ranks(not no_gradient)
            # The other ranks wait for this one in the sum, so it takes part first.
            if no_gradient and ranks == 0:
                return False
        if not finish:
            self._combine()
        self._measured = self._scalars
        return True

    def gradient_norm(self, groups: list[Group], process_group: ProcessGroup | None = None) -> Tensor:
        """The norm that `measure` would find along the gradient, with the loss scale; changes nothing, `norm` neither.

        Args:
            groups: as in `measure`.
            process_group: as in `measure`.

        Raises:
            RuntimeError: no parameter has a gradient, on any of the ranks; or as `measure`.
            TypeError, ValueError: as `measure`.
        """
        trial = Perturbation(self._backend)
        trial._warned = True  # of what perturb does
        trial.measure(groups, process_group)
        if (norm := trial.norm) is None:
            raise no_gradient_error(groups)
        return norm

    def rehearse(self, groups: list[Group], process_group: ProcessGroup | None = None) -> None:
        """Meets what `measure` and `perturb` would refuse, of the gradients that are there; changes nothing.

        So `start` does not fail after 70 % of a run. That all groups are left out may be meant until then, and is told.

        Args:
            groups: as in `measure`.
            process_group: as in `measure`; no other rank takes part.

        Raises:
            RuntimeError: there is no memory for the backup.
            TypeError, ValueError: as `measure`.
        """
        if process_group is None and not _any_perturbed(groups):
            tell_once(
                "nothing to perturb",
                "perturb=False in all param groups leaves nothing to perturb yet, and a SAM step refuses that: set "
                "perturb=True in those that SAM is for before the first one",
            )
        params = [p for group in groups for p in self._perturbed(group)]
        if all(g is None for g in map(self.direction.of, params)) or any(map(capturing, {p.device for p in params})):
            return
        trial = Perturbation(self._backend, self.direction)
        trial._warned = self._warned
        trial._lay_out(groups)
        self._warned = trial._warned
        for _, bucket in trial.buckets:
            if not any(map(is_dtensor, bucket.params)):  # theirs may take a collective, and other ranks have none
                bucket.gather()
        backups = [bucket.allocate_backup() for _, bucket in trial.buckets]
        self.rehearsed = bool(backups)

    def perturb(self) -> None:
        """w <- w + e_w, by the last `measure`."""
        for backend, bucket in self.buckets:
            backend.perturb(bucket, self._scalars[bucket.device])
            bucket.unstage()
            bucket.release()
        self._versions = [[p._version for p in bucket.live_params()] for _, bucket in self.buckets]

    def smallest(self) -> Tensor | None:
        """The smallest of the parameters that the last ascent moved and that take hooks; None where none do."""
        params = (p for _, bucket in self.buckets for p in bucket.live_params())
        # Neither a frozen one nor a result that retains its gradient does.
        moved = [p for p in params if p.requires_grad and p.is_leaf]
        return min(moved, key=Tensor.numel, default=None)

    def all_written(self) -> bool:
        """Whether somebody has written to every perturbed parameter since `perturb`, as load_state_dict does."""
        live = False
        for (_, bucket), versions in zip(self.buckets, self._versions, strict=False):
            for p, version in zip(bucket.live_params(), versions, strict=False):
                if p._version == version:
                    return False
                live = True
        return live

    def release(self) -> None:
        """Lets go of the gradients that a failed `measure` took up."""
        for _, bucket in self.buckets:
            bucket.release()

    def restore(self, *, again: bool = False) -> None:
        """w <- saved w, bit for bit, wherever the last `perturb` got to.

        Args:
            again: keep what a second restore needs. A signal handler may restore while `perturb` is under way, which
                then goes on writing.
        """
        for _, bucket in self.buckets:
            if bucket.backup is not None and capturing(bucket.device) and not bucket.grad_table.captured:
                raise RuntimeError(
                    "second_step() is being captured into a CUDA graph, but first_step() ran before the capture, so "
                    "the graph would restore from memory that is freed: capture both, or neither"
                )
        for bucket in self._on_cuda:
            self._follow(bucket)
        for backend, bucket in self.buckets:
            backup = bucket.backup
            if bucket.abandoned():
                bucket.free_backup()
            elif bucket.restorable():
                backend.restore(bucket)
                bucket.unstage()
            else:
                bucket.restore_moved()
            if again:
                bucket.backup = backup
            else:
                bucket.release()

    def restore_unwritten(self) -> bool:
        """w <- saved w, but not where somebody has written since `perturb`; returns whether somebody has."""
        written = [
            {
                i
                for i, p, version in zip(bucket.live(), bucket.live_params(), versions, strict=True)
                if p._version != version
            }
            for (_, bucket), versions in zip(self.buckets, self._versions, strict=True)
        ]
        if not any(written):
            self.restore()
            return False
        for bucket in self._on_cuda:
            self._follow(bucket)
        for (_, bucket), slots in zip(self.buckets, written, strict=True):
            if not bucket.abandoned():
                bucket.restore_moved(but=slots)
            bucket.free_backup()
            bucket.release()
        return True

    def _perturbed(self, group: Group) -> list[Tensor]:
        """The parameters of a group, if it is one that is perturbed."""
        params: list[Tensor] = group["params"]
        return params if group["perturb"] and self.direction.alive(group) else []

    def _same_parameters(self, groups: list[Group]) -> bool:
        """Whether the groups hold the parameters of the last layout."""
        pairs = zip(self._params, map(self._perturbed, groups), strict=False)
        return len(groups) == len(self._params) and all(
            len(known) == len(params) and all(map(is_, known, params)) for known, params in pairs
        )

    def _follow(self, bucket: ParameterBucket) -> None:
        """Orders the coming pass after the last one, whatever CUDA streams they run on."""
        if bucket.follow() and bucket.stream is not None:
            self._scalars[bucket.device].record_stream(bucket.stream)

    def _lay_out(self, groups: list[Group]) -> None:
        slotted = {id(p) for _, bucket in self.buckets for p in bucket.params}
        members: dict[tuple[torch.device, torch.dtype, int], list[tuple[Tensor, int, str]]] = {}
        # All parameters, perturbed or not: all ranks find the same ways.
        shardings = Shardings((p for group in groups for p in group["params"]), self._process_group)
        slotless = []
        for i, group in enumerate(groups):
            for j, p in enumerate(self._perturbed(group)):
                if self.direction.of(p) is None and not (id(p) in slotted and p.requires_grad):
                    slotless.append(p)
                    continue
                name = parameter_name(group, i, j)
                check_dtype(p, name)
                kind = (p.device, p.dtype, shardings.index(p, name))
                members.setdefault(kind, []).append((p, i, name))
        self._warn_16_bit([dtype for _, dtype, _ in members])

        devices = list(dict.fromkeys(device for device, _, _ in members))
        if not devices and shardings.collective:
            devices = [shardings.device]  # for the sum, and for the norm of what other ranks have
        dtype = torch.float64 if any(dtype is torch.float64 for _, dtype, _ in members) else torch.float32
        buckets: list[tuple[backends.Backend, ParameterBucket]] = []
        sharding_of = []
        scalars, combiners = {}, {}
        for device in devices:
            combiners[device] = backend = backends.load(self._backend, device)
            here = [(sharding, entries) for (d, _, sharding), entries in members.items() if d == device]
            scalars[device] = Scalars(device, dtype, len(groups), max(1, len(here)))
            for index, (sharding, entries) in enumerate(here):
                entries.sort(key=_order)
                params, indices, names = zip(*entries, strict=True)
                sharding_of.append(sharding)
                buckets.append(
                    (backend, ParameterBucket(params, indices, names, index, backend.chunk_size, self.direction))
                )
        if any(bucket.grad_table.graphs for _, bucket in self.buckets):
            self._in_graphs.append((self.buckets, self._scalars))
        self.buckets, self._scalars, self._slotless, self._options = buckets, scalars, slotless, None
        self._combiners, self._shardings, self._sharding_of = combiners, shardings, sharding_of
        self._on_cuda = [bucket for _, bucket in buckets if bucket.stream is not None]

    def _set_options(self, groups: list[Group]) -> None:
        sign = self.direction.sign
        options = [(host_value(g["rho"]), g["epsilon"], g["adaptive"], sign(g), g["perturb"]) for g in groups]
        on_device = any(isinstance(rho, Tensor) for rho, *_ in options)
        if not on_device and options == self._options:
            return
        self._options = None
        for i, group in enumerate(groups):
            check_options(group, f" of param group {i}")
        signed = [rho if sign > 0 else -rho for rho, _, _, sign, _ in options]
        epsilon, adaptive = [g["epsilon"] for g in groups], [g["adaptive"] for g in groups]
        graphs = sum(bucket.grad_table.graphs for bucket in self._on_cuda)
        for scalars in self._scalars.values():
            scalars.set_groups(signed, epsilon, adaptive, graphs)
        self._options = None if on_device else options

    def _sum_over_ranks(self, any_gradient: bool) -> Tensor:
        """Replaces the sums of squares by their total over all devices and ranks.

        Args:
            any_gradient: whether this rank has one. Gradients of zeros are gradients, so the sum does not tell.

        Returns:
            0 where no rank has one, 0-d.
        """
        all_scalars = list(self._scalars.values())
        first = all_scalars[0].square_sums
        sums = first.new_zeros(len(self._shardings), 2)
        sums[:, 1] = any_gradient
        for (_, bucket), i in zip(self.buckets, self._sharding_of, strict=True):
            sums[i, 0] += self._scalars[bucket.device].square_sums[bucket.index].to(first.device)
        total, ranks = self._shardings.reduce(list(sums)).unbind()
        for scalars in all_scalars:
            scalars.square_sums.zero_()
            scalars.square_sums[0].copy_(total)
        return ranks

    def _combine(self) -> None:
        """norm and scale from the sums of squares, once a device."""
        for device, scalars in self._scalars.items():
            self._combiners[device].combine(scalars)

    def _warn_16_bit(self, dtypes: list[torch.dtype]) -> None:
        short = [dtype for dtype in dtypes if dtype in (torch.bfloat16, torch.float16)]
        if short and not self._warned:  # once an optimizer: each has its own parameters
            self._warned = True
            warn(
                f"FusedSAM perturbs {short[0]} parameters: rounding w + e_w to 16 bits leaves most weights where they "
                "were, whoever computes it. Keep the parameters in float32 and run the model under torch.autocast."
            )


def _any_perturbed(groups: list[Group]) -> bool:
    """Whether there is a group that is perturbed, or no group."""
    return not groups or any(group["perturb"] for group in groups)


def _order(entry: tuple[Tensor, int, str]) -> tuple[bool, int, int]:
    """Vectors first, small ones before large: the many small ones lie side by side in the backup, for one copy."""
    p, group, _ = entry
    return (p.dim() != 1, group, p.numel() if p.dim() == 1 else 0)


def check_any_perturbed(groups: list[Group]) -> None:
    """Raises a RuntimeError where there are groups and all are left out."""
    if not _any_perturbed(groups):
        raise RuntimeError(
            "perturb=False in all param groups leaves nothing to perturb: set perturb=True in those that SAM is for"
        )


def no_gradient_error(groups: list[Group]) -> RuntimeError:
    """What an ascent along the gradient is refused by, where there is none."""
    where = "" if all(group["perturb"] for group in groups) else " of a group with perturb=True"
    return RuntimeError(
        f"no parameter{where} has a gradient: call loss.backward() before first_step(), or pass step() a closure that "
        "computes the loss and calls backward(); under FSDP2, both passes need set_requires_gradient_sync(True)"
    )


def flatten_groups(groups: list[Group], first: int = 0) -> None:
    """Makes the parameters of the groups from `first` on views of one flat buffer for each device and dtype.

    Raises:
        ValueError: a parameter is a DTensor, or shares memory.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, str]]] = {}
    for i in range(first, len(groups)):
        for j, p in enumerate(groups[i]["params"]):
            if is_dtensor(p):
                raise ValueError("flatten_parameters can't move DTensors, which belong to FSDP2 or tensor parallelism")
            by_kind.setdefault((p.device, p.dtype), []).append((p, parameter_name(groups[i], i, j)))
    for alike in by_kind.values():
        params, names = zip(*alike, strict=True)
        flatten_(params, names)
