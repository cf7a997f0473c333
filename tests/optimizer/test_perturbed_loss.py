"""perturbed_loss: the loss at w + e_w of the last step(closure)."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsam.composer import SAMOptimizer
from tests.linear import backward, make, two_calls


def closure_of(model, sam, read=lambda loss: loss):
    losses = []

    def closure():
        sam.zero_grad()
        loss = backward(model)
        losses.append(loss.detach())
        return read(loss)

    return closure, losses


def test_it_is_the_loss_of_the_second_pass(backend):
    model, sam = make(backend=backend)
    assert sam.perturbed_loss is None
    closure, losses = closure_of(model, sam)
    for _ in range(2):
        loss = sam.step(closure)
        assert torch.equal(sam.perturbed_loss, losses[-1])
        assert not sam.perturbed_loss.requires_grad
        assert torch.equal(loss.detach(), losses[-2])
        assert sam.perturbed_loss > loss


def test_where_the_gradients_at_w_are_there():
    """davda54/sam's use of a closure: step returns None, for nobody computed the loss at w inside."""
    model, sam = make(closure_passes="one")
    closure, losses = closure_of(model, sam)
    backward(model)
    assert sam.step(closure) is None
    assert len(losses) == 1
    assert torch.equal(sam.perturbed_loss, losses[0])


def test_after_first_step():
    model, sam = make()
    closure, losses = closure_of(model, sam)
    backward(model)
    sam.first_step(zero_grad=True)
    sam.step(closure)
    assert torch.equal(sam.perturbed_loss, losses[0])


@pytest.mark.parametrize("read", [float, lambda loss: np.float32(loss.item()), lambda loss: loss.double()])
def test_it_is_what_the_closure_returned(read):
    model, sam = make()
    closure, losses = closure_of(model, sam, read)
    loss = sam.step(closure)
    assert type(sam.perturbed_loss) is type(loss)
    assert sam.perturbed_loss == read(losses[1])
    assert sam.perturbed_loss - loss > 0


@pytest.mark.parametrize("read", [lambda loss: None, lambda loss: (loss, 1)], ids=["None", "tuple"])
def test_what_is_no_loss_is_not_kept(read):
    model, sam = make()
    sam.step(closure_of(model, sam)[0])
    sam.step(closure_of(model, sam, read)[0])
    assert sam.perturbed_loss is None


def test_none_in_two_calls():
    model, sam = make()
    sam.step(closure_of(model, sam)[0])
    sam.zero_grad()
    backward(model)
    sam.first_step(zero_grad=True)
    assert sam.perturbed_loss is None
    sam.restore()
    two_calls(model, sam)
    assert sam.perturbed_loss is None


@pytest.mark.parametrize("fresh", [False, True])
def test_none_on_plain_steps(fresh):
    model, sam = make(interval=2)
    closure, _ = closure_of(model, sam)
    for k in range(4):
        if fresh:
            backward(model)
        sam.step(closure)
        assert (sam.perturbed_loss is None) is (k % 2 == 0)
    sam.zero_grad()
    for call in (sam.first_step, lambda: backward(model), sam.second_step):
        call()
        assert sam.perturbed_loss is None


def test_none_after_an_exception():
    model, sam = make()
    closure, _ = closure_of(model, sam)
    sam.step(closure)

    def failing():
        if sam.perturbed:
            raise KeyError
        return closure()

    with pytest.raises(KeyError):
        sam.step(failing)
    assert sam.perturbed_loss is None


def test_along_the_momentum():
    """The only loss is that at w + e_w; the first step, which has no momentum yet, is plain."""
    model, sam = make(direction="momentum", momentum=0.9, rho=0.1)
    closure, losses = closure_of(model, sam)
    sam.step(closure)
    assert sam.perturbed_loss is None
    loss = sam.step(closure)
    assert torch.equal(sam.perturbed_loss, losses[-1])
    assert torch.equal(loss.detach(), losses[-1])


def test_copies_have_taken_no_step():
    model, sam = make()
    sam.step(closure_of(model, sam)[0])
    for copied in (copy.deepcopy(sam), pickle.loads(pickle.dumps(sam))):
        assert copied.perturbed_loss is None


def test_a_skipped_step_with_a_loss_scaler_keeps_it():
    """Whether the scaler skips the step the host does not ask."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model, sam = make(grad_scaler=scaler)
    losses = []

    def closure():
        sam.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        scaler.scale(loss).backward()
        losses.append(loss.detach())
        if sam.perturbed:
            model.bias.grad.fill_(torch.inf)
        return loss

    before = model.weight.detach().clone()
    sam.step(closure)
    assert torch.equal(model.weight.detach(), before)
    assert torch.equal(sam.perturbed_loss, losses[1])


@pytest.mark.parametrize("overflow", [None, 0, 1])
def test_composers_closures(overflow):
    """They return floats, or None where a gradient overflowed."""
    model, plain = make()
    sam = SAMOptimizer(plain.base_optimizer, 0.5)
    losses = []

    def closure(**kwargs):
        sam.zero_grad()
        losses.append(backward(model).item())
        return None if len(losses) - 1 == overflow else losses[-1]

    sam.step(closure)
    assert sam.perturbed_loss == (losses[1] if overflow is None else None)


class HostReads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_reads_nothing():
    model, sam = make()
    closure, _ = closure_of(model, sam)
    sam.step(closure)
    with HostReads() as reads:
        loss = sam.step(closure)
        sharpness = sam.perturbed_loss - loss.detach()
    assert reads.count == 0
    with HostReads() as reads:
        float(sharpness)
    assert reads.count == 1
