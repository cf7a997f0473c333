"""Gradients that are not finite, or zero: the weights stay as they are, bit for bit, and training goes on."""

import math

import pytest
import torch
from torch import nn

from fastsam import FusedSAM
from tests.oracle import DTYPES, assert_perturbed, copies, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch")

N = 20_000  # more than a chunk


def make(dtype, backend, adaptive=False, **options):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (N, 5, 33)]
    with torch.no_grad():
        params[1][0] = -0.0  # which -0.0 + 0.0 would change
        params[1][1] = math.inf
        params[2][0] = torch.finfo(dtype).tiny / 2  # a subnormal
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return params, FusedSAM(params, torch.optim.SGD, adaptive=adaptive, backend=backend, lr=0.1, **options)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_such_element_means_no_perturbation(backend, dtype, value, adaptive):
    params, sam = make(dtype, backend, adaptive)
    before = copies(params)
    for slot, element in [(0, 0), (0, N // 2), (0, N - 1), (1, 4), (2, 17)]:
        kept = params[slot].grad[element].clone()
        params[slot].grad[element] = value
        assert sam.first_step() is True
        assert sam.perturbed
        assert not math.isfinite(float(sam.grad_norm))
        assert same_bits(params, before)
        sam.restore()
        assert same_bits(params, before)
        params[slot].grad[element] = kept


def test_it_holds_across_dtypes(backend):
    params = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in DTYPES]
    sam = FusedSAM(params, torch.optim.SGD, rho=1.0, backend=backend, lr=0.1)
    for bad in range(len(params)):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, math.nan if i == bad else 1.0)
        sam.first_step()
        assert all(bool((p == 1).all()) for p in params)
        sam.restore()


def test_the_second_gradient_decides(backend):
    params, sam = make(torch.float32, backend)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    plain = torch.optim.SGD(twins, lr=0.1)
    params[0].grad[3] = math.nan
    sam.first_step(zero_grad=True)
    for p in [*params, *twins]:
        p.grad = torch.ones_like(p)
    sam.second_step(zero_grad=True)
    plain.step()
    assert same_bits(params, twins)

    # and the next ascent is not touched by the last one
    with torch.no_grad():
        params[1].copy_(torch.ones(5))
    for p in params:
        p.grad = torch.ones_like(p)
    sam.first_step()
    assert float(sam.grad_norm) == pytest.approx((N + 38) ** 0.5, rel=1e-6)
    assert bool((params[1] > 1).all())


@pytest.mark.parametrize("epsilon", [1e-12, 0.0])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gradients_mean_e_w_is_zero(backend, dtype, adaptive, epsilon):
    params, sam = make(dtype, backend, adaptive, epsilon=epsilon)
    with torch.no_grad():
        params[1][1] = 1.0
    for p in params:
        p.grad = torch.zeros_like(p)
    before = copies(params)
    sam.first_step()
    assert float(sam.grad_norm) == 0
    for p, w in zip(params, before, strict=True):
        assert_perturbed(backend, p, w)
    sam.restore()
    assert same_bits(params, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_restore_brings_back_every_bit_of_odd_weights(backend, dtype):
    params, sam = make(dtype, backend, rho=100.0)
    with torch.no_grad():
        params[2][1] = math.nan
        params[2][2] = torch.finfo(dtype).max  # which w + e_w overflows
    params[2].grad.fill_(1.0)
    before = copies(params)
    sam.first_step()
    assert not same_bits(params, before)
    sam.restore()
    assert same_bits(params, before)


def test_fp16_epsilon_is_not_lost(backend):
    """1e-12 is 0 in fp16: davda54/sam makes NaN of zero gradients there."""
    p = nn.Parameter(torch.ones(4, dtype=torch.float16))
    p.grad = torch.zeros_like(p)
    sam = FusedSAM([p], torch.optim.SGD, backend=backend, lr=0.1)
    sam.first_step()
    assert bool((p == 1).all())


def test_fp16_gradients_at_the_end_of_the_range(backend):
    p = nn.Parameter(torch.ones(100, dtype=torch.float16))
    p.grad = torch.full_like(p, 65504.0)
    sam = FusedSAM([p], torch.optim.SGD, rho=10.0, backend=backend, lr=0.1)
    sam.first_step()
    assert bool((p == 2).all())  # e_w = 10 / sqrt(100) each


def test_a_scale_that_overflows_means_no_perturbation(backend):
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.full((4,), 1e-18)
    sam = FusedSAM([p], torch.optim.SGD, rho=1e30, epsilon=0.0, backend=backend, lr=0.1)
    sam.first_step()
    assert bool((p == 1).all())
