"""interval: step k, from 0, is a SAM step when (k + 1) % interval == 0; the others are the base optimizer's."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from fastsam import FusedSAM
from tests.oracle import PlainSAM, same_bits

BACKENDS = ["foreach", "cpp"]  # what is tested here depends on no arithmetic


def make(backend, interval):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    options = {"rho": 0.5, "interval": interval, "backend": backend, "lr": 0.1, "momentum": 0.9}
    sam = FusedSAM(model.parameters(), torch.optim.SGD, **options)
    return model, sam


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def loss_of(model, i):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(i))
    return model(x).pow(4).mean()


def backward(model, i):
    loss = loss_of(model, i)
    loss.backward()
    return loss


def two_calls(model, sam, i):
    sam.zero_grad()
    backward(model, i)
    if sam.first_step(zero_grad=True):
        backward(model, i)
        kind = "sam"
    else:
        kind = "plain"
    sam.second_step()
    return kind


def closure(model, sam, i):
    passes = []

    def run():
        sam.zero_grad()
        passes.append(sam.perturbed)
        return backward(model, i)

    loss = sam.step(run)
    assert isinstance(loss, torch.Tensor)
    return {(False,): "plain", (False, True): "sam"}[tuple(passes)]


def closure_after_backward(model, sam, i):
    passes = []

    def run():
        passes.append(sam.perturbed)
        return backward(model, i)

    sam.zero_grad()
    backward(model, i)
    assert sam.step(run) is None
    return {(): "plain", (True,): "sam"}[tuple(passes)]


FORMS = [two_calls, closure, closure_after_backward]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_which_steps_are_sam_steps(backend, interval, form):
    model, sam = make(backend, interval)
    twin = nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    base = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    plain = PlainSAM(twin, base, 0.5, interval=interval)
    for k in range(7):
        is_sam = (k + 1) % interval == 0
        assert form(model, sam, k) == ("sam" if is_sam else "plain")
        plain.train(lambda k=k: loss_of(twin, k))
        torch.testing.assert_close(weights(model), weights(twin), rtol=1e-5, atol=1e-6)
        if k + 1 < interval:
            assert same_bits(weights(model), weights(twin))


def test_first_step_keeps_gradients_on_a_plain_step():
    model, sam = make(None, 2)
    backward(model, 0)
    grads = [p.grad.clone() for p in model.parameters()]
    before = weights(model)
    assert sam.first_step(zero_grad=True) is False
    assert not sam.perturbed
    assert same_bits([p.grad for p in model.parameters()], grads)
    assert same_bits(weights(model), before)
    assert sam.grad_norm is None


def test_first_step_may_be_left_out_on_a_plain_step():
    model, sam = make(None, 2)
    backward(model, 0)
    before = weights(model)
    sam.step()
    assert not same_bits(weights(model), before)
    with pytest.raises(RuntimeError, match="first_step"):
        sam.step()


def test_the_first_pass_context_is_not_for_plain_steps():
    """Under no_sync the only gradient of a plain step would differ between the ranks."""
    model, sam = make(None, 2)
    entered = []
    sam.first_pass_context = lambda: nullcontext(entered.append(sam.is_sam_step))
    for i in range(4):
        closure(model, sam, i)
    assert entered == [True, True]


def test_stale_gradients_are_not_stepped_by_on_a_plain_step():
    model, sam = make(None, 3)
    assert closure(model, sam, 0) == "plain"
    assert closure(model, sam, 1) == "plain"


def test_a_step_that_raised_or_was_given_up_is_not_counted():
    model, sam = make(None, 2)
    two_calls(model, sam, 0)
    for _ in range(2):
        sam.zero_grad()
        backward(model, 1)
        assert sam.first_step() is True
        sam.restore()

        def failing():
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            sam.step(failing)
    assert two_calls(model, sam, 2) == "sam"
    assert two_calls(model, sam, 3) == "plain"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by", ["restore", "with"])
@pytest.mark.parametrize("k", [0, 1], ids=["plain step", "SAM step"])
def test_a_batch_that_is_skipped_after_first_step_leaves_nothing(backend, form, by, k):
    """`sam.restore(); sam.zero_grad(); continue`, in docs/switching.md; in a closure the clearing may be left out."""
    model, sam = make(backend, 2)
    twin = nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    plain = PlainSAM(twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), 0.5, interval=2)
    for i in range(k):
        form(model, sam, i)
        plain.train(lambda i=i: loss_of(twin, i))
    backward(model, 9)
    if by == "with":
        with sam:
            sam.first_step(zero_grad=True)
    else:
        sam.first_step(zero_grad=True)
        sam.restore()
    if form is not closure:
        sam.zero_grad()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    for i in range(k, 4):
        form(model, sam, i)
        plain.train(lambda i=i: loss_of(twin, i))
        torch.testing.assert_close(weights(model), weights(twin), rtol=1e-5, atol=1e-6)


def test_a_group_that_comes_later_keeps_the_count():
    model, sam = make(None, 2)
    two_calls(model, sam, 0)
    extra = nn.Parameter(torch.ones(2))
    sam.add_param_group({"params": [extra]})
    extra.grad = torch.ones(2)
    assert two_calls(model, sam, 1) == "sam"
    assert two_calls(model, sam, 2) == "plain"
    assert [group["sam_step"] for group in sam.param_groups] == [3, 3]


@pytest.mark.parametrize("interval", [1, 3])
def test_is_sam_step_tells_what_first_step_will(interval, backend):
    model, sam = make(backend, interval)
    for i in range(2 * interval):
        before = sam.is_sam_step
        backward(model, i)
        assert sam.first_step(zero_grad=True) is before is ((i + 1) % interval == 0)
        assert sam.is_sam_step is before  # until the step is done
        if before:
            backward(model, i)
        sam.second_step(zero_grad=True)
