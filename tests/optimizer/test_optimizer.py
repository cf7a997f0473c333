"""FusedSAM as an optimizer: its two calls, its groups, and the order of calls."""

import contextlib
import warnings

import pytest
import torch
from torch import nn

from fastsam import FusedSAM
from tests.linear import backward, make, two_calls
from tests.oracle import copies, same_bits


def test_weights_move_and_come_back_at_their_addresses(backend):
    model, sam = make(backend=backend)
    addresses = [p.data_ptr() for p in model.parameters()]
    for _ in range(3):
        before = copies(model.parameters())
        backward(model)
        assert sam.first_step(zero_grad=True) is True
        assert sam.perturbed
        assert not same_bits(list(model.parameters()), before)
        sam.restore()
        assert not sam.perturbed
        assert same_bits(list(model.parameters()), before)
        sam.restore()  # nothing to do
        two_calls(model, sam)
        assert not sam.perturbed
        assert not same_bits(list(model.parameters()), before)
    assert [p.data_ptr() for p in model.parameters()] == addresses


@pytest.mark.parametrize("zero_grad", [False, True])
def test_zero_grad_of_the_two_calls(zero_grad):
    model, sam = make()
    backward(model)
    sam.first_step(zero_grad=zero_grad)
    assert [p.grad is None for p in model.parameters()] == [zero_grad] * 2
    backward(model)
    sam.second_step(zero_grad=zero_grad)
    assert [p.grad is None for p in model.parameters()] == [zero_grad] * 2


def test_zero_grad_clears_or_writes_zeros():
    model, sam = make()
    backward(model)
    sam.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    sam.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_groups_and_state_are_the_base_optimizers():
    model, sam = make(momentum=0.9)
    base = sam.base_optimizer
    assert isinstance(base, torch.optim.SGD)
    assert isinstance(sam, torch.optim.Optimizer)
    assert sam.param_groups is base.param_groups
    assert sam.state is base.state
    two_calls(model, sam)
    for who in (sam, base):
        who.load_state_dict(who.state_dict())
        assert sam.param_groups is base.param_groups
        assert sam.state is base.state
        assert len(sam.state) == 2
        two_calls(model, sam)
    assert sam.defaults["lr"] == 0.1
    assert sam.defaults["rho"] == 0.5
    assert "rho: 0.5" in repr(sam)


def test_around_an_optimizer_that_has_trained():
    model, _ = make()
    base = torch.optim.SGD([{"params": [model.weight], "rho": 0.2}, {"params": [model.bias]}], lr=0.1, momentum=0.9)
    backward(model)
    base.step()
    momentum = base.state[model.weight]["momentum_buffer"]
    sam = FusedSAM(base, rho=0.7)
    assert [group["rho"] for group in sam.param_groups] == [0.2, 0.7]
    assert sam.state[model.weight]["momentum_buffer"] is momentum
    two_calls(model, sam)


def test_named_parameters():
    model, _ = make()
    sam = FusedSAM(model.named_parameters(), torch.optim.SGD, lr=0.1)
    assert sam.param_groups[0]["param_names"] == ["weight", "bias"]
    two_calls(model, sam)
    model.bias.data = model.bias.data.double()  # its gradient stays float
    model.weight.grad, model.bias.grad = torch.ones(3, 4), None
    sam.first_step()
    sam.second_step()
    assert sam.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_grad_norm_is_the_last_ascents():
    model, sam = make()
    assert sam.grad_norm is None
    backward(model)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm()
    sam.first_step(zero_grad=True)
    norm = sam.grad_norm
    assert norm.shape == ()
    assert float(norm) == pytest.approx(float(expected), rel=2e-6)
    backward(model)
    sam.second_step()
    assert torch.equal(sam.grad_norm, norm)
    kept = norm.clone()
    two_calls(model, sam)
    assert torch.equal(norm, kept)  # a copy: later steps leave it alone
    assert not torch.equal(sam.grad_norm, norm)


def test_grad_norm_after_a_step_that_was_refused():
    """It stays, also where there are other buckets by then."""
    model, sam = make()
    backward(model)
    sam.first_step(zero_grad=True)
    backward(model)
    sam.second_step(zero_grad=True)
    norm = sam.grad_norm
    sam.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        sam.first_step()
    assert torch.equal(sam.grad_norm, norm)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("first_step", lambda sam: sam.first_step()),
        ("state_dict", lambda sam: sam.state_dict()),
        ("load_state_dict", lambda sam: sam.load_state_dict({"state": {}, "param_groups": []})),
        ("add_param_group", lambda sam: sam.add_param_group({"params": [nn.Parameter(torch.ones(1))]})),
        ("pickle", lambda sam: sam.__getstate__()),
    ],
)
def test_what_must_wait_while_perturbed(name, call):
    model, sam = make()
    backward(model)
    sam.first_step()
    perturbed = copies(model.parameters())
    with pytest.raises(RuntimeError, match=rf"{name}.*perturbed.*restore\(\)"):
        call(sam)
    assert sam.perturbed
    assert same_bits(list(model.parameters()), perturbed)


@pytest.mark.parametrize("call", [lambda sam: sam.second_step(), lambda sam: sam.step()], ids=["second_step", "step"])
def test_second_step_needs_a_first_step(call):
    model, sam = make()
    backward(model)
    before = copies(model.parameters())
    with pytest.raises(RuntimeError, match=r"not perturbed.*first_step"):
        call(sam)
    assert same_bits(list(model.parameters()), before)


def test_first_step_needs_a_gradient():
    model, sam = make()
    with pytest.raises(RuntimeError, match=r"no parameter has a gradient.*loss.backward\(\)"):
        sam.first_step()
    assert not sam.perturbed
    two_calls(model, sam)


def test_with_leaves_no_perturbation_behind():
    model, sam = make()
    before = copies(model.parameters())
    with contextlib.suppress(KeyboardInterrupt), sam as entered:
        assert entered is sam
        backward(model)
        sam.first_step(zero_grad=True)
        raise KeyboardInterrupt
    assert not sam.perturbed
    assert same_bits(list(model.parameters()), before)
    with sam:
        two_calls(model, sam)
    assert not sam.perturbed


def test_rho_can_be_scheduled():
    """rho is a group key as lr is; a plain loop over the groups is a schedule."""
    model, sam = make(rho=0.0)
    for rho in (0.0, 0.1, 0.3):
        for group in sam.param_groups:
            group["rho"] = rho
        before = copies(model.parameters())
        sam.zero_grad()
        backward(model)
        sam.first_step()
        e_w = torch.cat([(p.detach() - w).flatten() for p, w in zip(model.parameters(), before, strict=True)])
        assert float(e_w.norm()) == pytest.approx(rho, abs=1e-6)
        sam.restore()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_warn_once(dtype):
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    with pytest.warns(UserWarning, match=rf"{dtype}.*autocast") as caught:
        sam = FusedSAM([p], torch.optim.SGD, lr=0.1)
        for _ in range(3):
            p.grad = torch.ones_like(p)
            sam.first_step()
            sam.restore()
            p.data = p.data.clone()  # makes for a new layout
    assert len(caught) == 1


def test_32_bit_parameters_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, sam = make()
        two_calls(model, sam)


def test_a_graph_from_before_the_perturbation_raises_on_backward(backend):
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    sam = FusedSAM([p], torch.optim.SGD, backend=backend, lr=0.1)
    for call in ("perturb", "restore"):
        p.grad = torch.ones(2)
        if call == "restore":
            sam.first_step()
        loss = (p * p).sum()
        if call == "perturb":
            sam.first_step()
        else:
            sam.restore()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        sam.restore()
