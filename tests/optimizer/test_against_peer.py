"""Every backend against pytorch_optimizer's SAM, over 20 steps of training."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from pytorch_optimizer import GSAM, SAM, WSAM
from torch import nn

from fastsam import FusedSAM
from tests.oracle import same_bits

STEPS = 20

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
}

each_base = pytest.mark.parametrize("base", BASES)
each_rule = pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])


class Training:
    """A model with an optimizer, and the batches of every step; the same for the same seed."""

    def __init__(self, dtype):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)).to(dtype)
        self.batches = [
            (
                torch.randn(8, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype),
                torch.randint(0, 5, (8,), generator=generator),
            )
            for _ in range(STEPS)
        ]

    def backward(self, i):
        x, y = self.batches[i]
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        return loss

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]


def train_peer(training, sam):
    trajectory = []
    for i in range(STEPS):
        training.backward(i)
        sam.first_step(zero_grad=True)
        trajectory.append(training.weights())
        training.backward(i)
        sam.second_step(zero_grad=True)
        trajectory.append(training.weights())
    return trajectory


def train_two_calls(training, sam):
    return train_peer(training, sam)


def train_closure(training, sam):
    trajectory = []
    for i in range(STEPS):
        weights_seen = []

        def closure(i=i, seen=weights_seen):
            sam.zero_grad()
            seen.append(training.weights())
            return training.backward(i)

        sam.step(closure)
        assert len(weights_seen) == 2  # at w and at w + e_w
        trajectory += [weights_seen[1], training.weights()]
    return trajectory


def train_closure_after_backward(training, sam):
    trajectory = []
    for i in range(STEPS):
        sam.zero_grad()
        training.backward(i)

        def closure(i=i):
            trajectory.append(training.weights())
            return training.backward(i)

        sam.step(closure)
        trajectory.append(training.weights())
    return trajectory


FORMS = {"two_calls": train_two_calls, "closure": train_closure, "closure_after_backward": train_closure_after_backward}


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
    for actual, expected in zip(FORMS[form](ours, sam), train_peer(theirs, peer), strict=True):
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
    for actual, expected in zip(train_two_calls(ours, sam), train_peer(theirs, peer), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_around_an_existing_optimizer(backend):
    """The second form of call is the first one, given the optimizer that the first one makes."""
    ours, theirs = Training(torch.float32), Training(torch.float32)
    base = torch.optim.SGD(ours.model.parameters(), lr=0.1, momentum=0.9)
    a = FusedSAM(base, 0.1, 1e-12, 1, adaptive=True, backend=backend)
    b = FusedSAM(theirs.model.parameters(), torch.optim.SGD, 0.1, True, backend=backend, lr=0.1, momentum=0.9)
    for x, y in zip(train_two_calls(ours, a), train_closure(theirs, b), strict=True):
        assert same_bits(x, y)


def recipe(start):
    """The block of docs/method.md that begins with `start`."""
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    return re.search(rf"```python\n({start}.*?)```", text, re.DOTALL)[1]


class ConstantRho:
    def step(self):
        return 0.3


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("method", ["GSAM", "WSAM"])
def test_the_recipes_for_both_gradients(backend, method, frozen):
    ours, theirs, plain = Training(torch.float64), Training(torch.float64), Training(torch.float64)
    for training in (ours, theirs, plain):
        training.model[0].requires_grad_(not frozen)
    options = {"lr": 0.05, "momentum": 0.5}
    sam = FusedSAM(ours.model.parameters(), torch.optim.SGD, rho=0.3, backend=backend, **options)
    names = {"sam": sam, "model": ours.model, "data": ours.batches, "torch": torch}
    exec(recipe("gamma" if method == "WSAM" else "alpha"), names | {"loss_fn": nn.functional.cross_entropy})
    params = theirs.model.parameters()
    if method == "WSAM":
        peer = WSAM(theirs.model, params, torch.optim.SGD, rho=0.3, gamma=0.9, decouple=False, **options)
        train_peer(theirs, peer)
    else:
        base = torch.optim.SGD(params, **options)
        peer = GSAM(list(theirs.model.parameters()), base, theirs.model, ConstantRho(), alpha=0.4)
        for x, y in theirs.batches:
            peer.set_closure(nn.functional.cross_entropy, x, y)
            peer.step()
    torch.testing.assert_close(ours.weights(), theirs.weights(), rtol=1e-6, atol=1e-8)
    train_two_calls(plain, FusedSAM(plain.model.parameters(), torch.optim.SGD, rho=0.3, **options))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours.weights(), plain.weights(), rtol=1e-3, atol=1e-4)
