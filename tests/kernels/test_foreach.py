"""What only the foreach backend has: blocks, and a path for devices whose values the host must not look at."""

import pytest
import torch
from torch import nn

from fastsam import FusedSAM
from fastsam.backends import foreach
from tests.oracle import DTYPES, NORM_TOLERANCE, copies, norm64, perturbed, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch")

SIZES = [(700, 30), (5,), (), (3, 4, 5), (20_000,), (1, 7), (0,), (600,)]


@pytest.fixture(params=["cpu", "as on a GPU"])
def _device(request, monkeypatch):
    """The path of other devices runs on CPU tensors too. Blocks are small, so that there are many."""
    monkeypatch.setattr(foreach, "CPU_BLOCK", 4096)
    monkeypatch.setattr(foreach, "BLOCK", 4096)
    monkeypatch.setattr(foreach, "CPU_SMALL", 64)
    if request.param != "cpu":
        monkeypatch.setattr(foreach, "_on_cpu", lambda bucket: False)


def make(dtype, adaptive, missing=()):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]
    params[3] = nn.Parameter(params[3].detach().permute(2, 0, 1))  # dense, in another order
    for i, p in enumerate(params):
        p.grad = None if i in missing else torch.randn(p.shape, generator=generator).to(dtype)
    groups = [{"params": params[:4]}, {"params": params[4:], "rho": 3.0}]
    return params, FusedSAM(groups, torch.optim.SGD, rho=0.7, adaptive=adaptive, backend="foreach", lr=0.1)


@pytest.mark.usefixtures("_device")
@pytest.mark.parametrize("missing", [(), (0, 4), (1, 5)], ids=str)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_block_has_the_bits_of_the_formula(dtype, adaptive, missing):
    params, sam = make(dtype, adaptive, missing)
    before = copies(params)
    for _ in range(2):
        sam.first_step()
        expected = norm64(before, [p.grad for p in params], [adaptive] * len(params))
        assert float(sam.grad_norm) == pytest.approx(expected, rel=1e-12 if dtype is torch.float64 else NORM_TOLERANCE)
        for i, (p, w) in enumerate(zip(params, before, strict=True)):
            rho = 0.7 if i < 4 else 3.0
            above = w if p.grad is None else perturbed(w, p.grad, sam.grad_norm, rho, 1e-12, adaptive)
            assert torch.equal(p.detach(), above)
        sam.restore()
        assert same_bits(copies(params), before)


@pytest.mark.usefixtures("_device")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_that_is_not_finite_moves_nothing(dtype, value):
    params, sam = make(dtype, adaptive=False)
    params[1].data[0] = -0.0
    params[0].grad[3, 3] = value
    before = copies(params)
    sam.first_step()
    assert not sam.grad_norm.isfinite()
    assert same_bits(copies(params), before)
    sam.restore()
    assert same_bits(copies(params), before)


@pytest.mark.usefixtures("_device")
def test_other_slots_than_in_the_last_step():
    params, sam = make(torch.float32, adaptive=False)
    before = copies(params)
    for missing in ((), (0,), (1, 2), ()):
        _, other = make(torch.float32, adaptive=False)
        grads = [p.grad for group in other.param_groups for p in group["params"]]
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            p.grad = None if i in missing else g
        sam.first_step()
        moved = [not torch.equal(p, w) for p, w in zip(params, before, strict=True)]
        assert moved == [i not in missing and p.numel() > 0 for i, p in enumerate(params)]
        sam.restore()
        assert same_bits(copies(params), before)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7e-3, 1e-30, 3e19])
def test_equal_gradients_all_round_the_same_way(value):
    """Where an fp32 sum is off the most; and squares that vanish or overflow in fp32."""
    p = nn.Parameter(torch.zeros(3_000_000))
    p.grad = torch.full_like(p, value)
    sam = FusedSAM([p], torch.optim.SGD, backend="foreach", lr=0.1)
    sam.first_step()
    expected = float(torch.tensor(value)) * 3_000_000**0.5
    assert float(sam.grad_norm) == pytest.approx(expected, rel=NORM_TOLERANCE, abs=0)
    sam.restore()
