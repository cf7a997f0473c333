"""The oracle of the other tests, against pytorch_optimizer's SAM and by hand."""

import pytest
import torch
from pytorch_optimizer import SAM
from torch import nn

from tests.oracle import PlainSAM, copies, same_bits

BASES = [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01})]


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def loss_of(model, k):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    return model(x).square().mean()


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize(("base", "options"), BASES)
def test_against_a_peer(base, options, adaptive):
    """Groups of different rho; only the rounding of the norm differs, which the peer takes in fp32."""
    ours, theirs = make(), make()

    def groups(model):
        return [{"params": model[0].parameters(), "rho": 0.05}, {"params": model[2].parameters(), "rho": 0.3}]

    plain = PlainSAM(ours, base(groups(ours), **options), rho=7.0, adaptive=adaptive)
    peer = SAM(groups(theirs), base, adaptive=adaptive, **options)
    for k in range(10):
        w = copies(plain.params)
        above = plain.gradients_above(lambda k=k: loss_of(ours, k))
        assert same_bits(copies(plain.params), w)
        plain.step(above)
        loss_of(theirs, k).backward()
        peer.first_step(zero_grad=True)
        loss_of(theirs, k).backward()
        peer.second_step(zero_grad=True)
        torch.testing.assert_close(copies(ours.parameters()), copies(theirs.parameters()), rtol=1e-6, atol=1e-6)


def bowl(**options):
    """|w|^2 / 2, whose gradient at w + e_w is w + e_w."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    base = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    return model.weight, PlainSAM(model, base, 0.1, **options), lambda: model.weight.square().sum() / 2


def test_which_steps_climb():
    _, plain, loss = bowl(interval=2, start=3)
    climbs = []
    for _ in range(8):
        climbs.append(plain.is_sam_step)
        plain.train(loss)
    assert climbs == [False, False, False, True, False, True, False, True]


def test_epsilon():
    w, plain, loss = bowl(epsilon=1.0)
    (above,) = plain.gradients_above(loss)
    torch.testing.assert_close(above, w + w * 0.1 / (2**0.5 + 1))


def test_against_the_momentum():
    w, plain, loss = bowl(direction="momentum")
    assert not plain.is_sam_step
    plain.train(loss)
    assert plain.is_sam_step
    (v,) = plain.momenta()
    torch.testing.assert_close(v, torch.ones_like(v))
    (above,) = plain.gradients_above(loss)
    torch.testing.assert_close(above, w - 0.1 * v / 2**0.5)
