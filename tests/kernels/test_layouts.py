"""Parameters and gradients that are not plain contiguous tensors: strides, gaps, misalignment, shared memory."""

import pytest
import torch
from torch import nn

from fastsam import FusedSAM
from tests.oracle import DTYPES, NORM_TOLERANCE, assert_perturbed, copies, norm64, perturbed, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch")

# (memory that holds the parameter, the parameter as a view of it)
LAYOUTS = {
    "channels_last": lambda r: (t := r(4, 3, 5, 7).to(memory_format=torch.channels_last), t),
    "channels_last_3d": lambda r: (t := r(2, 3, 4, 5, 2).to(memory_format=torch.channels_last_3d), t),
    "transposed": lambda r: (t := r(7, 11), t.t()),
    "permuted": lambda r: (t := r(3, 4, 5), t.permute(2, 0, 1)),
    "flipped_sizes_of_one": lambda r: (t := r(40), t.as_strided((1, 40, 1), (7, 1, 99))),
    "columns": lambda r: (t := r(6, 10), t[:, 2:9]),
    "every_other": lambda r: (t := r(41), t[::2]),
    "a_column": lambda r: (t := r(9, 4), t[:, 1]),
    "diagonal": lambda r: (t := r(8, 8), t.diagonal()),
    "empty_with_gaps": lambda r: (t := r(5, 4), t[:, :0]),
    "misaligned_by_1": lambda r: (t := r(20001), t[1:]),
    "misaligned_by_3": lambda r: (t := r(130), t[3:101]),
    "misaligned_0d": lambda r: (t := r(3), t[1]),
}

GRADIENTS = {
    "same_strides": lambda g, p: torch.empty_like(p).copy_(g),
    "contiguous": lambda g, p: g.contiguous(),
    "reversed_dims": lambda g, p: g.permute(backwards(g)).contiguous().permute(backwards(g)),
    "with_gaps": lambda g, p: torch.stack([g, g], dim=-1)[..., 0],
    "expanded": lambda g, p: g.new_tensor(0.5).expand(g.shape),
    "misaligned": lambda g, p: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape),
}


def backwards(t):
    return tuple(reversed(range(t.dim())))


def randn(dtype):
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_any_strides(backend, layout, dtype, adaptive):
    r = randn(dtype)
    memory, view = LAYOUTS[layout](r)
    other = nn.Parameter(r(5))
    p = nn.Parameter(view)
    assert p.data_ptr() == view.data_ptr()
    sam = FusedSAM([p, other], torch.optim.SGD, rho=0.3, adaptive=adaptive, backend=backend, lr=0.1)
    for make in GRADIENTS.values():
        p.grad = make(r(*p.shape), p.detach())
        other.grad = r(5)
        before, memory_before, g = p.detach().clone(), memory.clone(), p.grad.clone()
        norm = norm64([p, other], [p.grad, other.grad], [adaptive] * 2)

        sam.first_step()
        assert float(sam.grad_norm) == pytest.approx(norm, rel=NORM_TOLERANCE)
        assert_perturbed(backend, p, perturbed(before, g, sam.grad_norm, 0.3, 1e-12, adaptive))
        # Nothing outside of the parameter was written to.
        with torch.no_grad():
            kept = p.detach().clone()
            p.copy_(before)
            assert same_bits(memory, memory_before)
            p.copy_(kept)
        assert same_bits(p.grad, g)

        sam.restore()
        assert same_bits(memory, memory_before)
        assert p.data_ptr() == view.data_ptr()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_norm_reads_every_gradient_element_once(backend, gradient):
    r = randn(torch.float32)
    params = [nn.Parameter(LAYOUTS[layout](r)[1]) for layout in LAYOUTS]
    for p in params:
        p.grad = GRADIENTS[gradient](r(*p.shape), p.detach())
    before = copies(params)
    sam = FusedSAM(params, torch.optim.SGD, rho=0.3, adaptive=True, backend=backend, lr=0.1)
    sam.first_step()
    expected = norm64(before, [p.grad for p in params], [True] * len(params))
    assert float(sam.grad_norm) == pytest.approx(expected, rel=NORM_TOLERANCE)


def test_gradient_strides_may_change_between_steps(backend):
    r = randn(torch.float32)
    p = nn.Parameter(r(6, 5))
    sam = FusedSAM([p], torch.optim.SGD, rho=0.3, backend=backend, lr=0.1)
    before = p.detach().clone()
    for make in [*GRADIENTS.values(), *GRADIENTS.values()]:
        p.grad = make(r(6, 5), p.detach())
        sam.first_step()
        assert_perturbed(backend, p, perturbed(before, p.grad, sam.grad_norm, 0.3, 1e-12, False))
        sam.restore()


