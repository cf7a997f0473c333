"""What torch has around an optimizer: learning rate schedulers, weight averaging, gradient clipping."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from fastsam import FusedSAM
from tests.oracle import copies, same_bits

STEPS = 12
RHO = 0.1
GROUP_KEYS = ("lr", "momentum", "initial_lr")

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=STEPS),  # changes momentum too
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=5),
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(16, 6, generator=generator, dtype=torch.float64)


def backward(model: nn.Module, x: Tensor) -> Tensor:
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach()


def plain_step(
    model: nn.Module,
    base: Optimizer,
    x: Tensor,
    first: Callable[[], object] = lambda: None,
    second: Callable[[], object] = lambda: None,
) -> Tensor:
    """SAM's step written out in plain torch, and what is done to the gradients of each pass."""
    params = list(model.parameters())
    w = copies(params)
    loss = backward(model, x)
    first()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in params))
    with torch.no_grad():
        for p in params:
            p += RHO * p.grad / norm
    base.zero_grad()
    backward(model, x)
    with torch.no_grad():
        for p, saved in zip(params, w, strict=True):
            p.copy_(saved)
    second()
    base.step()
    base.zero_grad()
    return loss


def sam_step(
    model: nn.Module,
    sam: FusedSAM,
    x: Tensor,
    first: Callable[[], object] = lambda: None,
    second: Callable[[], object] = lambda: None,
) -> Tensor:
    loss = backward(model, x)
    first()
    sam.first_step(zero_grad=True)
    backward(model, x)
    second()
    sam.second_step(zero_grad=True)
    return loss


def closure_step(model: nn.Module, sam: FusedSAM, x: Tensor) -> Tensor:
    def closure() -> Tensor:
        sam.zero_grad()
        return backward(model, x)

    loss = sam.step(closure)
    sam.zero_grad()
    return loss


@pytest.mark.parametrize("form", [sam_step, closure_step])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_does_what_it_does_to_the_base_optimizer(name: str, form: Callable[..., Tensor]) -> None:
    plain, model = make_model(), make_model()
    base = SGD(plain.parameters(), lr=0.1, momentum=0.9)
    sam = FusedSAM(model.parameters(), SGD, rho=RHO, lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The epoch parameter")  # SequentialLR's own
        schedulers = SCHEDULERS[name](base), SCHEDULERS[name](sam)
        rates = set()
        for x in batches():
            losses = plain_step(plain, base, x), form(model, sam, x)
            for scheduler, loss in zip(schedulers, losses, strict=True):
                # Rounded, so that both see the same plateaus.
                scheduler.step(*([round(loss.item(), 9)] if name == "ReduceLROnPlateau" else []))
            for key in GROUP_KEYS:
                assert sam.param_groups[0].get(key) == base.param_groups[0].get(key)
            rates.add(sam.param_groups[0]["lr"])
    assert len(rates) > 1 or name == "ReduceLROnPlateau"
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()), rtol=1e-8, atol=1e-11)


