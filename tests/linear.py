"""A linear layer, its FusedSAM around SGD, and a step in two calls: what the tests of the calls share."""

import torch
from torch import nn

from fastsam import FusedSAM


def make(**options):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    options = {"rho": 0.5, "lr": 0.1, **options}
    return model, FusedSAM(model.parameters(), torch.optim.SGD, **options)


def loss_of(model):
    return model(torch.arange(8.0).view(2, 4) / 8).pow(4).mean()


def backward(model):
    loss = loss_of(model)
    loss.backward()
    return loss


def two_calls(model, sam, zero_grad=True):
    sam.zero_grad()
    backward(model)
    if sam.first_step(zero_grad=True):
        backward(model)
    sam.second_step(zero_grad=zero_grad)
