"""Parameters whose memory, dtype or shape changes under the optimizer, between steps or while perturbed."""

import pytest
import torch
from torch import nn

from fastsam import FusedSAM, places
from tests.oracle import assert_perturbed, copies, norm64, perturbed, same_bits

BACKENDS = ["foreach", "cpp"]  # what is tested here depends on no arithmetic

pytestmark = pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch")

RHO = 0.5


def make(backend, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3))
    return model, FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, backend=backend, lr=0.1, **options)


def set_grads(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


def check_step(model, sam, backend):
    params = list(model.parameters())
    set_grads(model)
    before = copies(params)
    sam.first_step()
    expected = norm64(before, [p.grad for p in params], [False] * len(params))
    assert float(sam.grad_norm) == pytest.approx(expected, rel=2e-6)
    for p, w in zip(params, before, strict=True):
        assert_perturbed(backend, p, perturbed(w, p.grad, sam.grad_norm, RHO, 1e-12, False))
    sam.restore()
    assert same_bits(params, before)


CHANGES = {
    "half": lambda m: m.half(),
    "double": lambda m: m.to(torch.float64),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "cloned": lambda m: [setattr(p, "data", p.data.clone()) for p in m.parameters()],
    "one_cloned": lambda m: setattr(m[2].bias, "data", m[2].bias.data.clone()),
    "into_gaps": lambda m: setattr(m[2].bias, "data", torch.stack([m[2].bias.data] * 2, dim=1)[:, 0]),
    "shared": lambda m: m.share_memory(),
    "loaded_by_assignment": lambda m: [
        setattr(p, "data", v.clone()) for p, v in zip(m.parameters(), m.state_dict().values(), strict=True)
    ],
}
each_change = pytest.mark.parametrize("change", CHANGES)


@each_change
def test_between_steps(backend, change):
    model, sam = make(backend)
    check_step(model, sam, backend)
    CHANGES[change](model)
    check_step(model, sam, backend)
    check_step(model, sam, backend)


@each_change
def test_while_perturbed(backend, change):
    """The saved weights come back, through the conversion that the parameters went."""
    model, sam = make(backend)
    expected, _ = make(backend)
    CHANGES[change](expected)
    set_grads(model)
    sam.first_step()
    CHANGES[change](model)
    sam.restore()
    assert same_bits(list(model.parameters()), list(expected.parameters()))
    assert [p.stride() for p in model.parameters()] == [p.stride() for p in expected.parameters()]
    check_step(model, sam, backend)


def test_to_and_from_channels_last_while_perturbed(backend):
    model, sam = make(backend)
    model.to(memory_format=torch.channels_last)
    before = copies(model.parameters())
    set_grads(model)
    sam.first_step()
    model[0].weight.data = model[0].weight.data.contiguous()
    sam.restore()
    assert same_bits(list(model.parameters()), before)


@pytest.mark.parametrize(
    "reshape",
    [
        lambda t: t.view(3, 4),
        lambda t: t.view(4, 3).t(),
        lambda t: t[:5],
        lambda t: t[::2],
        lambda t: t.view(torch.float64),
    ],
    ids=["view", "transposed", "shorter", "gaps", "another dtype"],
)
def test_another_shape_or_dtype_at_the_same_address(backend, reshape):
    p = nn.Parameter(torch.arange(12.0))
    other = nn.Parameter(torch.ones(3))
    model = nn.ParameterList([p, other])
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, backend=backend, lr=0.1)
    memory = p.data
    check_step(model, sam, backend)
    sam.zero_grad()
    p.data = reshape(p.data)
    assert p.data_ptr() == memory.data_ptr()
    check_step(model, sam, backend)
    assert same_bits(memory, torch.arange(12.0))


