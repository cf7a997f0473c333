"""The contestants: everything that takes norm, perturb and restore steps over a list of parameters.

Each one works on `nn.Parameter`s of its own that share the weights' memory, takes the gradients from `p.grad`, and does
the whole of a SAM step but the base optimizer's.
"""

import timeit
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

import fastsam
from fastsam import places

EPSILON = 1e-12
FASTSAM = "fastsam-"
WALKS = ("reading", "copying", "in place", "as perturb does")
"""Those of bandwidth.cpp, by number."""
BLOCK = 2**14
"""Elements, at the least, that the walks of bandwidth.cpp move whole, in any dtype."""
FLOOR_PASSES = (7, 8)
"""Reads and writes of a list of parameters that nobody can save, plain and adaptive. norm reads g (adaptive: and w);
perturb reads w and g, writes w and the backup; restore reads the backup and writes w."""


class EmptyBase(torch.optim.Optimizer):
    """A base optimizer whose step costs nothing."""

    def __init__(self, params: Any, lr: float = 0.0) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], float] | None = None) -> None:
        pass


class Contestant(ABC):
    """One way to take a SAM step.

    Attributes:
        held: copies of the weights that it keeps between steps (the shared weights not counted).
        temporary: copies of the weights that it allocates during a step, at its peak.
        owns_weights: it moves the parameters to other memory, so it gets a copy of the weights, which counts in `held`.
        exact: restore brings back the same bits.
        norm_error: bound of the norm's relative error. torch's own fp32 norm on CPU is short by 0.8 % at 1e8 elements.
        passes: reads and writes of a whole list of parameters or gradients in a step, plain and adaptive, where known.
    """

    held: ClassVar[int] = 0
    temporary: ClassVar[int] = 0
    owns_weights: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    norm_error: ClassVar[float] = 0.05
    passes: ClassVar[tuple[int, int] | None] = None

    def __init__(self, params: Sequence[nn.Parameter], rho: float, adaptive: bool) -> None:
        self.params = list(params)
        self.rho = rho
        self.adaptive = adaptive

    @abstractmethod
    def perturb(self) -> None:
        """norm, save, w <- w + e_w."""

    @abstractmethod
    def restore(self) -> None:
        """W <- saved w."""

    def run(self) -> None:
        self.perturb()
        self.restore()


class Fastsam(Contestant):
    """FusedSAM with one backend."""

    held = 1
    norm_error = 2e-6
    passes = FLOOR_PASSES
    backend: ClassVar[str]

    def __init__(self, params: Sequence[nn.Parameter], rho: float, adaptive: bool) -> None:
        super().__init__(params, rho, adaptive)
        self.sam = fastsam.FusedSAM(self.params, EmptyBase, rho=rho, adaptive=adaptive, backend=self.backend)

    def perturb(self) -> None:
        self.sam.first_step()

    def restore(self) -> None:
        self.sam.restore()


class FastsamForeach(Fastsam):
    """The foreach backend as in a plain install, where the native library does not look at the tensors either."""

    laid_out = False

    def perturb(self) -> None:
        # What looks at them is chosen in the first step.
        with nullcontext() if self.laid_out else mock.patch.object(places, "native", return_value=None):
            self.sam.first_step()
        self.laid_out = True


def fastsam_contestants() -> dict[str, type[Contestant]]:
    """One for each backend that works in this process, "fastsam-cpp" and so on."""
    kinds: dict[str, type[Contestant]] = {}
    for backend in fastsam.available_backends():
        members: dict[str, Any] = {"backend": backend}
        if backend in ("foreach", "reference"):
            members |= {"held": 0, "temporary": 2, "passes": None}
        parent = FastsamForeach if backend == "foreach" else Fastsam
        kinds[FASTSAM + backend] = type(f"Fastsam_{backend}", (parent,), members)
    return kinds


class PytorchOptimizer(Contestant):
    """pytorch_optimizer's SAM, the installed package itself, around a base optimizer that does nothing."""

    temporary = 2
    passes = (12, 20)

    def __init__(self, params: Sequence[nn.Parameter], rho: float, adaptive: bool) -> None:
        import pytorch_optimizer  # where it is not installed, this contestant alone is left out

        super().__init__(params, rho, adaptive)
        self.sam = pytorch_optimizer.SAM(self.params, EmptyBase, rho=rho, adaptive=adaptive)

    def perturb(self) -> None:
        self.sam.first_step()

    def restore(self) -> None:
        self.sam.second_step()


