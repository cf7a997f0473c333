"""The scalars of one ascent: what norm writes and perturb reads, on one device."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from fastsam.device import capturing, shared_zeros, upload

__all__ = ["Scalars"]


class Host(NamedTuple):
    """The scalars of an ascent on a CPU, for Python: the memory of its tensors of the same names."""

    rho: array[float]
    epsilon: array[float]
    square_sums: array[float]
    norm: array[float]
    scale: array[float]


class Scalars:
    """The scalars of one ascent step on one device: the inputs of every group, the norm and the scales.

    Everything stays on the device, so that neither the norm nor a changed ``rho`` is ever waited for. The tensors
    keep their addresses for life: a captured CUDA graph reads and writes them again at every replay. The options alone
    get other memory when they change, so that a graph keeps those that it was captured with.

    Attributes:
        rho: ``rho`` of each group, ``[n_groups]``, `dtype`.
        epsilon: ``epsilon`` of each group, ``[n_groups]``, `dtype`.
        adaptive: 1 for each group that climbs by ASAM's rule, else 0; ``[n_groups]``, int32.
        square_sums: sum of the squared gradient elements of each bucket, ``[n_buckets]``, float64.
        norm: the global gradient norm, 0-d, `dtype`.
        scale: ``(1 / (norm + epsilon)) * rho`` of each group, ``[n_groups]``, `dtype`; 0 where that is not finite.
        groups_adaptive: `adaptive` as the host knows it.
        host: on a CPU, the same for Python; elsewhere not in use.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, n_groups: int, n_buckets: int) -> None:
        self.device = device
        self.dtype = dtype
        self.adaptive = torch.zeros(n_groups, device=device, dtype=torch.int32)
        # Apple's GPUs have no float64.
        sums = torch.float32 if device.type == "mps" else torch.float64
        self.rho, rho = shared_zeros(n_groups, dtype, device)
        self.epsilon, epsilon = shared_zeros(n_groups, dtype, device)
        self.square_sums, square_sums = shared_zeros(n_buckets, sums, device)
        norm, host_norm = shared_zeros(1, dtype, device)
        self.norm = norm[0]
        self.scale, scale = shared_zeros(n_groups, dtype, device)
        self.host = Host(rho, epsilon, square_sums, host_norm, scale)
        self.groups_adaptive: tuple[bool, ...] = (False,) * n_groups
        self._options: tuple[list[float], list[float], list[bool]] | None = None
        self._graphs = 0
        self._in_graphs: list[tuple[Tensor, ...]] = []

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """As torch's: another stream uses the memory."""
        for t in (self.rho, self.epsilon, self.adaptive, self.square_sums, self.norm, self.scale):
            t.record_stream(stream)

    def set_groups(
        self, rho: list[float | Tensor], epsilon: list[float], adaptive: list[bool], graphs: int = 0
    ) -> None:
        """Brings the groups' options to the device; copies only what changed since the last call.

        Args:
            rho: a float or a 0-d tensor for each group; a tensor is copied at every call, without a synchronisation.
            epsilon: a float for each group.
            adaptive: a bool for each group.
            graphs: how many steps were captured into CUDA graphs so far.

        Raises:
            RuntimeError: a float or bool changed since the last call, and a CUDA graph is being captured.
        """
        on_device = [(i, r) for i, r in enumerate(rho) if isinstance(r, Tensor)]
        options = ([0.0 if isinstance(r, Tensor) else r for r in rho], epsilon, adaptive)
        if options != self._options:
            if capturing(self.device):
                raise RuntimeError(
                    "rho, epsilon or adaptive changed between the last step and the capture of a CUDA graph: take a "
                    "step with them first; or make rho a 0-d tensor on the device, which a graph reads at every replay"
                )
            before, self._options = self._options or ([], [], []), None  # an upload may fail
            if graphs != self._graphs:
                kept = self.rho, self.epsilon, self.adaptive
                self._in_graphs.append(kept)
                self.rho, self.epsilon, self.adaptive = map(torch.clone, kept)
                self._graphs = graphs
            for target, values, old in zip((self.rho, self.epsilon, self.adaptive), options, before, strict=True):
                if values != old:
                    upload(target, torch.tensor(values, dtype=target.dtype, device="cpu"))
            self.groups_adaptive = tuple(adaptive)
            self._options = options
        for i, r in on_device:
            self.rho[i].copy_(r)
