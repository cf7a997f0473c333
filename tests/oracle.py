"""SAM as the paper has it, apart from the package under test: its formulas, whole trainings, and comparison by bits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

NORM_TOLERANCE = 2e-6
"""Relative, against fp64, for gradients of at most fp32."""


def bits(t: Tensor) -> Tensor:
    """The bit pattern of t: NaN equals itself, 0.0 differs from -0.0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.detach().clone(memory_format=torch.contiguous_format).view(integers[t.element_size()])


def same_bits(a: Tensor | Sequence[Tensor], b: Tensor | Sequence[Tensor]) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def norm64(weights: Iterable[Tensor], grads: Iterable[Tensor | None], adaptive: Iterable[bool]) -> float:
    """The global gradient norm in fp64; adaptive: of |w| * g."""
    total = 0.0
    for w, g, a in zip(weights, grads, adaptive, strict=True):
        if g is not None:
            t = g.detach().double()
            if a:
                t = w.detach().double().abs() * t
            total += float((t * t).sum())
    return total**0.5


def perturbed(w: Tensor, g: Tensor, norm: Tensor, rho: float | Tensor, epsilon: float, adaptive: bool) -> Tensor:
    """w + e_w given the norm, each operation rounded; in fp32 for 16-bit weights, rounded once more at the end."""
    dtype = torch.float64 if w.dtype is torch.float64 else torch.float32
    scale = (norm + torch.tensor(epsilon, dtype=norm.dtype)).reciprocal() * torch.as_tensor(rho, dtype=norm.dtype)
    w_wide, g_wide = w.detach().to(dtype), g.to(dtype)
    e_w = (w_wide * w_wide * g_wide if adaptive else g_wide) * scale.to(dtype)
    return (w_wide + e_w).to(w.dtype)


def is_exact(backend: str, dtype: torch.dtype) -> bool:
    """Whether a backend rounds to this dtype as IEEE 754 says: Triton's interpreter truncates to bfloat16."""
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return not (interpreted and dtype is torch.bfloat16)


def assert_perturbed(backend: str, actual: Tensor, expected: Tensor) -> None:
    """Equal bits where the backend's rounding allows it; 0.0 and -0.0 count as equal."""
    if is_exact(backend, actual.dtype):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual.detach(), expected)
    else:
        torch.testing.assert_close(actual.detach(), expected, rtol=2**-7, atol=1e-6)


class PlainSAM:
    """Sharpness-aware minimization in plain torch around an optimizer of torch's, for whole trainings.

    The norm is taken in fp64. rho, epsilon and adaptive of a param group win over those given here.
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        rho: float,
        adaptive: bool = False,
        *,
        epsilon: float = 1e-12,
        interval: int = 1,
        start: int = 0,
        direction: str = "gradient",
    ) -> None:
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.base = base
        own = {"rho": rho, "adaptive": adaptive, "epsilon": epsilon}
        groups = {p: group for group in base.param_groups for p in group["params"]}
        self.options = [{key: groups[p].get(key, value) for key, value in own.items()} for p in self.params]
        self.interval, self.start, self.direction = interval, start, direction
        self.steps = 0

    @property
    def is_sam_step(self) -> bool:
        along_nothing = self.direction == "momentum" and not self.base.state
        return self.steps >= self.start and (self.steps + 1) % self.interval == 0 and not along_nothing

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True))

    def momenta(self) -> list[Tensor]:
        """v of the base optimizer: SGD's or Adam's."""
        states = [self.base.state[p] for p in self.params]
        return [state["momentum_buffer"] if "momentum_buffer" in state else state["exp_avg"] for state in states]

    @torch.no_grad()
    def climb(self, directions: list[Tensor]) -> list[Tensor]:
        """w <- w + e_w; gives w as it was."""
        saved = copies(self.params)
        moves = list(zip(self.params, directions, self.options, strict=True))
        squares = [(w.abs() * d if o["adaptive"] else d).double().square().sum() for w, d, o in moves]
        self.norm = torch.stack(squares).sum().sqrt()
        for w, d, o in moves:
            w += (w.square() if o["adaptive"] else 1) * d * o["rho"] / (self.norm + o["epsilon"])
        return saved

    def gradients_above(self, loss: Callable[[], Tensor], ascent: list[Tensor] | None = None) -> list[Tensor]:
        """The gradients at w + e_w; w is as before. `ascent`: what to climb along, where it is not the direction."""
        if ascent is None:
            along_gradient = self.direction == "gradient"
            ascent = self.gradients(loss()) if along_gradient else [-v for v in self.momenta()]
        saved = self.climb(ascent)
        gradients = self.gradients(loss())
        with torch.no_grad():
            for w, before in zip(self.params, saved, strict=True):
                w.copy_(before)
        return gradients

    def step(self, gradients: list[Tensor]) -> None:
        """The base optimizer's, at w."""
        for p, g in zip(self.params, gradients, strict=True):
            p.grad = g
        self.base.step()
        self.steps += 1

    def train(self, loss: Callable[[], Tensor]) -> None:
        """A step, with an ascent where interval, start and direction want one."""
        self.step(self.gradients_above(loss) if self.is_sam_step else self.gradients(loss()))
