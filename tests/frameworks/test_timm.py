"""timm's optimizers, loss scaler and schedule around FusedSAM. timm wants torchvision, which the pinned torch lacks."""

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastsam import FusedSAM
from tests.oracle import PlainSAM

timm_optim: Any = pytest.importorskip("timm.optim", reason="timm is not installed: make newest-check")
timm_utils: Any = importlib.import_module("timm.utils")

RHO = 0.1


def model_and_batch() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    return model, torch.randn(16, 6, dtype=torch.float64), torch.randint(3, (16,))


@pytest.mark.parametrize(
    "name", ["sgd", "adamw", "lamb", "lars", "muon", "nadamw", "adopt", "rmsproptf", "lookahead_adam"]
)
def test_equals_sam_in_plain_torch(name: str) -> None:
    model, x, y = model_and_batch()
    other = copy.deepcopy(model)
    plain = PlainSAM(other, timm_optim.create_optimizer_v2(other, opt=name, lr=0.01, weight_decay=0.01), RHO)
    sam = FusedSAM(timm_optim.create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.01), rho=RHO)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(8):
        plain.train(lambda: cross_entropy(other(x), y))
        cross_entropy(model(x), y).backward()
        sam.first_step(zero_grad=True)
        cross_entropy(model(x), y).backward()
        sam.second_step(zero_grad=True)
    for p, q, w in zip(model.parameters(), other.parameters(), start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
        assert not torch.equal(p, w)


def test_native_scaler_unscales_and_clips_the_second_gradient_alone() -> None:
    """The scale is a power of two: in fp64 it leaves the same numbers."""
    model, x, y = model_and_batch()
    other = copy.deepcopy(model)
    plain = PlainSAM(other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9), RHO)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(other.parameters(), 0.05)

    plain.base.register_step_pre_hook(clip)
    sam = FusedSAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=RHO)
    scaler = timm_utils.NativeScaler(device="cpu")
    for _ in range(8):
        plain.train(lambda: cross_entropy(other(x), y))
        scaler(cross_entropy(model(x), y), sam, need_update=False)
        sam.first_step(zero_grad=True)
        scaler(cross_entropy(model(x), y), sam, clip_grad=0.05, parameters=model.parameters())
        sam.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_the_loop_of_train_py() -> None:
    assert min(importlib.import_module("examples.train_timm").train()) > 0.9


def test_the_loop_of_train_py_in_fp16() -> None:
    last, _ = importlib.import_module("examples.train_timm").train("adamw", 2e-3, epochs=1, fp16=True)
    assert last > 0.2  # chance is 0.1
