"""What can't work with a GradScaler: errors that say so, leave w and nothing of the scaler behind."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from fastsam import FusedSAM
from tests.oracle import copies, same_bits
from tests.scaled import (
    RHO,
    PlainTorch,
    backward,
    batches,
    leftovers,
    make_model,
    make_scaler,
    nothing,
    plant,
    two_calls,
)


def test_scaler_step_with_a_closure_is_an_error_that_leaves_nothing_behind() -> None:
    plain = PlainTorch(SGD, {"lr": 0.1})
    model, scaler = make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), SGD, rho=RHO, lr=0.1)
    (batch,) = batches(1)
    w = copies(model.parameters())
    backward(model, scaler, batch)
    with pytest.raises(RuntimeError, match=r"scaler\.step\(sam, closure\) can't work.*grad_scaler=scaler"):
        scaler.step(sam, lambda: backward(model, scaler, batch))
    assert not leftovers(sam)
    assert same_bits(w, copies(model.parameters()))
    sam.zero_grad()
    two_calls(sam, model, scaler, batch, nothing)
    plain.step(batch)
    torch.testing.assert_close(list(model.parameters()), list(plain.model.parameters()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("known", [False, True])
def test_scaler_step_without_a_second_pass_is_an_error_that_leaves_nothing_behind(known: bool) -> None:
    model, scaler = make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), SGD, lr=0.1, grad_scaler=scaler if known else None)
    backward(model, scaler, next(batches(1)))
    with pytest.raises(RuntimeError, match="not perturbed"):
        scaler.step(sam)
    assert not leftovers(sam)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_failing_base_step_leaves_nothing_behind(known: bool, fused: bool) -> None:
    model, scaler = make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), SGD, lr=0.1, fused=fused, grad_scaler=scaler if known else None)
    (batch,) = batches(1)
    w = copies(model.parameters())

    def fail(*_: object) -> None:
        raise OSError("full")

    hook = sam.base_optimizer.register_step_pre_hook(fail)
    backward(model, scaler, batch)
    sam.first_step(zero_grad=True)
    backward(model, scaler, batch)
    with pytest.raises(OSError, match="full"):
        sam.second_step() if known else scaler.step(sam)
    assert not leftovers(sam)
    assert not leftovers(sam.base_optimizer)
    assert same_bits(w, copies(model.parameters()))
    hook.remove()
    sam.zero_grad()
    backward(model, scaler, batch)
    assert sam.first_step()  # the next step starts as ever


def test_unscale_before_first_step_is_an_error_where_the_scaler_is_known() -> None:
    model, scaler = make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), SGD, lr=0.1, grad_scaler=scaler)
    w = copies(model.parameters())
    backward(model, scaler, next(batches(1)))
    scaler.unscale_(sam)
    with pytest.raises(RuntimeError, match="before the second backward"):
        sam.first_step()
    assert same_bits(w, copies(model.parameters()))
    scaler.update()
    sam.zero_grad()
    two_calls(sam, model, scaler, next(batches(1)), nothing)  # a new start


def test_unscale_in_a_closure_that_runs_twice_is_an_error() -> None:
    model, scaler = make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), SGD, lr=0.1, grad_scaler=scaler)
    w = copies(model.parameters())

    def closure() -> Tensor:
        loss = backward(model, scaler, next(batches(1)))
        scaler.unscale_(sam)
        return loss

    with pytest.raises(RuntimeError, match="before the second backward"):
        sam.step(closure)
    assert same_bits(w, copies(model.parameters()))
    assert not leftovers(sam)


@pytest.mark.parametrize("when", ["first", "second"])
def test_unscale_of_the_base_optimizer_is_an_error_where_the_scaler_is_known(when: str) -> None:
    model, scaler = make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), SGD, lr=0.1, grad_scaler=scaler)
    w = copies(model.parameters())
    backward(model, scaler, next(batches(1)))
    if when == "second":
        sam.first_step(zero_grad=True)
        backward(model, scaler, next(batches(1)))
    scaler.unscale_(sam.base_optimizer)
    with pytest.raises(RuntimeError, match="unscale_"):
        sam.first_step() if when == "first" else scaler.step(sam)
    assert same_bits(w, copies(model.parameters()))
    assert not leftovers(sam)


def test_forgotten_update_is_the_scalers_error_at_restored_weights() -> None:
    model, scaler = make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), SGD, lr=0.1, grad_scaler=scaler)
    first, second = batches(2)
    two_calls(sam, model, scaler, first, nothing)
    sam.step(lambda: backward(model, scaler, first))
    sam.zero_grad()
    w = copies(model.parameters())
    backward(model, scaler, second)
    sam.first_step(zero_grad=True)
    backward(model, scaler, second)
    with pytest.raises(RuntimeError, match="since the last update"):
        sam.second_step()
    assert same_bits(w, copies(model.parameters()))


def test_unscaled_loss_with_a_closure_and_no_known_scaler_is_seen_by_update() -> None:
    """The scale would end up in the step: torch itself says so, at update()."""
    model, scaler = make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), SGD, lr=1e-9)
    sam.step(lambda: backward(model, scaler, next(batches(1))))
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.update()


def test_fp16_gradients_are_refused_unless_the_base_optimizer_unscales_them() -> None:
    for fused in (False, True):
        w = nn.Parameter(torch.ones(4, dtype=torch.float16))
        scaler = make_scaler()
        with pytest.warns(UserWarning, match="16 bits"):
            sam = FusedSAM([w], SGD, lr=0.25, rho=0.5, fused=fused)
            scaler.scale(w.sum()).backward()
            sam.first_step(zero_grad=True)
        assert torch.equal(w, torch.full_like(w, 1.25))
        scaler.scale(w.sum()).backward()
        if fused:
            scaler.step(sam)
            assert torch.equal(w, torch.full_like(w, 0.75))
        else:
            with pytest.raises(ValueError, match="the gradients are fp16"):
                scaler.step(sam)
            assert torch.equal(w, torch.ones_like(w))
            assert not leftovers(sam)


def test_wrong_grad_scaler_is_a_type_error() -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"grad_scaler must be a torch\.amp\.GradScaler"):
        FusedSAM([w], SGD, lr=0.1, grad_scaler=1024.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"grad_scaler must be a torch\.amp\.GradScaler"):
        FusedSAM(SGD([w], lr=0.1), grad_scaler=True)  # type: ignore[arg-type]


def test_gradient_of_another_dtype_is_a_type_error_that_names_the_parameter() -> None:
    model = make_model(torch.float32)
    sam = FusedSAM(model.named_parameters(), SGD, lr=0.1)
    model(torch.ones(1, 6)).sum().backward()
    weight = model[2].weight
    weight.grad, grad = None, weight.grad
    weight.data = weight.data.double()
    weight.grad = grad.double()
    weight.data = weight.data.float()
    w = copies(model.parameters())
    with pytest.raises(TypeError, match=r"parameter 2 of param group 0 \(2\.weight\) is torch\.float64"):
        sam.first_step()
    assert same_bits(w, copies(model.parameters()))


@pytest.mark.parametrize("late", [False, True])
def test_unscale_before_first_step_where_the_scaler_is_not_known(late: bool) -> None:
    """The first scaler.step(sam) makes it known: the step after it meets the error, and none where it is right."""
    plain = PlainTorch(SGD, {"lr": 0.1})
    model, scaler = make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), SGD, rho=RHO, lr=0.1)

    def step(batch: tuple[Tensor, Tensor], early: bool) -> None:
        backward(model, scaler, batch)
        if early:
            scaler.unscale_(sam)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        sam.first_step(zero_grad=True)
        backward(model, scaler, batch)
        if not early:
            scaler.unscale_(sam)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(sam)
        scaler.update()
        sam.zero_grad()

    first, second = batches(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(first, early=False)
        plain.step(first, max_norm=0.5)
        w = copies(model.parameters())
        if late:
            step(second, early=False)
            plain.step(second, max_norm=0.5)
        else:
            with pytest.raises(RuntimeError, match="before the second backward"):
                step(second, early=True)
            assert same_bits(copies(model.parameters()), w)
    torch.testing.assert_close(list(model.parameters()), list(plain.model.parameters()), rtol=1e-9, atol=1e-12)


def test_another_scaler_that_steps_is_known_from_then_on() -> None:
    """As of a second run in one notebook."""
    model = make_model()
    sam = FusedSAM(model.parameters(), SGD, rho=RHO, lr=0.1)
    (batch,) = batches(1)
    for _ in range(2):
        scaler = make_scaler()
        two_calls(sam, model, scaler, batch, nothing)
    backward(model, scaler, batch)
    scaler.unscale_(sam)
    with pytest.raises(RuntimeError, match="before the second backward"):
        sam.first_step()


# -- what hooks see ----------------------------------------------------------------------------------------------------


class Clipping(FusedSAM):
    """A subclass whose step looks at the gradients first."""

    def step(self, closure=None):
        if closure is None:
            clip(self)
        return super().step(closure)


def clip(optimizer: torch.optim.Optimizer, *_: object) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.seen.append(float(nn.utils.clip_grad_norm_(params, 0.5)))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("where", ["hook", "subclass"])
def test_hooks_see_what_those_of_a_plain_optimizer_see(where: str, known: bool, fused: bool) -> None:
    """Unscaled gradients at w; and where one is not finite, no hook runs, as no step does."""
    plain = PlainTorch(SGD, {"lr": 0.1, "momentum": 0.9})
    plain.base.seen = []
    plain.base.register_step_pre_hook(clip)
    model, scaler = make_model(), make_scaler()
    cls = Clipping if where == "subclass" else FusedSAM
    options = {"grad_scaler": scaler} if known else {}
    sam = cls(model.parameters(), SGD, rho=RHO, lr=0.1, momentum=0.9, fused=fused, **options)
    sam.seen, after = [], []
    if where == "hook":
        sam.register_step_pre_hook(clip)
        sam.register_step_post_hook(lambda *_: after.append(1))
    for k, batch in enumerate(batches(6)):
        second = plant(1) if k == 3 else nothing
        w = copies(model.parameters())
        plain.step(batch, second=second)
        two_calls(sam, model, scaler, batch, second)
        assert (k == 3) is same_bits(copies(model.parameters()), w)
        assert scaler.get_scale() == plain.scaler.get_scale()
        torch.testing.assert_close(list(model.parameters()), list(plain.model.parameters()), rtol=1e-9, atol=1e-12)
    if where == "hook":
        assert sam.seen == pytest.approx(plain.base.seen)
        assert len(plain.base.seen) == len(after) == 5
    else:
        assert [x for x in sam.seen if math.isfinite(x)] == pytest.approx(plain.base.seen)
    assert sam.param_groups[0]["sam_step"] == 6
    assert not leftovers(sam)


@pytest.mark.parametrize("known", [False, True])
def test_hooks_see_what_the_user_has_unscaled(known: bool) -> None:
    model, scaler = make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), SGD, rho=RHO, lr=0.1, grad_scaler=scaler if known else None)
    seen: list[Tensor] = []
    sam.register_step_pre_hook(lambda *_: seen.extend(copies(p.grad for p in model.parameters())))
    (batch,) = batches(1)
    backward(model, scaler, batch)
    sam.first_step(zero_grad=True)
    backward(model, scaler, batch)
    scaler.unscale_(sam)
    expected = copies(p.grad for p in model.parameters())
    sam.second_step() if known else scaler.step(sam)
    assert same_bits(seen, expected)
