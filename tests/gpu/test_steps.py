"""FusedSAM on a GPU against the formulas: dtypes, layouts, groups, and tensor counts around every internal limit."""

import math

import pytest
import torch
from torch import nn

from fastsam import FusedSAM, backends
from fastsam.bucket import ParameterBucket
from fastsam.scalars import Scalars
from tests.oracle import DTYPES, NORM_TOLERANCE, assert_perturbed, bits, copies, norm64, perturbed, same_bits
from tests.scaled import (
    NAMES,
    OPTIMIZERS,
    RHO,
    SCALE,
    STEPS,
    PlainTorch,
    batches,
    by_closure,
    leftovers,
    make_model,
    make_scaler,
    nothing,
    plant,
    states,
    two_calls,
)

DEVICE = "cuda"
SHAPES = [(1,), (), (0,), (3, 5), (64, 3, 7, 7), (1000, 129), (65_537,), (4096,), (8191,)]
INFINITE_FIRST = {1: plant(0), 4: plant(-1), 5: plant(2, math.nan)}
INFINITE_SECOND = {2: plant(0), 3: plant(2, math.nan), 5: plant(1), 7: plant(-1)}


def randn(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def parameters(dtype):
    params = [nn.Parameter(randn(shape, dtype, i)) for i, shape in enumerate(SHAPES)]
    params.append(nn.Parameter(randn((8, 4, 6, 6), dtype, 20).to(memory_format=torch.channels_last)))
    params.append(nn.Parameter(randn((30, 40), dtype, 21).t()))
    params.append(nn.Parameter(randn((50, 40), dtype, 22)[:, ::2]))  # with gaps
    flat = randn((1000,), dtype, 23)
    params += [nn.Parameter(flat[1:334]), nn.Parameter(flat[334:1000])]  # misaligned
    return params


def set_grads(params, seed=100, missing=()):
    for i, p in enumerate(params):
        p.grad = None if i in missing else randn(p.shape, p.dtype, seed + i)


def check_ascent(sam, backend):
    groups = [(p, group) for group in sam.param_groups for p in group["params"]]
    params = [p for p, _ in groups]
    before, grads = copies(params), [p.grad for p in params]
    assert sam.first_step() is True
    expected = norm64(before, grads, [group["adaptive"] for _, group in groups])
    assert float(sam.grad_norm) == pytest.approx(expected, rel=NORM_TOLERANCE)
    for (p, group), w, g in zip(groups, before, grads, strict=True):
        options = group["rho"], group["epsilon"], group["adaptive"]
        assert_perturbed(backend, p, w if g is None else perturbed(w, g, sam.grad_norm, *options))
    sam.restore()
    assert same_bits(params, before)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch")
def test_dtypes_and_layouts(gpu_backend, dtype, adaptive):
    params = parameters(dtype)
    sam = FusedSAM(params, torch.optim.SGD, rho=0.3, adaptive=adaptive, backend=gpu_backend, lr=0.1)
    for seed, missing in [(100, ()), (200, (0, 5)), (300, ())]:
        set_grads(params, seed, missing)
        check_ascent(sam, gpu_backend)


@pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch")
def test_groups_and_dtypes_at_once(gpu_backend):
    members = [parameters(dtype)[:7] for dtype in DTYPES]
    rho = torch.tensor(0.2, device=DEVICE)
    groups = [
        {"params": [*members[0], *members[1][:3]], "rho": rho},
        {"params": [*members[1][3:], *members[2]], "adaptive": True, "epsilon": 0.1},
        {"params": members[3], "rho": 0.0},
    ]
    sam = FusedSAM(groups, torch.optim.SGD, rho=0.7, backend=gpu_backend, lr=0.1)
    for value in (0.2, 5.0):
        rho.fill_(value)
        set_grads([p for some in members for p in some])
        check_ascent(sam, gpu_backend)


@pytest.mark.parametrize("count", [1, 447, 448, 449, 511, 512, 513, 2047, 2048, 2049, 4000, 10_000])
def test_any_number_of_tensors(fused_backend, count):
    params = [nn.Parameter(torch.full((i % 7 + 1,), 0.1 * (i % 3), device=DEVICE)) for i in range(count)]
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, 1.0 + i % 5)
    before = torch.cat(copies(params))
    grads = torch.cat([p.grad for p in params])
    sam = FusedSAM(params, torch.optim.SGD, rho=0.3, backend=fused_backend, lr=0.1)
    sam.first_step()
    assert float(sam.grad_norm) == pytest.approx(float(grads.double().norm()), rel=NORM_TOLERANCE)
    assert same_bits(torch.cat(copies(params)), perturbed(before, grads, sam.grad_norm, 0.3, 1e-12, False))
    sam.restore()
    assert same_bits(torch.cat(copies(params)), before)


def scalars_of(bucket, adaptive):
    scalars = Scalars(bucket.device, torch.float64 if bucket.dtype is torch.float64 else torch.float32, 1, 1)
    scalars.set_groups([0.3], [1e-12], [adaptive])
    return scalars


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_backends_perturb_to_the_same_bits(dtype, adaptive):
    """Given one scale; and their norms agree. Restored, the weights are the same bits again."""
    before = copies(parameters(dtype)[:10])
    found, norms = {}, {}
    scale = None
    for name in ("reference", "triton", "cuda", "foreach"):
        backend = backends.load(name, torch.device(DEVICE))
        params = [nn.Parameter(w.clone()) for w in before]
        set_grads(params)
        bucket = ParameterBucket(params, [0] * len(params), ["w"] * len(params), 0, backend.chunk_size)
        bucket.gather()
        scalars = scalars_of(bucket, adaptive)
        with torch.no_grad():
            backend.norm(bucket, scalars, True)
            norms[name] = float(scalars.norm)
            scale = scalars.scale.clone() if scale is None else scale
            scalars.scale.copy_(scale)
            backend.perturb(bucket, scalars)
            found[name] = copies(params)
            backend.restore(bucket)
        assert same_bits(copies(params), before), name
    assert not same_bits(found["reference"], before)
    for name in found:
        assert same_bits(found[name], found["reference"]), name
        assert norms[name] == pytest.approx(norms["reference"], rel=NORM_TOLERANCE), name


