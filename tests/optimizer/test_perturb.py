"""perturb, a key of param groups: what it leaves out is neither measured, nor saved, nor moved."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from fastsam import FusedSAM, notices
from fastsam.perturbation import Perturbation
from tests.oracle import NORM_TOLERANCE, assert_perturbed, copies, norm64, perturbed, same_bits

LEFT_OUT = r"perturb=False in all param groups leaves nothing to perturb: set perturb=True"


class Net(nn.Module):
    """Two linear layers, which are left out, and the norm between them, which is perturbed."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
        self.chosen = list(self.layers[1].parameters())
        self.rest = [*self.layers[0].parameters(), *self.layers[3].parameters()]

    def groups(self, **options):
        return [{"params": self.rest, "perturb": False}, {"params": self.chosen, **options}]

    def loss(self, i=0):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i), dtype=self.rest[0].dtype)
        return self.layers(x).square().mean()


def make(dtype=torch.float32, **options):
    net = Net(dtype)
    options = {"rho": 0.5, "lr": 0.1, "momentum": 0.9, **options}
    return net, FusedSAM(net.groups(), torch.optim.SGD, **options)


def two_calls(net, sam, i=0):
    net.loss(i).backward()
    climbed = sam.first_step(zero_grad=True)
    if climbed:
        net.loss(i).backward()
    sam.second_step(zero_grad=True)
    return climbed


def closure(net, sam, i=0):
    def run():
        sam.zero_grad()
        loss = net.loss(i)
        loss.backward()
        return loss

    sam.step(run)