def test_gradients_that_overlap_are_only_read(backend):
    """AccumulateGrad may give two parameters one gradient's memory."""
    a, b = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(5))
    shared = torch.arange(8.0)
    sam = FusedSAM([a, b], torch.optim.SGD, rho=0.3, adaptive=True, backend=backend, lr=0.1)
    a.grad, b.grad = shared[:6], shared[3:]
    sam.first_step()
    assert torch.equal(shared, torch.arange(8.0))
    expected = norm64([torch.ones(6), torch.ones(5)], [shared[:6], shared[3:]], [True, True])
    assert float(sam.grad_norm) == pytest.approx(expected, rel=NORM_TOLERANCE)
    sam.restore()
    assert torch.equal(a.detach(), torch.ones(6))


def test_gradients_with_a_graph(backend):
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    sam = FusedSAM([p], torch.optim.SGD, rho=0.3, backend=backend, lr=0.1)
    (p.grad,) = torch.autograd.grad(p.pow(3).sum(), p, create_graph=True)
    g = p.grad.detach().clone()
    sam.first_step()
    assert not sam.grad_norm.requires_grad
    assert_perturbed(backend, p, perturbed(torch.tensor([1.0, 2.0]), g, sam.grad_norm, 0.3, 1e-12, False))
    sam.restore()
    p.grad = None


@pytest.mark.parametrize(
    "views",
    [
        lambda m: (m[:6], m[4:]),
        lambda m: (m, m[2:3]),
        lambda m: (m.view(2, 5), m),
        lambda m: (m, m.view(2, 5)[:, :2]),
        lambda m: (m.view(2, 5)[:, :3], m.view(2, 5)[:, 2:4]),
        lambda m: (m[::2], m[8:]),
    ],
    ids=["overlap", "inside", "reshaped", "columns of the whole", "columns", "every other"],
)
@pytest.mark.parametrize("flatten", [False, True])
def test_parameters_that_share_memory_are_refused(backend, views, flatten):
    memory = torch.arange(10.0)
    a, b = map(nn.Parameter, views(memory))
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)

    def step():
        FusedSAM([a, b], torch.optim.SGD, backend=backend, flatten_parameters=flatten, lr=0.1).first_step()

    with pytest.raises(ValueError, match=r"parameter 0 .* and parameter 1 .* share memory"):
        step()
    assert torch.equal(memory, torch.arange(10.0))


@pytest.mark.parametrize(
    "views",
    [
        lambda m: (m.view(3, 6)[:, :2], m.view(3, 6)[:, 2:5], m.view(3, 6)[:, 5:]),
        lambda m: (m[::2], m[1::2]),
        lambda m: (m.view(3, 6)[::2], m.view(3, 6)[1]),
        lambda m: (m.view(3, 6)[:, 1], m[:0]),
    ],
    ids=["columns", "every other", "rows", "nothing"],
)
def test_parameters_that_lie_in_the_gaps_of_another(backend, views):
    memory = torch.arange(18.0)
    params = list(map(nn.Parameter, views(memory)))
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, i + 1.0)
    before, grads = copies(params), [p.grad.clone() for p in params]
    sam = FusedSAM(params, torch.optim.SGD, rho=0.3, backend=backend, lr=0.1)
    sam.first_step()
    for p, w, g in zip(params, before, grads, strict=True):
        assert_perturbed(backend, p, perturbed(w, g, sam.grad_norm, 0.3, 1e-12, False))
    sam.restore()
    assert torch.equal(memory, torch.arange(18.0))


@pytest.mark.parametrize(
    "parameter", [lambda: torch.ones(1).expand(4), lambda: torch.ones(3).as_strided((2, 2), (1, 1))]
)
def test_parameter_whose_elements_share_memory_is_refused(backend, parameter):
    p = nn.Parameter(parameter())
    sam = FusedSAM([p], torch.optim.SGD, backend=backend, lr=0.1)
    p.grad = torch.ones(p.shape)
    with pytest.raises(ValueError, match="elements of parameter 0 of param group 0 share memory"):
        sam.first_step()
    assert not sam.perturbed


def test_sharing_found_late_does_not_leave_half_a_layout(backend):
    """A step that was refused is refused again, not made with the buckets that were laid out before the error."""
    memory = torch.arange(10.0)
    good = nn.Parameter(torch.ones(3, dtype=torch.float64))
    a, b = nn.Parameter(memory[:5]), nn.Parameter(memory[5:])
    sam = FusedSAM([good, a, b], torch.optim.SGD, backend=backend, lr=0.1)
    for p in (good, a, b):
        p.grad = torch.ones_like(p)
    sam.first_step()
    sam.restore()
    b.data = memory[2:7]
    for _ in range(2):
        with pytest.raises(ValueError, match="share memory"):
            sam.first_step()
        assert not sam.perturbed
        assert torch.equal(good.detach(), torch.ones(3, dtype=torch.float64))