def test_thousands_of_norms_have_one_bit_pattern(fused_backend):
    """Blocks end in another order each time, and the last of them may not see a partial sum of the norm before."""
    params = [nn.Parameter(torch.zeros(n, device=DEVICE)) for n in (9_000_001, 3, 700_000)]
    sets = [[randn(p.shape, torch.float32, seed + i) * seed for i, p in enumerate(params)] for seed in (1, 50)]
    sam = FusedSAM(params, torch.optim.SGD, backend=fused_backend, lr=0.1)
    layout, norms = sam._state.perturbation, []
    for k in range(4000):
        for p, g in zip(params, sets[k % 2], strict=True):
            p.grad = g
        for _, bucket in layout.buckets:
            bucket.partials.fill_(float("nan"))
        with torch.no_grad():
            layout.measure(sam.param_groups)
        norms.append(sam.grad_norm)
    patterns = bits(torch.stack(norms)).reshape(-1, 2)
    assert patterns.unique(dim=0).shape == (1, 2)
    for norm, grads in zip(norms, sets, strict=False):
        assert float(norm) == pytest.approx(norm64(params, grads, [False] * 3), rel=NORM_TOLERANCE)


@pytest.mark.parametrize("where", [0, 5_000_000, -1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_one_element_that_is_not_finite(gpu_backend, value, where):
    p = nn.Parameter(torch.randn(10_000_000, device=DEVICE))
    p.grad = torch.randn_like(p)
    p.grad[where] = value
    before = p.detach().clone()
    sam = FusedSAM([p], torch.optim.SGD, backend=gpu_backend, lr=0.1)
    sam.first_step()
    assert not bool(sam.grad_norm.isfinite())
    assert same_bits(p.detach(), before)
    sam.restore()
    assert same_bits(p.detach(), before)


@pytest.mark.parametrize("numel", [10**6, 10**8, 10**9])
def test_norm_of_many_elements(fused_backend, free_memory, numel):
    if free_memory < numel * 4 * 4:
        pytest.skip(f"no GPU with {numel * 16 >> 30} GB free")
    p = nn.Parameter(torch.zeros(numel, device=DEVICE))
    p.grad = torch.full_like(p, 0.1)
    sam = FusedSAM([p], torch.optim.SGD, backend=fused_backend, lr=0.1)
    norms = []
    for _ in range(3):
        sam.first_step()
        norms.append(sam.grad_norm)
        sam.restore()
    assert float(norms[0]) == pytest.approx(float(torch.tensor(0.1)) * numel**0.5, rel=NORM_TOLERANCE)
    assert same_bits(norms[0], norms[1])
    assert same_bits(norms[0], norms[2])


@pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch")
def test_a_parameter_of_more_than_2_to_31_elements(fused_backend, free_memory):
    numel = 2**31 + 5
    if free_memory < numel * 2 * 4:
        pytest.skip("no GPU with 16 GB free")
    p = nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16, device=DEVICE))
    p.grad = torch.zeros_like(p)
    places = [0, 2**30, 2**31 - 1, 2**31, numel - 1]
    p.grad[places] = 2.0
    sam = FusedSAM([p], torch.optim.SGD, rho=1.0, backend=fused_backend, lr=0.1)
    sam.first_step()
    assert float(sam.grad_norm) == pytest.approx(20**0.5, rel=NORM_TOLERANCE)
    assert int(p.detach().count_nonzero()) == len(places)
    assert torch.equal(p.detach()[places].float(), torch.full((5,), 2 / 20**0.5, device=DEVICE).bfloat16().float())
    sam.restore()
    assert int(p.detach().count_nonzero()) == 0


@pytest.mark.parametrize(("base", "kwargs"), OPTIMIZERS, ids=NAMES)
@pytest.mark.parametrize("form", [two_calls, by_closure])
def test_training_with_a_scaler_equals_plain_torch(gpu_backend, form, base, kwargs):
    """Infinities in either pass: the scaler's kernels and flags are not the CPU's."""
    plain = PlainTorch(base, kwargs, device=DEVICE)
    model, scaler = make_model(device=DEVICE), make_scaler(DEVICE)
    known = scaler if form is by_closure else None
    sam = FusedSAM(model.parameters(), base, rho=RHO, grad_scaler=known, backend=gpu_backend, **kwargs)
    scales = []
    for i, batch in enumerate(batches(device=DEVICE)):
        first, second = INFINITE_FIRST.get(i, nothing), INFINITE_SECOND.get(i, nothing)
        plain.step(batch, first=first, second=second)
        form(sam, model, scaler, batch, second, first)
        scales.append(scaler.get_scale())
        assert scales[-1] == plain.scaler.get_scale()
        assert bool(sam.grad_norm.isfinite()) is (i not in INFINITE_FIRST)
        torch.testing.assert_close(list(model.parameters()), list(plain.model.parameters()), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(states(sam), states(plain.base), rtol=1e-8, atol=1e-12)
        assert not leftovers(sam)
        assert not leftovers(sam.base_optimizer)
    assert min(scales) < SCALE
    assert sam.param_groups[0]["sam_step"] == STEPS
