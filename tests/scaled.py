"""Training with a GradScaler, the real one: both of FusedSAM's forms, and plain torch with SAM written out."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

from fastsam import FusedSAM
from tests.oracle import copies

RHO = 0.1
STEPS = 9
SCALE = 2.0**10
OPTIMIZERS: list[tuple[type[Optimizer], dict[str, object]]] = [
    (SGD, {"lr": 0.1, "momentum": 0.9}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    (AdamW, {"lr": 0.01}),
    (AdamW, {"lr": 0.01, "fused": True}),
]
NAMES = ["sgd", "sgd fused", "adamw", "adamw fused"]
Planted = Callable[[list[Tensor]], None]


def make_model(dtype: torch.dtype = torch.float64, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).to(device, dtype)


def batches(n: int = STEPS, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        yield (
            torch.randn(16, 6, generator=generator).to(device, dtype),
            torch.randint(3, (16,), generator=generator).to(device),
        )


def make_scaler(device: str = "cpu", **kwargs: float) -> GradScaler:
    return GradScaler(device, **{"init_scale": SCALE, "growth_interval": 2, **kwargs})


def nothing(grads: list[Tensor]) -> None:
    """Plants no infinity."""


def plant(where: int, value: float = math.inf) -> Planted:
    def planted(grads: list[Tensor]) -> None:
        grads[where].view(-1)[-1] = value

    return planted


def backward(model: nn.Module, scaler: GradScaler, batch: tuple[Tensor, Tensor], planted: Planted = nothing) -> Tensor:
    loss = nn.functional.cross_entropy(model(batch[0]).float(), batch[1])
    scaler.scale(loss).backward()
    planted([p.grad for p in model.parameters()])
    return loss.detach()


class PlainTorch:
    """SAM's two passes written out around a base optimizer, and torch's scaler on that optimizer itself."""

    def __init__(
        self,
        base: type[Optimizer],
        kwargs: dict[str, object],
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
    ) -> None:
        self.model = make_model(dtype, device)
        self.base = base(self.model.parameters(), **kwargs)
        self.scaler = make_scaler(device)

    def step(
        self,
        batch: tuple[Tensor, Tensor],
        *,
        plain: bool = False,
        first: Planted = nothing,
        second: Planted = nothing,
        max_norm: float | None = None,
    ) -> None:
        params = list(self.model.parameters())
        if not plain:
            w = copies(params)
            backward(self.model, self.scaler, batch, first)
            norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in params))
            with torch.no_grad():
                for p in params:
                    if math.isfinite(norm):
                        p += RHO * p.grad / norm
                    p.grad = None
        backward(self.model, self.scaler, batch, second)
        with torch.no_grad():
            for p, saved in zip(params, params if plain else w, strict=True):
                p.copy_(saved)
        if max_norm is not None:
            self.scaler.unscale_(self.base)
            clip_grad_norm_(params, max_norm)
        self.scaler.step(self.base)
        self.scaler.update()
        self.base.zero_grad()


def two_calls(
    sam: FusedSAM,
    model: nn.Module,
    scaler: GradScaler,
    batch: tuple[Tensor, Tensor],
    second: Planted,
    first: Planted = nothing,
) -> None:
    plain = (sam.param_groups[0]["sam_step"] + 1) % sam.interval != 0
    backward(model, scaler, batch, second if plain else first)
    assert sam.first_step(zero_grad=True) is not plain
    if not plain:
        backward(model, scaler, batch, second)
    scaler.step(sam)
    scaler.update()
    sam.zero_grad()


def by_closure(
    sam: FusedSAM,
    model: nn.Module,
    scaler: GradScaler,
    batch: tuple[Tensor, Tensor],
    second: Planted,
    first: Planted = nothing,
) -> None:
    plain = (sam.param_groups[0]["sam_step"] + 1) % sam.interval != 0
    passes = iter([second] if plain else [first, second])

    def closure() -> Tensor:
        sam.zero_grad()
        return backward(model, scaler, batch, next(passes))

    assert isinstance(sam.step(closure), Tensor)
    assert next(passes, None) is None
    scaler.update()


def states(optimizer: Optimizer) -> list[Tensor]:
    return [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]


def leftovers(optimizer: Optimizer) -> set[str]:
    return {"grad_scale", "found_inf", "step"} & vars(optimizer).keys()
