"""DTensors: their local shards, and the sum of squares over all of them.

FSDP2 (``fully_shard``) and tensor parallelism make parameters and gradients DTensors. Perturbing and restoring write to
the local shard, without communication. Only the norm needs the other ranks: the local sums of squares are summed over
the dimensions of the device mesh that a parameter is sharded on, and over no other, so that what is replicated counts
once. That is one all-reduce of a few scalars a step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsam.torch_api import local_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as ProcessGroup
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs
else:  # tools read the signature of FusedSAM
    ProcessGroup = getattr(torch.distributed, "ProcessGroup", type(None))

__all__ = ["ProcessGroup", "Shardings", "in_memory", "is_dtensor", "is_fsdp1", "local", "local_grad"]


def is_dtensor(t: Tensor) -> TypeIs[DTensor]:
    """Whether t is a DTensor."""
    # Where nobody has imported the module there are none; importing it takes 0.4 s.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def is_fsdp1(p: Tensor) -> bool:
    """Whether p is a parameter of FullyShardedDataParallel: a shard that looks like a whole tensor."""
    return getattr(p, "_fsdp_flattened", False)


def local(t: Tensor) -> Tensor:
    """The shard of t on this rank; t itself when it is no DTensor."""
    return local_tensor(t) if is_dtensor(t) else t


def in_memory(g: Tensor, name: str) -> Tensor:
    """A gradient or momentum as a tensor that has memory.

    Some subclasses have none of their own: a collective's result that is still on its way is waited for, and what is
    kept in 8 bits or packed is asked for its values.

    Args:
        g: a tensor, of any class; no DTensor.
        name: what it is called in an error message.

    Raises:
        TypeError: its class does not tell its values, or is no tensor's.
    """
    if type(g) is Tensor:
        return g
    if not isinstance(g, Tensor):  # AggMo's momentum is a dict
        raise TypeError(f"the {name} is a {type(g).__name__}: FusedSAM can only climb along a tensor")
    if callable(wait := getattr(g, "wait", None)):  # AsyncCollectiveTensor
        g = wait()
    if g.layout is not torch.strided or g.numel() == 0 or g.data_ptr() != 0:
        return g
    if callable(dequantize := getattr(type(g), "dequantize", None)) and dequantize is not Tensor.dequantize:
        values: Tensor = dequantize(g)
        if values.data_ptr() != 0:
            return values
    raise TypeError(
        f"the {name} is a {type(g).__name__}, which has no memory of its own and no dequantize() that tells its "
        "values: FusedSAM can't read it; use a plain tensor"
    )


def local_grad(p: Tensor, g: Tensor | None, name: str) -> Tensor | None:
    """The shard of p's gradient that belongs to the shard of p on this rank.

    A gradient that is placed otherwise than its parameter (partial sums, in sequence parallel layers) is brought to its
    placement for the ascent: a collective for each such parameter.

    Args:
        p: a parameter.
        g: its gradient, or what stands for it.
        name: what p is called in an error message.

    Raises:
        TypeError: only one of parameter and gradient is a DTensor.
    """
    if g is None:
        return None
    if is_dtensor(p) and is_dtensor(g):
        if g.placements != p.placements:
            g = g.redistribute(placements=p.placements)
        return in_memory(local_tensor(g), f"gradient of {name}")
    if is_dtensor(p) or is_dtensor(g):
        raise TypeError(
            f"the gradient of {name} is a {type(g).__name__} but the parameter is a {type(p).__name__}; clear the "
            "gradients after sharding the model"
        )
    return in_memory(g, f"gradient of {name}")


class Shardings:
    """The ways in which parameters are sharded, and the sums over the shards.

    All ranks find the same, in the same order, whatever gradients each of them has: so all agree on the collectives.

    Args:
        params: all parameters of an optimizer.
        process_group: whose ranks hold different parameters, whether these are sharded or not; None: there is none.

    Attributes:
        device: where the other ranks can be reached: that of the parameters, or of their mesh.
    """

    def __init__(self, params: Iterable[Tensor], process_group: ProcessGroup | None = None) -> None:
        self._ways: dict[tuple[str, ...], int] = {(): 0}
        self._groups: dict[str, tuple[ProcessGroup, str]] = {}
        self._process_group = process_group
        self.device = torch.device("cpu")
        for p in params:
            device = p.device
            if is_dtensor(p):
                device = torch.device(p.device_mesh.device_type)  # of shards that are offloaded to the CPU, too
                self._ways.setdefault(self._sharded_over(p), len(self._ways))
            if self.device.type == "cpu":
                self.device = device

    def __len__(self) -> int:
        """How many ways there are; the first is not to be sharded."""
        return len(self._ways)

    @property
    def collective(self) -> bool:
        """Whether other ranks take part in the sum, and wait for this one even where it has no gradient."""
        return len(self._ways) > 1 or self._process_group is not None

    def index(self, p: Tensor, name: str) -> int:
        """Which way p is sharded.

        Args:
            p: one of the parameters.
            name: what it is called in an error message.

        Raises:
            ValueError: it is a partial sum.
        """
        if not is_dtensor(p):
            return 0
        if any(placement.is_partial() for placement in p.placements):
            raise ValueError(
                f"{name} is a DTensor of partial sums {p.placements}, so no rank has its values; redistribute it to "
                "Replicate() or Shard(dim)"
            )
        return self._ways[self._sharded_over(p)]

    def reduce(self, sums: list[Tensor]) -> Tensor:
        """Sums over the shards, then over the ways, then over the process group.

        Args:
            sums: for each way this rank's part of each of the sums, ``[n_sums]``, all of one device and dtype.

        Returns:
            The sums over everything, ``[n_sums]``; the same bits on all ranks.
        """
        sums = list(sums)
        for name, (group, device_type) in self._groups.items():
            members = [i for ways, i in self._ways.items() if name in ways]
            # Shards that are offloaded to the CPU are summed by the mesh's own backend, on its device.
            over_shards = torch.stack([sums[i] for i in members]).to(device_type)
            torch.distributed.all_reduce(over_shards, group=group)
            for i, total in zip(members, over_shards.to(sums[0].device), strict=True):
                sums[i] = total
        total = torch.stack(sums).sum(0)
        if self._process_group is not None:
            across = total.to(self.device)
            torch.distributed.all_reduce(across, group=self._process_group)
            total = across.to(total.device)
        return total

    def _sharded_over(self, p: DTensor) -> tuple[str, ...]:
        """The names of the process groups that hold different shards of p, in the order of the mesh's dimensions."""
        names = []
        for dim, placement in enumerate(p.placements):
            if not placement.is_replicate() and p.device_mesh.size(dim) > 1:
                group = p.device_mesh.get_group(dim)
                self._groups.setdefault(group.group_name, (group, p.device_mesh.device_type))
                names.append(group.group_name)
        return tuple(names)