def by_hand(net, steps, rho=0.5, is_sam=lambda i: True):
    """SGD with momentum; SAM over the chosen parameters alone."""
    params = [*net.rest, *net.chosen]
    buffers = [torch.zeros_like(p) for p in params]
    for i in range(steps):
        grads = torch.autograd.grad(net.loss(i), params)
        if is_sam(i):
            w = copies(net.chosen)
            g = grads[len(net.rest) :]
            norm = torch.cat([t.flatten() for t in g]).norm()
            with torch.no_grad():
                for p, t in zip(net.chosen, g, strict=True):
                    p.add_(rho * t / norm)
            grads = torch.autograd.grad(net.loss(i), params)
            with torch.no_grad():
                for p, saved in zip(net.chosen, w, strict=True):
                    p.copy_(saved)
        with torch.no_grad():
            for p, g, v in zip(params, grads, buffers, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(0.1 * v)


def assert_same(net, other):
    torch.testing.assert_close(copies(net.parameters()), copies(other.parameters()), rtol=1e-9, atol=1e-12)


@pytest.fixture
def layouts(monkeypatch):
    """How often the buckets were laid out."""
    counted = []
    lay_out = Perturbation._lay_out
    monkeypatch.setattr(Perturbation, "_lay_out", lambda self, groups: (counted.append(1), lay_out(self, groups))[1])
    return counted


# -- one ascent --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_an_ascent_over_the_chosen_part(backend, adaptive):
    net, sam = make(backend=backend, adaptive=adaptive)
    rest, w = copies(net.rest), copies(net.chosen)
    versions = [p._version for p in net.rest]
    net.loss().backward()
    grads = [p.grad.clone() for p in net.chosen]
    expected = norm64(w, grads, [adaptive] * 2)
    assert expected < 0.9 * norm64([*rest, *w], [p.grad for p in (*net.rest, *net.chosen)], [adaptive] * 6)
    assert float(sam._grad_norm()) == pytest.approx(expected, rel=NORM_TOLERANCE)

    sam.first_step()
    assert float(sam.grad_norm) == pytest.approx(expected, rel=NORM_TOLERANCE)
    for p, before, g in zip(net.chosen, w, grads, strict=True):
        assert_perturbed(backend, p, perturbed(before, g, sam.grad_norm, 0.5, 1e-12, adaptive))
    if not adaptive:
        e_w = torch.cat([(p - before).flatten() for p, before in zip(net.chosen, w, strict=True)])
        assert float(e_w.norm()) == pytest.approx(0.5, rel=1e-5)
    assert same_bits(copies(net.rest), rest)
    assert [p._version for p in net.rest] == versions  # not even written with what was there

    with torch.no_grad():
        net.rest[0].add_(1)  # what is not saved is not restored
    sam.restore()
    assert same_bits(copies(net.chosen), w)
    assert same_bits(net.rest[0].detach(), rest[0] + 1)


@pytest.mark.parametrize("form", [two_calls, closure])
def test_the_base_steps_all_by_the_gradient_at_w_plus_e_w(backend, form):
    net, sam = make(torch.float64, backend=backend)
    expected = Net(torch.float64)
    by_hand(expected, 6)
    for i in range(6):
        form(net, sam, i)
    assert_same(net, expected)


def test_the_backup_is_as_large_as_the_chosen_part(backend):
    large = nn.Parameter(torch.randn(100_000))
    small = nn.Parameter(torch.randn(32))
    groups = [{"params": [large], "perturb": False}, {"params": [small]}]
    sam = FusedSAM(groups, torch.optim.SGD, lr=0.1, backend=backend)
    for p in (large, small):
        p.grad = torch.randn_like(p)
    sam.first_step()
    ((_, bucket),) = sam._state.perturbation.buckets
    assert bucket.params == [small]
    assert bucket.numel <= 32 + 15  # a slot may begin in the middle of a cache line
    assert len(bucket.chunks) == 1
    assert bucket.backup is None or bucket.backup.numel() == bucket.numel
    sam.restore()


def test_nothing_is_laid_out_anew_at_each_step(backend, layouts):
    net, sam = make(backend=backend)
    for i in range(4):
        two_calls(net, sam, i)
    assert len(layouts) == 1


def test_a_toggled_group_is_seen_at_the_next_step(backend, layouts):
    net, sam = make(backend=backend)
    two_calls(net, sam)
    for count, perturb in enumerate([True, True, False, False, True], start=1):
        sam.param_groups[0]["perturb"] = perturb
        rest = copies(net.rest)
        net.loss().backward()
        norm = norm64(*zip(*[(p, p.grad, False) for p in net.chosen + net.rest * perturb], strict=True))
        sam.first_step()
        assert float(sam.grad_norm) == pytest.approx(norm, rel=NORM_TOLERANCE)
        assert same_bits(copies(net.rest), rest) is not perturb
        sam.param_groups[0]["perturb"] = not perturb  # what was perturbed is restored
        sam.restore()
        sam.param_groups[0]["perturb"] = perturb
        assert same_bits(copies(net.rest), rest)
        sam.zero_grad()
        assert len(layouts) == {1: 2, 2: 2, 3: 3, 4: 3, 5: 4}[count]


def test_a_frozen_part_and_one_left_out(layouts):
    """Slotless parameters, which take no gradient yet, and such as are left out: neither costs a layout a step."""
    net, sam = make()
    net.chosen[0].requires_grad_(False)
    for _ in range(3):
        two_calls(net, sam)
    assert len(layouts) == 1
    net.chosen[0].requires_grad_(True)
    two_calls(net, sam)
    assert len(layouts) == 2


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
@pytest.mark.parametrize("form", [two_calls, closure])
def test_no_group_to_perturb_is_an_error(backend, direction, form):
    net, sam = make(backend=backend, direction=direction)
    sam.param_groups[1]["perturb"] = False
    with pytest.raises(RuntimeError, match=LEFT_OUT):
        form(net, sam)
    assert not sam.perturbed
    net.loss().backward()
    with pytest.raises(RuntimeError, match=LEFT_OUT):
        sam._grad_norm()
    sam.param_groups[0]["perturb"] = True
    sam.zero_grad()
    form(net, sam)


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
@pytest.mark.parametrize("form", [two_calls, closure])
def test_no_group_to_perturb_until_start(direction, form, monkeypatch):
    """It may be meant, so plain steps go on; it may be a mistake, which is not met after 70 % of a run."""
    monkeypatch.setattr(notices, "told", set())
    net, sam = make(direction=direction, start=3)
    sam.param_groups[1]["perturb"] = False
    text = "perturb=False in all param groups leaves nothing to perturb yet"
    with pytest.warns(UserWarning, match=text) as said:
        form(net, sam)
        form(net, sam)
    assert [str(w.message).startswith(text) for w in said].count(True) == 1
    sam.param_groups[1]["perturb"] = True
    form(net, sam)
    w = copies(net.chosen)
    net.loss().backward()
    assert sam.first_step(zero_grad=True)
    assert not any(map(torch.equal, net.chosen, w))
    sam.restore()


def test_no_gradient_in_the_chosen_part_is_an_error():
    net, sam = make()
    net.loss().backward()
    for p in net.chosen:
        p.grad = None
    for call in (sam.first_step, sam._grad_norm):
        with pytest.raises(RuntimeError, match=r"no parameter of a group with perturb=True has a gradient: call loss"):
            call()


@pytest.mark.parametrize("value", [None, "no", 2, torch.tensor(False)])
def test_values(value):
    net = Net()
    with pytest.raises(TypeError, match=r"perturb of param group 1 must be True or False, but got"):
        FusedSAM(net.groups(perturb=value), torch.optim.SGD, lr=0.1)
    net, sam = make()
    two_calls(net, sam)
    sam.param_groups[1]["perturb"] = value
    net.loss().backward()
    with pytest.raises(
        (TypeError, RuntimeError), match="perturb"
    ):  # as no group is perturbed, where it counts as False
        sam.first_step()
    assert not sam.perturbed


# -- beside the rest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"interval": 2}, {"start": 3}], ids=str)
def test_interval_and_start(backend, options):
    net, sam = make(torch.float64, backend=backend, **options)
    expected = Net(torch.float64)

    def is_sam(i):
        return i >= options.get("start", 0) and (i + 1) % options.get("interval", 1) == 0

    by_hand(expected, 6, is_sam=is_sam)
    assert [two_calls(net, sam, i) for i in range(6)] == [is_sam(i) for i in range(6)]
    assert_same(net, expected)


def test_the_rehearsal_leaves_out_too(backend):
    """A gradient that no ascent could take is none of its business where the group is left out."""
    net, sam = make(start=1, backend=backend)
    net.loss().backward()
    net.rest[1].grad = net.rest[1].grad.to_sparse()
    assert not sam.first_step()
    assert sam._state.perturbation.rehearsed
    sam.zero_grad()


def test_along_the_momentum(backend):
    net, sam = make(torch.float64, backend=backend, direction="momentum")
    for i in range(2):
        sam.first_step()
        net.loss(i).backward()
        sam.second_step(zero_grad=True)
    rest, w = copies(net.rest), copies(net.chosen)
    v = [sam.state[p]["momentum_buffer"] for p in net.chosen]
    assert sam.first_step()
    norm = torch.cat([t.flatten() for t in v]).norm()
    for p, before, t in zip(net.chosen, w, v, strict=True):
        torch.testing.assert_close(p.detach(), before - 0.5 * t / norm, rtol=1e-10, atol=1e-10)
    assert same_bits(copies(net.rest), rest)
    sam.restore()


@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_scaler_looks_at_all_gradients(fused):
    """Those of the part that is left out are unscaled too, and skip the step where they overflow."""
    net, twin = Net(), Net()
    sam = FusedSAM(net.groups(), torch.optim.SGD, lr=0.1, rho=0.5, fused=fused)
    plain = FusedSAM(twin.groups(), torch.optim.SGD, lr=0.1, rho=0.5, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for overflows in (False, True):
        before = copies(net.parameters())
        scaler.scale(net.loss()).backward()
        sam.first_step(zero_grad=True)
        scaler.scale(net.loss()).backward()
        if overflows:
            net.rest[0].grad[0, 0] = math.inf
        scaler.step(sam)
        scaler.update()
        sam.zero_grad()
        assert same_bits(copies(net.parameters()), before) is overflows
    assert scaler.get_scale() == 512.0
    two_calls(twin, plain)
    torch.testing.assert_close(copies(net.parameters()), copies(twin.parameters()))


def test_an_infinite_gradient_of_the_part_that_is_left_out_does_not_stop_the_ascent(backend):
    net, sam = make(backend=backend)
    w = copies(net.chosen)
    net.loss().backward()
    net.rest[0].grad.fill_(math.inf)
    sam.first_step()
    assert sam.grad_norm.isfinite()
    assert not same_bits(copies(net.chosen), w)
    sam.restore()


@pytest.mark.parametrize("flatten", [False, True])
def test_complex_parameters_may_be_left_out(backend, flatten):
    """The base optimizer steps them; put into the ascent, they are refused as at construction."""
    w, z = nn.Parameter(torch.ones(2)), nn.Parameter(torch.tensor([1 + 2j, 3j]))
    groups = [{"params": [w]}, {"params": [z], "perturb": False}]
    sam = FusedSAM(groups, torch.optim.SGD, lr=0.1, rho=0.5, backend=backend, flatten_parameters=flatten)

    def run():
        sam.zero_grad()
        loss = w.square().sum() + (z * z.conj()).real.sum()
        loss.backward()
        return loss

    sam.step(run)
    torch.testing.assert_close(z.detach(), 0.8 * torch.tensor([1 + 2j, 3j]))
    torch.testing.assert_close(w.detach(), torch.ones(2) - 0.2 * (1 + 0.5 / math.sqrt(2)))
    sam.param_groups[1]["perturb"] = True
    with pytest.raises(TypeError, match=r"parameter 0 of param group 1 is torch\.complex64.*perturb=False"):
        sam.step(run)


def test_flat_parameters(backend):
    """All are moved into the buffer, so that a group may be toggled."""
    net, sam = make(torch.float64, backend=backend, flatten_parameters=True)
    expected = Net(torch.float64)
    by_hand(expected, 4)
    assert len({p.untyped_storage().data_ptr() for p in net.parameters()}) == 1
    addresses = [p.data_ptr() for p in net.parameters()]
    for i in range(4):
        two_calls(net, sam, i)
    assert_same(net, expected)
    assert [p.data_ptr() for p in net.parameters()] == addresses


@pytest.mark.parametrize("flatten", [False, True])
def test_a_group_that_is_added(flatten):
    net = Net()
    sam = FusedSAM(net.chosen, torch.optim.SGD, lr=0.1, rho=0.5, flatten_parameters=flatten)
    sam.add_param_group({"params": net.rest[:2], "perturb": False})
    sam.base_optimizer.add_param_group({"params": net.rest[2:]})  # past this class
    before = copies(net.rest)
    net.loss().backward()
    assert float(sam._grad_norm()) > 0
    sam.first_step()
    assert [group["perturb"] for group in sam.param_groups] == [True, False, True]
    assert [same_bits(p.detach(), b) for p, b in zip(net.rest, before, strict=True)] == [True, True, False, False]
    sam.restore()
    with pytest.raises(TypeError, match="perturb of param group 3 must be True or False"):
        sam.add_param_group({"params": [nn.Parameter(torch.ones(2))], "perturb": "no"})
    assert len(sam.param_groups) == 3


def test_around_an_optimizer_whose_groups_say_it():
    net = Net()
    base = torch.optim.SGD(net.groups(), lr=0.1)
    sam = FusedSAM(base, rho=0.5)
    rest = copies(net.rest)
    net.loss().backward()
    sam.first_step()
    assert same_bits(copies(net.rest), rest)
    sam.restore()


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_state_dict_holds_it():
    net, sam = make()
    two_calls(net, sam)
    file = io.BytesIO()
    torch.save(sam.state_dict(), file)
    file.seek(0)
    other = Net()
    loaded = FusedSAM([{"params": other.rest}, {"params": other.chosen}], torch.optim.SGD, lr=0.1, momentum=0.9)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert [group["perturb"] for group in loaded.param_groups] == [False, True]
    state_dict = sam.state_dict()
    state_dict["param_groups"][0]["perturb"] = "no"
    with pytest.raises(TypeError, match="perturb of param group 0 of the state dict must be True or False"):
        loaded.load_state_dict(state_dict)


def test_a_state_dict_from_before_it_leaves_it_as_it_is():
    net, sam = make()
    two_calls(net, sam)
    old = sam.state_dict()
    for group in old["param_groups"]:
        del group["perturb"]
    sam.load_state_dict(old)
    assert [group["perturb"] for group in sam.param_groups] == [False, True]
    two_calls(net, sam)


@pytest.mark.parametrize("call", ["first_step", "_grad_norm"])
def test_a_pickle_from_before_it(call):
    net, sam = make()
    two_calls(net, sam)
    for group in sam.param_groups:
        del group["perturb"]
    del sam.defaults["perturb"]
    twin, old = pickle.loads(pickle.dumps((net, sam)))
    twin.loss().backward()
    getattr(old, call)()
    assert [group["perturb"] for group in old.param_groups] == [True, True]
    old.restore()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    net, sam = make()
    two_calls(net, sam)
    twin, other = copied((net, sam))
    for pair in ((net, sam), (twin, other)):
        two_calls(*pair)
    assert same_bits(copies(net.parameters()), copies(twin.parameters()))
    assert [group["perturb"] for group in other.param_groups] == [False, True]


def test_the_norm_that_radius_zero_gives_is_another():
    """What people write without it: a group with rho=0 counts in the norm, so that |e_w| is smaller than rho."""
    net = Net()
    sam = FusedSAM([{"params": net.rest, "rho": 0.0}, {"params": net.chosen}], torch.optim.SGD, rho=0.5, lr=0.1)
    w = copies(net.chosen)
    net.loss().backward()
    sam.first_step()
    assert torch.cat([(p - b).flatten() for p, b in zip(net.chosen, w, strict=True)]).norm() < 0.45
    sam.restore()
