"""The norm: its accuracy against fp64 where naive sums fail, and its bits, which no thread count may change."""

import pytest
import torch
from torch import nn

from fastsam import FusedSAM
from tests.oracle import NORM_TOLERANCE, copies, norm64, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch")


def million(backend, n):
    """n million elements; few in Triton's interpreter, which takes a second for each million."""
    return 50_000 if backend == "triton" else int(n * 1_000_000)


def randn(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


GRADIENTS = {
    # A single fp32 sum of these stops growing: each term is below half a unit in the last place of the sum.
    "constant": lambda n: torch.full((n,), 0.1),
    "one_large_then_small": lambda n: torch.cat([torch.tensor([1e4]), torch.full((n - 1,), 1.0)]),
    "small_then_one_large": lambda n: torch.cat([torch.full((n - 1,), 1.0), torch.tensor([1e4])]),
    "huge_range": lambda n: randn(n) * torch.logspace(-15, 15, n),
    "huge_range_falling": lambda n: randn(n) * torch.logspace(15, -15, n),
    "heavy_tail": lambda n: randn(n) / randn(n, seed=1),
    "near_overflow_of_squares": lambda n: randn(n) * 1e15,
    "tiny": lambda n: randn(n) * 1e-15,
    "uniform": lambda n: torch.rand(n, generator=torch.Generator().manual_seed(0)),
}


def ascend(backend, params, **options):
    sam = FusedSAM(params, torch.optim.SGD, backend=backend, lr=0.1, **options)
    sam.first_step()
    norm = sam.grad_norm
    sam.restore()
    return norm


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_fp32_norm_is_right_to_2e_6(backend, gradient):
    p = nn.Parameter(torch.zeros(million(backend, 1)))
    p.grad = GRADIENTS[gradient](p.numel())
    expected = norm64([p], [p.grad], [False])
    assert float(ascend(backend, [p])) == pytest.approx(expected, rel=NORM_TOLERANCE, abs=0)


def test_ten_million_constants(backend):
    n = million(backend, 10)
    p = nn.Parameter(torch.zeros(n))
    p.grad = torch.full((n,), 0.3)
    expected = float(torch.tensor(0.3)) * n**0.5
    assert float(ascend(backend, [p])) == pytest.approx(expected, rel=NORM_TOLERANCE)


@pytest.mark.parametrize("gradient", ["constant", "huge_range", "heavy_tail"])
def test_adaptive_norm_weighs_by_w(backend, gradient):
    n = million(backend, 0.3)
    p = nn.Parameter(randn(n, seed=2))
    p.grad = GRADIENTS[gradient](n)
    expected = norm64([p], [p.grad], [True])
    assert float(ascend(backend, [p], adaptive=True)) == pytest.approx(expected, rel=NORM_TOLERANCE)


def test_thousands_of_small_parameters(backend):
    params = [nn.Parameter(torch.zeros(i % 5 + 1)) for i in range(2000)]
    for i, p in enumerate(params):
        p.grad = randn(p.numel(), seed=i) * 10.0 ** (i % 7)
    expected = norm64(params, [p.grad for p in params], [False] * len(params))
    assert float(ascend(backend, params)) == pytest.approx(expected, rel=NORM_TOLERANCE)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float16, 6e4),  # whose square, and whose sum, overflow fp16
        (torch.float16, 6e-8),  # a subnormal whose square is 0 in fp16
        (torch.bfloat16, 1e15),
        (torch.bfloat16, 1e-15),
    ],
    ids=str,
)
def test_16_bit_gradients_neither_overflow_nor_vanish(backend, dtype, value):
    p = nn.Parameter(torch.ones(5000, dtype=dtype))
    p.grad = torch.full_like(p, value)
    norm = ascend(backend, [p])
    assert norm.dtype is torch.float32
    expected = norm64([p], [p.grad], [False])
    assert expected > 0
    assert float(norm) == pytest.approx(expected, rel=NORM_TOLERANCE, abs=0)


def test_fp64_norm_keeps_fp64_range(backend):
    p = nn.Parameter(torch.ones(3000, dtype=torch.float64))
    p.grad = torch.full_like(p, 1e100)
    assert float(ascend(backend, [p])) == pytest.approx(1e100 * 3000**0.5, rel=1e-14)


def test_same_inputs_same_bits(backend):
    p = nn.Parameter(randn(70_000))
    p.grad = randn(70_000, seed=1)
    norms = [ascend(backend, [p]) for _ in range(3)]
    assert same_bits(norms[0], norms[1])
    assert same_bits(norms[0], norms[2])


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_any_thread_count_gives_the_same_bits(backend, dtype, adaptive, set_threads):
    params = [nn.Parameter(randn(n, seed=n).to(dtype)) for n in (1, 16384, 16385, 3, 50_000, 9)]
    for p in params:
        p.grad = (randn(p.numel(), seed=p.numel() + 1) * 3).to(dtype)
    before = copies(params)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        sam = FusedSAM(params, torch.optim.SGD, rho=0.5, adaptive=adaptive, backend=backend, lr=0.1)
        sam.first_step()
        results.append((sam.grad_norm, copies(params)))
        sam.restore()
        assert same_bits(params, before)
    for norm, perturbed in results[1:]:
        assert same_bits(norm, results[0][0])
        assert same_bits(perturbed, results[0][1])
