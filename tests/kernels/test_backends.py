"""Every backend on contiguous parameters, against the formulas in fp64 and, given the norm, bit for bit."""

import pytest
import torch
from torch import nn

from fastsam import FusedSAM
from tests.oracle import DTYPES, NORM_TOLERANCE, assert_perturbed, copies, norm64, perturbed, same_bits

CHUNK = 16384
SIZES = {
    "vectors": [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1000],
    "chunks": [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1],
    "scalars_and_empties": [(), (0,), (3, 0), (1,), (1, 1, 1), (2, 3, 4)],
    "one": [(5, 7)],
}


def parameters(shapes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def set_grads(params, seed=1, missing=()):
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = None if i in missing else g


def check_ascent(sam, backend):
    """first_step and restore, against the oracle; every parameter's options come from its group."""
    groups = [(p, group) for group in sam.param_groups for p in group["params"]]
    params = [p for p, _ in groups]
    before = copies(params)
    grads = [p.grad for p in params]
    grads_before = [None if g is None else g.clone() for g in grads]

    assert sam.first_step() is True

    expected_norm = norm64(before, grads, [group["adaptive"] for _, group in groups])
    fp64 = any(p.dtype is torch.float64 for p in params)
    tolerance = 1e-14 if all(p.dtype is torch.float64 for p in params) else NORM_TOLERANCE
    assert sam.grad_norm.dtype is (torch.float64 if fp64 else torch.float32)
    assert float(sam.grad_norm) == pytest.approx(expected_norm, rel=tolerance, abs=0)
    for (p, group), w, g in zip(groups, before, grads, strict=True):
        if g is None:
            assert same_bits(p, w)
        else:
            options = group["rho"], group["epsilon"], group["adaptive"]
            assert_perturbed(backend, p, perturbed(w, g, sam.grad_norm, *options))
    for g, g_before in zip(grads, grads_before, strict=True):
        assert g is None or same_bits(g, g_before)

    sam.restore()
    assert same_bits(params, before)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch")
def test_every_size_and_dtype(backend, sizes, dtype, adaptive):
    params = parameters(SIZES[sizes], dtype)
    sam = FusedSAM(params, torch.optim.SGD, rho=0.3, adaptive=adaptive, backend=backend, lr=0.1)
    for seed in (1, 2):
        set_grads(params, seed)
        check_ascent(sam, backend)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_e_w_has_length_rho(backend, adaptive):
    params = parameters([(40, 5), 300, ()], torch.float64)
    set_grads(params)
    before = copies(params)
    sam = FusedSAM(params, torch.optim.SGD, rho=0.7, adaptive=adaptive, backend=backend, lr=0.1)
    sam.first_step()
    e_w = [p.detach() - w for p, w in zip(params, before, strict=True)]
    if adaptive:  # ASAM's ball is measured by e_w / |w|
        e_w = [e / w.abs() for e, w in zip(e_w, before, strict=True)]
    assert float(torch.cat([e.flatten() for e in e_w]).norm()) == pytest.approx(0.7, rel=1e-9)


def test_groups_differ_in_every_option(backend):
    params = parameters([40, (6, 7), CHUNK + 3, (), 9, 33, 12], torch.float32)
    set_grads(params)
    groups = [
        {"params": params[:2], "rho": 0.05},
        {"params": params[2:3], "rho": 2.0, "adaptive": True},
        {"params": params[3:5], "rho": 0.0},
        {"params": params[5:6], "epsilon": 3.0},
        {"params": params[6:], "rho": torch.tensor(0.5), "adaptive": True, "epsilon": 0.0},
    ]
    sam = FusedSAM(groups, torch.optim.SGD, rho=0.1, backend=backend, lr=0.1)
    check_ascent(sam, backend)


def test_options_may_change_between_steps(backend):
    params = parameters([40, (6, 7)], torch.float32)
    rho = torch.tensor(0.1)
    groups = [{"params": params[:1]}, {"params": params[1:], "rho": rho}]
    sam = FusedSAM(groups, torch.optim.SGD, rho=0.1, backend=backend, lr=0.1)
    set_grads(params)
    check_ascent(sam, backend)
    sam.param_groups[0]["rho"] = 0.9
    check_ascent(sam, backend)
    rho.fill_(3.0)
    check_ascent(sam, backend)
    sam.param_groups[0]["adaptive"] = True
    sam.param_groups[1]["epsilon"] = 0.5
    check_ascent(sam, backend)


@pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch")
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_mixed_dtypes_share_one_norm(backend, adaptive):
    params = [parameters([17, (3, 5)], dtype, seed)[i] for seed, dtype in enumerate(DTYPES) for i in (0, 1)]
    set_grads(params)
    sam = FusedSAM(params, torch.optim.SGD, rho=0.3, adaptive=adaptive, backend=backend, lr=0.1)
    check_ascent(sam, backend)
    set_grads(params, seed=5, missing=(0, 1, 3, 4))  # one dtype has no gradient at all
    check_ascent(sam, backend)


def test_fp32_and_16_bit_share_an_fp32_norm(backend):
    params = [*parameters([17], torch.float32), *parameters([40], torch.float16)]
    set_grads(params)
    with pytest.warns(UserWarning, match="float16"):
        sam = FusedSAM(params, torch.optim.SGD, rho=0.3, backend=backend, lr=0.1)
        check_ascent(sam, backend)


@pytest.mark.parametrize("first", [(), (0,), (1, 2), (4,)])
@pytest.mark.parametrize("second", [(), (0,), (2, 3)])
def test_gradients_missing_in_either_pass(backend, first, second):
    params = parameters([5, (4, 4), 70, (), 3], torch.float32)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    sam = FusedSAM(params, torch.optim.SGD, rho=0.3, backend=backend, lr=0.1, momentum=0.9)
    plain = torch.optim.SGD(twins, lr=0.1, momentum=0.9)
    for seed in range(3):
        set_grads(params, seed, missing=first if seed else ())
        sam.first_step(zero_grad=True)
        for some in (params, twins):
            set_grads(some, seed + 10, missing=second)
        sam.second_step(zero_grad=True)
        plain.step()
        assert same_bits(params, twins)


def test_a_later_gradient_joins_in(backend):
    params = parameters([5, 6, 7], torch.float32)
    params[1].requires_grad_(False)
    sam = FusedSAM(params, torch.optim.SGD, rho=0.3, backend=backend, lr=0.1)
    set_grads(params, missing=(1,))
    check_ascent(sam, backend)
    params[1].requires_grad_(True)
    set_grads(params)
    check_ascent(sam, backend)
    params[0].requires_grad_(False)
    set_grads(params, missing=(0,))
    check_ascent(sam, backend)


def test_a_tied_parameter_is_one(backend):
    layer, tied = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    tied.weight = layer.weight
    model = nn.Sequential(layer, tied)
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.3, backend=backend, lr=0.1)
    model(torch.ones(2, 4)).square().sum().backward()
    check_ascent(sam, backend)
