"""Whatever the shapes, strides, dtypes, groups and missing gradients: SAM's formulas, and w back bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from fastsam import FusedSAM
from tests.oracle import DTYPES, NORM_TOLERANCE, assert_perturbed, copies, norm64, perturbed, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch")

SHAPES = st.one_of(
    st.lists(st.integers(0, 7), max_size=4).map(tuple),
    st.integers(1, 200).map(lambda n: (n,)),
    st.sampled_from([(16383,), (16384,), (16385,), (129, 128)]),
)


def spread(t, gap):
    """The same values in memory with gaps."""
    return torch.stack([t] * gap, dim=-1)[..., gap - 1]


def permuted(t, seed):
    order = torch.randperm(t.dim(), generator=torch.Generator().manual_seed(seed)).tolist()
    back = [order.index(i) for i in range(t.dim())]
    return t.permute(order).contiguous().permute(back)


def misaligned(t, by):
    memory = torch.empty(t.numel() + by, dtype=t.dtype)
    view = memory[by:].view(t.shape)
    return view.copy_(t)


LAYOUTS = st.one_of(
    st.just(lambda t: t.clone()),
    st.integers(2, 3).map(lambda gap: lambda t: spread(t, gap)),
    st.integers(0, 9).map(lambda seed: lambda t: permuted(t, seed)),
    st.integers(1, 9).map(lambda by: lambda t: misaligned(t, by)),
)

GROUP = st.fixed_dictionaries(
    {
        "rho": st.sampled_from([0.0, 0.05, 0.5, 3.0]),
        "epsilon": st.sampled_from([0.0, 1e-12, 0.1]),
        "adaptive": st.booleans(),
    }
)

PARAMETER = st.fixed_dictionaries(
    {
        "shape": SHAPES,
        "dtype": st.sampled_from(DTYPES),
        "layout": LAYOUTS,
        "grad_layout": LAYOUTS,
        "group": st.integers(0, 2),
        "missing": st.tuples(*[st.sampled_from([False, False, False, True])] * 4),  # first and second pass, two steps
    }
)


def randn(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def set_grads(params, specs, which, seed):
    for i, (p, spec) in enumerate(zip(params, specs, strict=True)):
        g = spec["grad_layout"](randn(p.shape, p.dtype, seed + i))
        p.grad = None if spec["missing"][which] else g


@given(
    specs=st.lists(PARAMETER, min_size=1, max_size=6),
    options=st.tuples(GROUP, GROUP, GROUP),
    seed=st.integers(0, 1000),
    flatten=st.booleans(),
)
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_two_steps(backend, specs, options, seed, flatten):
    params = [
        nn.Parameter(spec["layout"](randn(spec["shape"], spec["dtype"], seed + i))) for i, spec in enumerate(specs)
    ]
    # In the same strides: torch's own steps round bfloat16 otherwise where memory has gaps.
    twins = [nn.Parameter(spec["layout"](p.detach())) for p, spec in zip(params, specs, strict=True)]
    used = sorted({spec["group"] for spec in specs})
    groups = [
        {"params": [p for p, spec in zip(params, specs, strict=True) if spec["group"] == i], **options[i]} for i in used
    ]
    sam = FusedSAM(groups, torch.optim.SGD, backend=backend, flatten_parameters=flatten, lr=0.1, momentum=0.9)
    plain = torch.optim.SGD(twins, lr=0.1, momentum=0.9)
    strides = [p.stride() for p in params]

    for k in (0, 1):
        set_grads(params, specs, 2 * k, seed + 10 * k)
        before, grads = copies(params), [p.grad for p in params]
        if all(g is None for g in grads):
            with pytest.raises(RuntimeError, match="no parameter has a gradient"):
                sam.first_step()
            continue

        sam.first_step(zero_grad=True)
        rules = [options[spec["group"]] for spec in specs]
        expected = norm64(before, grads, [rule["adaptive"] for rule in rules])
        assert float(sam.grad_norm) == pytest.approx(expected, rel=NORM_TOLERANCE, abs=1e-30)
        for p, w, g, rule in zip(params, before, grads, rules, strict=True):
            if g is None or expected == 0:
                assert torch.equal(p.detach(), w)
            else:
                assert_perturbed(backend, p, perturbed(w, g, sam.grad_norm, **rule))

        set_grads(params, specs, 2 * k + 1, seed + 20 * k)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad
        sam.second_step(zero_grad=True)
        plain.step()
        assert same_bits(copies(params), copies(twins))
        assert [p.stride() for p in params] == strides