@pytest.mark.parametrize("native", [True, False])
def test_a_square_weight_that_is_transposed_in_place(backend, native, monkeypatch):
    """The same memory, shape and dtype, other strides; seen with the native library and without it."""
    if not native:
        monkeypatch.setattr(places, "native", lambda: None)
    p, other = nn.Parameter(torch.arange(9.0).view(3, 3)), nn.Parameter(torch.ones(3))
    model = nn.ParameterList([p, other])
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, backend=backend, lr=0.1)
    check_step(model, sam, backend)
    sam.zero_grad()
    p.data = p.data.t()
    check_step(model, sam, backend)
    set_grads(model)
    before = copies(model.parameters())
    sam.first_step()
    p.data = p.data.t()  # while perturbed
    sam.restore()
    assert same_bits(list(model.parameters()), [before[0].t().contiguous(), before[1]])


def test_a_gradient_that_was_left_behind_is_an_error(backend):
    model, sam = make(backend)
    check_step(model, sam, backend)
    for replace, error in [
        (lambda p: p.data.double(), TypeError),
        (lambda p: torch.ones(2), ValueError),
        (lambda p: torch.ones(3, device="meta"), (ValueError, RuntimeError)),
    ]:
        set_grads(model)
        bias = model[2].bias
        kept, bias.data = bias.data, bias.data
        before = copies(model.parameters())
        if replace(bias).device.type != "meta":
            bias.data = replace(bias)
            with pytest.raises(error, match=r"gradient of parameter 3 of param group 0.*clear the gradients"):
                sam.first_step()
        assert not sam.perturbed
        bias.data = kept
        assert same_bits(list(model.parameters()), before)


def test_frozen_and_unfrozen(backend):
    """Parameters come in with their first gradient and are left alone when it is gone."""
    model, sam = make(backend)
    model[0].requires_grad_(False)
    frozen = copies(model[0].parameters())
    x = torch.ones(1, 2, 4, 4)
    for _ in range(2):
        sam.zero_grad()
        model(x).pow(2).sum().backward()
        sam.first_step()
        assert same_bits(list(model[0].parameters()), frozen)
        sam.restore()
    model[0].requires_grad_(True)
    sam.zero_grad()
    model(x).pow(2).sum().backward()
    sam.first_step()
    assert not same_bits(list(model[0].parameters()), frozen)
    sam.restore()
    model[0].requires_grad_(False)
    sam.zero_grad()
    model(x).pow(2).sum().backward()
    sam.first_step()
    assert same_bits(list(model[0].parameters()), frozen)
    sam.restore()


def test_integer_parameters_may_stay_frozen(backend):
    model, _ = make(backend)
    counts = nn.Parameter(torch.arange(4), requires_grad=False)
    params = [*model.parameters(), counts, nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)]
    sam = FusedSAM(params, torch.optim.SGD, rho=RHO, backend=backend, lr=0.1)
    check_step(model, sam, backend)
    set_grads(model)
    sam.first_step()
    sam.second_step()
    assert torch.equal(counts, torch.arange(4))


def test_other_parameters_in_a_group(backend):
    """As many and of the same shapes, as those of a new head are."""
    model, sam = make(backend)
    check_step(model, sam, backend)
    model[2] = nn.Linear(12, 3)
    sam.param_groups[0]["params"] = list(model.parameters())
    check_step(model, sam, backend)


@pytest.mark.parametrize("who", ["sam", "base"])
def test_add_param_group_after_steps(backend, who):
    model, sam = make(backend)
    check_step(model, sam, backend)
    extra = nn.Parameter(torch.ones(7))
    group = {"params": [extra], "lr": 0.5}
    (sam if who == "sam" else sam.base_optimizer).add_param_group(group)
    if who == "sam":
        assert set(group) == {"params", "lr"}  # another FusedSAM may be given it
    assert sam.param_groups[1]["lr"] == 0.5
    set_grads(model)
    extra.grad = torch.ones(7)
    sam.first_step()
    assert sam.param_groups[1]["rho"] == RHO
    assert_perturbed(backend, extra, perturbed(torch.ones(7), extra.grad, sam.grad_norm, RHO, 1e-12, False))
    sam.restore()
    assert torch.equal(extra.detach(), torch.ones(7))
