"""SAM's formulas as the paper has them, apart from the package under test, and comparison by bits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

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
