"""What only the foreach backend has: blocks, and a path for devices whose values the host must not look at."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsam import FusedSAM
from fastsam.backends import foreach, reference
from fastsam.scalars import Scalars
from tests.oracle import DTYPES, NORM_TOLERANCE, copies, norm64, perturbed, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch")

SIZES = [(700, 30), (5,), (), (3, 4, 5), (20_000,), (1, 7), (0,), (600,)]


@pytest.fixture(params=["cpu", "as on a GPU"])
def _device(request, monkeypatch):
    """The path of other devices runs on CPU tensors too. Blocks are small, so that there are many."""
    monkeypatch.setattr(foreach, "CPU_BLOCK", 4096 * 4)
    monkeypatch.setattr(foreach, "BLOCK", 4096 * 4)
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


@given(
    slots=st.lists(
        st.tuples(st.integers(0, 2500), st.sampled_from([1, 1, 1, 2]), st.booleans(), st.booleans()), max_size=40
    ),
    dtype=st.sampled_from(DTYPES),
    adaptive=st.booleans(),
)
def test_many_small_parameters_of_any_size(slots, dtype, adaptive):
    """Vectors are copied by one call where they are neighbours in the backup: gaps, other groups, missing gradients."""
    generator = torch.Generator().manual_seed(0)
    slots = [*slots, (3, 1, True, False)]
    params = [nn.Parameter(torch.randn([n, 1][:dims], generator=generator).to(dtype)) for n, dims, _, _ in slots]
    groups = [[p for p, slot in zip(params, slots, strict=True) if slot[3] is second] for second in (False, True)]
    rhos = [0.7, 3.0]
    sam = FusedSAM(
        [{"params": group, "rho": rho} for group, rho in zip(groups, rhos, strict=True)],
        torch.optim.SGD,
        adaptive=adaptive,
        backend="foreach",
        lr=0.1,
    )
    before = copies(params)
    for missing in (False, True):  # slots without a gradient stay in the bucket
        for p, (_, _, live, _) in zip(params, slots, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype) if live or not missing else None
        sam.first_step()
        expected = norm64(before, [p.grad for p in params], [adaptive] * len(params))
        assert float(sam.grad_norm) == pytest.approx(expected, rel=1e-12 if dtype is torch.float64 else NORM_TOLERANCE)
        for p, w, (_, _, _, second) in zip(params, before, slots, strict=True):
            above = w if p.grad is None else perturbed(w, p.grad, sam.grad_norm, rhos[second], 1e-12, adaptive)
            assert torch.equal(p.detach(), above)
        sam.restore()
        assert same_bits(copies(params), before)


class Calls(TorchDispatchMode):
    """Counts the calls of torch's operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_many_vectors_take_few_calls():
    """ResNet-50 has 107 of its 161 parameters in them: between others, and yet neighbours in the backup."""
    params = [nn.Parameter(torch.randn(shape)) for shape in ((64,), (100,), (7,), (64,), (3000,), (8, 20)) * 25]
    sam = FusedSAM(params, torch.optim.SGD, backend="foreach", lr=0.1)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        with Calls() as calls:
            sam.first_step()
            sam.restore()
    assert calls.counts["cat"] == 2  # vectors: gradients for the norm, and weights to the backup
    assert calls.counts["_foreach_copy_"] == 3  # the others, in the same way; and all of them back
    assert calls.counts["linalg_vector_norm"] == 4  # of vectors: equal rows and the rest; of the others; of these norms
    assert calls.counts["_foreach_addcmul_"] == 2
    assert calls.counts.total() < 40


@given(numel=st.one_of(st.integers(0, 5000), st.integers(0, 10**9)))
def test_rows_hold_every_element_once(numel):
    cuts = foreach._cut(numel)
    assert len(cuts) <= 2
    end = 0
    for start, rows, length in cuts:
        assert start == end
        assert rows > 0 < length <= foreach.ROW
        end += rows * length
    assert end == numel


ODD = st.sampled_from([0.0, 5e-324, 1e-45, 1e-38, 0.1, 1 / 3, 1.0, 7e37, 1e38, 1e300, math.inf, math.nan])


@given(
    square_sums=st.lists(ODD | st.floats(0, 1e38), min_size=1, max_size=2),
    groups=st.lists(st.tuples(st.floats(-3, 3, width=32), ODD | st.floats(0, 2, width=32)), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_pythons_arithmetic_has_the_bits_of_torchs(square_sums, groups, dtype):
    """But for sqrt: Python's is rounded correctly, torch's not by every library that it was built with."""
    all_scalars = [Scalars(torch.device("cpu"), dtype, len(groups), len(square_sums)) for _ in range(2)]
    for scalars, backend in zip(all_scalars, (foreach, reference), strict=True):
        scalars.rho.copy_(torch.tensor([rho for rho, _ in groups], dtype=torch.float64))
        scalars.epsilon.copy_(torch.tensor([epsilon for _, epsilon in groups], dtype=torch.float64))
        scalars.square_sums.copy_(torch.tensor(square_sums, dtype=torch.float64))
        backend.combine(scalars)
    ours, expected = all_scalars
    eps = torch.finfo(dtype).eps
    assert float(ours.norm) == pytest.approx(float(expected.norm), rel=eps, abs=5e-324, nan_ok=True)
    scale = (ours.norm + ours.epsilon).reciprocal() * ours.rho
    assert torch.equal(ours.scale, torch.where(scale.isfinite(), scale, 0))
    torch.testing.assert_close(ours.scale, expected.scale, rtol=4 * eps, atol=0)
