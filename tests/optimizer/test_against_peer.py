"""Every backend against pytorch_optimizer's SAM, over 20 steps of training."""

import copy
import math

import pytest
import torch
from pytorch_optimizer import SAM
from torch import nn

from fastsam import FusedSAM
from tests.oracle import same_bits
from tests.training import FORMS, STEPS, Training, train_closure, train_two_calls

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
}

each_base = pytest.mark.parametrize("base", BASES)
each_rule = pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])


@each_rule
@pytest.mark.parametrize(
    ("backend", "base"),
    [("reference", "sgd"), ("foreach", "sgd"), *(("cpp", base) for base in BASES)],  # no base knows of the backend
    indirect=["backend"],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_trajectories_agree(backend, dtype, form, base, adaptive):
    """Perturbed and stepped weights of all steps.

    Only the rounding of the norm differs, and what grows from it: the peer rounds every tensor's norm to fp32.
    """
    tolerance = {torch.float64: 1e-6, torch.float32: 2e-4}[dtype]
    base_class, options = BASES[base]
    ours, theirs = Training(dtype), Training(dtype)
    sam = FusedSAM(ours.model.parameters(), base_class, rho=0.1, adaptive=adaptive, backend=backend, **options)
    peer = SAM(theirs.model.parameters(), base_class, rho=0.1, adaptive=adaptive, **options)
    start = ours.weights()
    for actual, expected in zip(FORMS[form](ours, sam), train_two_calls(theirs, peer), strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert not same_bits(ours.weights(), start)


@pytest.fixture
def rounded_sqrt(monkeypatch):
    """The peer's square root, correctly rounded: torch's own, in fp32 on CPU, is one ulp off on AMD's processors."""
    monkeypatch.setattr(torch.Tensor, "sqrt_", lambda t: t.fill_(math.sqrt(t.item())))


@pytest.mark.usefixtures("rounded_sqrt")
@each_base
def test_bits_agree_where_the_norm_is_exact(backend, base):
    """Where every tensor's norm is a whole number, the rounding of the peer's norm is ours."""
    base_class, options = BASES[base]
    shapes = [(7, 11), (), (40,), (2, 3, 4)]
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    sam = FusedSAM(ours, base_class, rho=0.1, backend=backend, **options)
    peer = SAM(theirs, base_class, rho=0.1, **options)

    def whole_norm(shape):
        """k * k elements of +v or -v among zeros: a norm of k * v."""
        g = torch.zeros(shape)
        k = torch.randint(1, int(g.numel() ** 0.5) + 1, (), generator=generator)
        v = torch.randint(1, 10, (), generator=generator)
        signs = torch.randint(0, 2, (k * k,), generator=generator) * 2 - 1
        g.view(-1)[torch.randperm(g.numel(), generator=generator)[: k * k]] = (v * signs).float()
        return g

    def set_grads(missing):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            g = whole_norm(p.shape)
            p.grad, q.grad = (None, None) if i == missing else (g, g.clone())

    for i in range(STEPS):
        set_grads(missing=i % 5)
        sam.first_step(zero_grad=True)
        peer.first_step(zero_grad=True)
        assert same_bits(ours, theirs)
        set_grads(missing=4)
        sam.second_step(zero_grad=True)
        peer.second_step(zero_grad=True)
        assert same_bits(ours, theirs)


@each_rule
def test_groups_of_different_rho(backend, adaptive):
    ours, theirs = Training(torch.float64), Training(torch.float64)

    def groups(model):
        return [{"params": model[0].parameters(), "rho": 0.02}, {"params": model[3].parameters(), "lr": 0.01}]

    options = {"rho": 0.2, "adaptive": adaptive, "lr": 0.1}
    sam = FusedSAM(groups(ours.model), torch.optim.SGD, backend=backend, **options)
    peer = SAM(groups(theirs.model), torch.optim.SGD, **options)
    for actual, expected in zip(train_two_calls(ours, sam), train_two_calls(theirs, peer), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_around_an_existing_optimizer(backend):
    """The second form of call is the first one, given the optimizer that the first one makes."""
    ours, theirs = Training(torch.float32), Training(torch.float32)
    base = torch.optim.SGD(ours.model.parameters(), lr=0.1, momentum=0.9)
    a = FusedSAM(base, 0.1, 1e-12, 1, adaptive=True, backend=backend)
    b = FusedSAM(theirs.model.parameters(), torch.optim.SGD, 0.1, True, backend=backend, lr=0.1, momentum=0.9)
    for x, y in zip(train_two_calls(ours, a), train_closure(theirs, b), strict=True):
        assert same_bits(x, y)