def test_reduce_on_plateau_reduces() -> None:
    sam = FusedSAM(make_model().parameters(), SGD, lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(sam, patience=0, factor=0.5)
    for _ in range(3):
        scheduler.step(1.0)
    assert sam.param_groups[0]["lr"] == sam.base_optimizer.param_groups[0]["lr"] == 0.025


def test_schedulers_state_follows_the_optimizers() -> None:
    """A scheduler's closed form reads initial_lr from the groups: it is in the checkpoint."""
    model = make_model()
    sam = FusedSAM(model.parameters(), SGD, lr=0.1)
    scheduler = lr_scheduler.StepLR(sam, 2)
    for x in list(batches())[:3]:
        sam_step(model, sam, x)
        scheduler.step()
    other = FusedSAM(make_model().parameters(), SGD, lr=0.7)
    other_scheduler = lr_scheduler.StepLR(other, 2)
    other.load_state_dict(sam.state_dict())
    other_scheduler.load_state_dict(scheduler.state_dict())
    assert other.param_groups[0]["initial_lr"] == 0.1
    assert other_scheduler.get_last_lr() == scheduler.get_last_lr() == [0.1 * 0.1]


@pytest.mark.parametrize("form", [sam_step, closure_step])
@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_weight_averaging(kind: str, form: Callable[..., Tensor]) -> None:
    """The average is of w after each step, against one written out; BatchNorm's statistics by update_bn."""
    plain, model = make_model(), make_model()
    base = SGD(plain.parameters(), lr=0.1, momentum=0.9)
    sam = FusedSAM(model.parameters(), SGD, rho=RHO, lr=0.1, momentum=0.9)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8) if kind == "ema" else None)
    expected: list[Tensor] = []
    for i, x in enumerate(batches()):
        plain_step(plain, base, x)
        form(model, sam, x)
        average.update_parameters(model)
        w = copies(plain.parameters())
        if i == 0:
            expected = w
        else:
            weight = 0.8 if kind == "ema" else i / (i + 1)
            expected = [weight * a + (1 - weight) * b for a, b in zip(expected, w, strict=True)]
    torch.testing.assert_close(copies(average.parameters()), expected, rtol=1e-8, atol=1e-11)
    update_bn(batches(), average)
    x = torch.cat([average.module[1](average.module[0](x)) for x in batches()]).detach()
    torch.testing.assert_close(average.module[2].running_mean, x.mean(0))


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipping_between_the_passes_and_after_the_second(clip: str) -> None:
    plain, model = make_model(), make_model()
    base = SGD(plain.parameters(), lr=0.1, momentum=0.9)
    sam = FusedSAM(model.parameters(), SGD, rho=RHO, lr=0.1, momentum=0.9)
    clipped = 0

    def clipping(model: nn.Module, limit: float) -> Callable[[], None]:
        def clip_() -> None:
            nonlocal clipped
            before = copies(p.grad for p in model.parameters())
            (clip_grad_norm_ if clip == "norm" else clip_grad_value_)(model.parameters(), limit)
            clipped += not same_bits(before, copies(p.grad for p in model.parameters()))

        return clip_

    for x in batches():
        plain_step(plain, base, x, clipping(plain, 0.01), clipping(plain, 0.02))
        sam_step(model, sam, x, clipping(model, 0.01), clipping(model, 0.02))
        torch.testing.assert_close(list(model.parameters()), list(plain.parameters()), rtol=1e-9, atol=1e-12)
        if clip == "norm":
            assert sam.grad_norm is not None
            torch.testing.assert_close(sam.grad_norm.item(), 0.01, rtol=1e-3, atol=0)
    assert clipped > 2 * STEPS  # both passes did clip


def test_clipping_the_first_gradients_norm_does_not_change_the_step() -> None:
    """rho * g / ||g|| does not feel it: only the second gradients' norm is worth clipping."""
    clipped, free = make_model(), make_model()
    for model in (clipped, free):
        sam = FusedSAM(model.parameters(), SGD, rho=RHO, lr=0.1)
        for x in batches():
            if model is clipped:
                sam_step(model, sam, x, first=lambda: clip_grad_norm_(clipped.parameters(), 1e-3))
            else:
                sam_step(model, sam, x)
    torch.testing.assert_close(list(clipped.parameters()), list(free.parameters()), rtol=1e-7, atol=1e-10)


def test_clipping_in_the_closure() -> None:
    """A closure that runs twice clips both times; the first has no effect."""
    plain, model = make_model(), make_model()
    base = SGD(plain.parameters(), lr=0.1)
    sam = FusedSAM(model.parameters(), SGD, rho=RHO, lr=0.1)
    for x in batches():

        def closure(x: Tensor = x) -> Tensor:
            sam.zero_grad()
            loss = backward(model, x)
            assert clip_grad_norm_(model.parameters(), 0.02) > 0.02
            return loss

        plain_step(plain, base, x, second=lambda: clip_grad_norm_(plain.parameters(), 0.02))
        sam.step(closure)
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()), rtol=1e-7, atol=1e-10)