class Davda54(Contestant):
    """The sequence of davda54/sam: one parameter at a time, restored by pointer."""

    held = 1
    temporary = 2
    owns_weights = True
    passes = (12, 18)

    def __init__(self, params: Sequence[nn.Parameter], rho: float, adaptive: bool) -> None:
        super().__init__(params, rho, adaptive)
        self.saved: list[Tensor] = []

    @torch.no_grad()
    def perturb(self) -> None:
        norms = [((p.abs() if self.adaptive else 1.0) * p.grad).norm(p=2) for p in self.params]
        scale = self.rho / (torch.stack(norms).norm(p=2) + EPSILON)
        self.saved = []
        for p in self.params:
            self.saved.append(p.data.clone())
            p.add_((torch.pow(p, 2) if self.adaptive else 1.0) * p.grad * scale.to(p))

    def restore(self) -> None:
        for p, w in zip(self.params, self.saved, strict=True):
            p.data = w


class Composer(Contestant):
    """The sequence of MosaicML Composer's SAMOptimizer: keeps e_w and subtracts it again, which drifts by rounding."""

    temporary = 1
    exact = False
    passes = (9, 0)

    def __init__(self, params: Sequence[nn.Parameter], rho: float, adaptive: bool) -> None:
        if adaptive:
            raise NotImplementedError("Composer's SAM has no adaptive form")
        super().__init__(params, rho, adaptive)
        self.e_w: list[Tensor] = []

    @torch.no_grad()
    def perturb(self) -> None:
        norm = torch.stack([p.grad.norm() for p in self.params]).norm()
        scale = self.rho / (norm + EPSILON)
        self.e_w = []
        for p in self.params:
            e_w = p.grad * scale
            p.add_(e_w)
            self.e_w.append(e_w)

    @torch.no_grad()
    def restore(self) -> None:
        for p, e_w in zip(self.params, self.e_w, strict=True):
            p.sub_(e_w)
        self.e_w = []


class Foreach(Contestant):
    """torch._foreach_*, the scale left on the device, the backup allocated anew in each step."""

    temporary = 2
    passes = (10, 20)
    keeps_backup: ClassVar[bool] = False
    reads_scale: ClassVar[bool] = False

    def __init__(self, params: Sequence[nn.Parameter], rho: float, adaptive: bool) -> None:
        super().__init__(params, rho, adaptive)
        self.weights = [p.detach() for p in self.params]
        self.backup: list[Tensor] | None = None

    @torch.no_grad()
    def perturb(self) -> None:
        weights, grads = self.weights, [p.grad for p in self.params]
        weighted = grads
        if self.adaptive:
            weighted = torch._foreach_abs(weights)
            torch._foreach_mul_(weighted, grads)
        scale = self.rho / (torch.stack(torch._foreach_norm(weighted)).norm() + EPSILON)
        del weighted
        if self.backup is None:
            self.backup = [torch.empty_like(w) for w in weights]
        torch._foreach_copy_(self.backup, weights)
        self.add(weights, grads, scale)

    def add(self, weights: list[Tensor], grads: list[Tensor], scale: Tensor) -> None:
        if self.reads_scale and self.adaptive:
            torch._foreach_addcmul_(weights, torch._foreach_mul(weights, weights), grads, scale.item())
        elif self.reads_scale:
            torch._foreach_add_(weights, grads, alpha=scale.item())
        elif self.adaptive:
            e_w = torch._foreach_mul(weights, weights)
            torch._foreach_mul_(e_w, grads)
            torch._foreach_mul_(e_w, scale)
            torch._foreach_add_(weights, e_w)
        else:
            torch._foreach_add_(weights, torch._foreach_mul(grads, scale))

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self.weights, self.backup)
        if not self.keeps_backup:
            self.backup = None


class ForeachKept(Foreach):
    """The same with a backup that is kept."""

    held = 1
    temporary = 1
    keeps_backup = True


class ForeachItem(ForeachKept):
    """The same with a kept backup and the scale read by .item(): the host waits, but no e_w is written."""

    passes = (8, 16)
    reads_scale = True


def reference_step(
    weights: list[Tensor], grads: list[Tensor], backup: list[Tensor], rho: float, adaptive: bool
) -> None:
    """The step as reference.py states it, one parameter at a time; torch.compile fuses it."""
    weighted = [w.abs() * g for w, g in zip(weights, grads, strict=True)] if adaptive else grads
    norm = torch.stack([g.norm() for g in weighted]).norm()
    scale = rho / (norm + EPSILON)
    for w, g, saved in zip(weights, grads, backup, strict=True):
        saved.copy_(w)
        w.add_((w**2 if adaptive else 1.0) * g * scale)


def reference_restore(weights: list[Tensor], backup: list[Tensor]) -> None:
    for w, saved in zip(weights, backup, strict=True):
        w.copy_(saved)


