"""torch.optim.Muon as the base: its step has a size of its own, the ascent keeps the radius rho."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastsam import FusedSAM
from tests.oracle import copies, same_bits

Muon: Any = getattr(torch.optim, "Muon", None)
pytestmark = pytest.mark.skipif(Muon is None, reason="torch < 2.9 has no Muon")


def test_the_ascent_is_as_long_as_rho_and_the_step_is_muons_at_w() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    sam = FusedSAM(model.parameters(), Muon, rho=0.1, lr=0.02, weight_decay=0.1)
    weights = list(model.parameters())
    by_hand = [nn.Parameter(w.detach().clone()) for w in weights]
    plain = Muon(by_hand, lr=0.02, weight_decay=0.1)
    for _ in range(3):
        before = copies(weights)
        cross_entropy(model(x), y).backward()
        sam.first_step(zero_grad=True)
        climbed = torch.cat([(w.detach() - b).flatten() for w, b in zip(weights, before, strict=True)])
        assert climbed.norm().item() == pytest.approx(0.1, rel=1e-5)
        cross_entropy(model(x), y).backward()
        for p, w in zip(by_hand, weights, strict=True):
            assert w.grad is not None
            p.grad = w.grad.clone()
        sam.second_step(zero_grad=True)
        plain.step()
        assert same_bits(copies(weights), copies(by_hand))


def test_it_has_a_momentum_to_climb_along() -> None:
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4, 3))
    sam = FusedSAM([w], Muon, rho=0.5, lr=0.02, direction="momentum")
    for step in range(3):
        assert sam.first_step() == (step > 0)
        w.grad = torch.randn_like(w)
        sam.second_step(zero_grad=True)