class Compiled(Contestant):
    """torch.compile of the reference step, with a kept backup."""

    held = 1

    def __init__(self, params: Sequence[nn.Parameter], rho: float, adaptive: bool) -> None:
        super().__init__(params, rho, adaptive)
        self.weights = [p.detach() for p in self.params]
        self.backup = [torch.empty_like(w) for w in self.weights]
        torch._dynamo.reset()
        self.compiled_step = torch.compile(reference_step, dynamic=False)
        self.compiled_restore = torch.compile(reference_restore, dynamic=False)

    @torch.no_grad()
    def perturb(self) -> None:
        grads = [p.grad for p in self.params]
        self.compiled_step(self.weights, grads, self.backup, self.rho, self.adaptive)

    @torch.no_grad()
    def restore(self) -> None:
        self.compiled_restore(self.weights, self.backup)


class Copy:
    """One copy_ of as many elements: what the floor is made of.

    It runs once untimed each time, so that it finds its memory in the caches as a step's later passes find theirs: a
    floor on cold memory would be too easy.
    """

    held = 2
    passes = (2, 2)
    way: str | None = None
    """Which of several ways it takes."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        # At random: constant data costs less energy, and a GPU that is held back by it copies faster.
        generator = torch.Generator(device).manual_seed(0)
        self.source = torch.empty(numel, dtype=dtype, device=device).normal_(generator=generator)
        self.target = torch.empty_like(self.source).copy_(self.source)

    def prepare(self) -> None:
        self.run()

    def run(self) -> None:
        self.target.copy_(self.source)


class InPlace(Copy):
    """One in-place pass over as many elements: the bandwidth where no line is fetched only to be overwritten."""

    def run(self) -> None:
        self.target.neg_()


class Walk(Copy):
    """The fastest way to move as many bytes of those in bandwidth.cpp: reading, copying, in place, as perturb does.

    Memory is cut into up to 8 parts that are walked side by side: that keeps more cache lines under way than one walk.
    """

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(-(-numel // BLOCK) * BLOCK, dtype, device)
        from torch.utils.cpp_extension import load  # imports setuptools

        source, flags = Path(__file__).with_name("bandwidth.cpp"), ["-std=c++20", "-O3", "-march=native"]
        load("fastsam_bench", [str(source)], extra_cflags=flags, is_python_module=False)
        words = self.source.view(torch.int64), self.target.view(torch.int64)
        ways = [*product(range(4), (1, 2, 4, 8), (False,)), *product((1, 3), (1, 2, 4, 8), (True,))]  # only some write
        walks = {way: partial(torch.ops.fastsam_bench.walk, *words, *way) for way in ways}
        times = {way: min(timeit.repeat(walk, number=1, repeat=5)) for way, walk in walks.items()}
        kind, streams, past_caches = fastest = min(times, key=times.__getitem__)
        self.walk = walks[fastest]
        self.way = f"{WALKS[kind]}, streams: {streams}{', past the caches' * past_caches}"

    def run(self) -> None:
        self.walk()


class Add(Copy):
    """A copy by a kernel: on a GPU copy_ is the driver's, which need not be the fastest."""

    def run(self) -> None:
        torch.add(self.source, 0, out=self.target)


class Restore(Copy):
    """A copy by fastsam's own kernel, the restore of one parameter."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(numel, dtype, device)
        target = nn.Parameter(self.target)
        target.grad = self.source
        self.sam = fastsam.FusedSAM([target], EmptyBase)
        self.sam.first_step()
        self.sam.restore()
        ((self.backend, self.bucket),) = self.sam._state.perturbation.buckets
        self.bucket.backup = self.source

    @torch.no_grad()
    def run(self) -> None:
        self.backend.restore(self.bucket)
        self.bucket.backup = self.source  # which restore lets go of


YARDSTICKS: dict[str, type[Copy]] = {"copy": Copy, "in-place": InPlace}
CPU_YARDSTICKS: dict[str, type[Copy]] = YARDSTICKS | {"walk": Walk}
GPU_YARDSTICKS: dict[str, type[Copy]] = YARDSTICKS | {"add": Add, "restore": Restore}
"""Each moves two lists. On a GPU the floor is what the fastest of them takes, on a CPU what a copy takes."""


def yardsticks(device: torch.device) -> dict[str, type[Copy]]:
    return GPU_YARDSTICKS if device.type == "cuda" else CPU_YARDSTICKS


PEERS: dict[str, type[Contestant]] = {
    "pytorch_optimizer": PytorchOptimizer,
    "davda54": Davda54,
    "composer": Composer,
    "foreach": Foreach,
    "foreach-kept": ForeachKept,
    "foreach-item": ForeachItem,
    "compile": Compiled,
}
CONTESTANTS: dict[str, type[Contestant]] = fastsam_contestants() | PEERS
