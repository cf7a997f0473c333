"""direction="momentum": one gradient a step, where the momentum leads, against Momentum-SAM by hand in fp64."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from fastsam import FusedSAM, notices
from tests.oracle import PlainSAM, copies, same_bits
from tests.scaled import make_scaler

BACKENDS = ["foreach", "cpp"]  # what is tested here depends on no arithmetic

STEPS, RHO, LR = 6, 0.3, 0.1
BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd, decayed": (torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.1, "dampening": 0.1}),
    "adamw": (torch.optim.AdamW, {}),
}


def make(backend=None, base="sgd", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer, own = BASES[base]
    options = {"rho": RHO, "lr": LR, **own, **options}
    return model, FusedSAM(model.parameters(), optimizer, backend=backend, direction="momentum", **options)


def loss_of(model, i, n=8):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    return model(x.to(next(model.parameters()).dtype)).square().mean()


def two_calls(model, sam, i):
    climbed = sam.first_step()
    loss_of(model, i).backward()
    sam.second_step(zero_grad=True)
    return climbed


def closure(model, sam, i):
    passes = []

    def run():
        passes.append(sam.perturbed)
        sam.zero_grad()
        loss = loss_of(model, i)
        loss.backward()
        return loss

    loss = sam.step(run)
    assert loss is not None
    assert len(passes) == 1
    return passes[0]


FORMS = [two_calls, closure]


class ByHand(PlainSAM):
    """The same model, trained by the oracle."""

    def __init__(self, base="sgd", **options):
        self.model, _ = make(base=base)
        optimizer, own = BASES[base]
        params = self.model.parameters()
        super().__init__(self.model, optimizer(params, lr=LR, **own), RHO, direction="momentum", **options)

    def train(self, i):
        super().train(lambda: loss_of(self.model, i))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"interval": 2}, {"start": 3}], ids=str)
def test_against_the_method_by_hand(backend, form, base, options):
    model, sam = make(backend, base, **options)
    hand = ByHand(base, **options)
    for k in range(STEPS):
        # The first step has no momentum to go by.
        is_sam = k >= max(1, options.get("start", 0)) and (k + 1) % options.get("interval", 1) == 0
        assert sam.ascending is False
        assert form(model, sam, k) is is_sam
        hand.train(k)
        torch.testing.assert_close(copies(model.parameters()), copies(hand.params), rtol=1e-9, atol=1e-12)


def test_the_norm_is_the_momentums(backend):
    model, sam = make(backend)
    two_calls(model, sam, 0)
    v = [sam.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    w = copies(model.parameters())
    assert sam.first_step()
    norm = torch.stack([t.norm() for t in v]).norm()
    torch.testing.assert_close(sam.grad_norm, norm)
    for p, a, b in zip(model.parameters(), w, v, strict=True):
        torch.testing.assert_close(p, a - RHO / norm * b)
    sam.restore()
    assert same_bits(copies(model.parameters()), w)


def test_the_norm_of_the_original_is_the_gradients():
    model, sam = make()
    two_calls(model, sam, 0)
    loss_of(model, 1).backward()
    torch.testing.assert_close(sam._grad_norm(), torch.cat([p.grad.flatten() for p in model.parameters()]).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_restore_to_the_bit(backend, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sam = FusedSAM(base, 2.0, direction="momentum", backend=backend)
        for k in range(3):
            w = copies(model.parameters())
            climbed = sam.first_step()
            assert climbed == (k > 0)
            assert same_bits(copies(model.parameters()), w) != climbed
            loss_of(model, k).backward()
            sam.restore()
            assert same_bits(copies(model.parameters()), w)
            sam.base_optimizer.step()
            sam.zero_grad()


def test_looking_for_the_momentum_makes_no_state(backend):
    """The state of torch's optimizers is a defaultdict; an empty entry would be saved, and taken for a state."""
    model, sam = make(backend)
    assert not sam.first_step()
    assert not sam.state
    loss_of(model, 0).backward()
    sam.second_step()
    assert sam.state.keys() == set(model.parameters())


def test_rho_of_groups_and_of_a_tensor(backend):
    model, _ = make()
    rho = torch.tensor(0.2)
    groups = [{"params": model[0].parameters(), "rho": 0.7}, {"params": model[2].parameters(), "rho": rho}]
    sam = FusedSAM(groups, torch.optim.SGD, lr=LR, momentum=0.9, direction="momentum", backend=backend)
    two_calls(model, sam, 0)
    v = {p: sam.state[p]["momentum_buffer"].clone() for p in model.parameters()}
    norm = torch.stack([t.norm() for t in v.values()]).norm()
    w = copies(model.parameters())
    rho.fill_(0.5)
    assert sam.first_step()
    for (p, b), a, r in zip(v.items(), w, (0.7, 0.7, 0.5, 0.5), strict=True):
        torch.testing.assert_close(p, a - r / norm * b)


def test_parameters_without_momentum_yet_are_not_perturbed(backend):
    model, sam = make(backend)
    model[2].requires_grad_(False)
    two_calls(model, sam, 0)
    model[2].requires_grad_(True)
    sam.add_param_group({"params": [new := nn.Parameter(torch.ones(3, dtype=torch.float64))]})
    w = copies(model.parameters())
    assert sam.first_step()
    changed = [not torch.equal(p, a) for p, a in zip(model.parameters(), w, strict=True)]
    assert changed == [True, True, False, False]
    assert torch.equal(new, torch.ones_like(new))
    loss_of(model, 1).backward()
    sam.second_step(zero_grad=True)
    w = copies(model.parameters())
    assert sam.first_step()
    assert all(not torch.equal(p, a) for p, a in zip(model.parameters(), w, strict=True))


def test_frozen_parameters_stay(backend):
    model, sam = make(backend)
    two_calls(model, sam, 0)
    model[0].requires_grad_(False)
    w = copies(model[0].parameters())
    assert sam.first_step()
    assert same_bits(copies(model[0].parameters()), w)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("saved_at", [0, 1, 3])
def test_resuming_bit_for_bit(base, saved_at):
    whole, sam = make(base=base)
    for k in range(STEPS):
        closure(whole, sam, k)
    model, sam = make(base=base)
    for k in range(saved_at):
        closure(model, sam, k)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": sam.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, sam = make(base=base)
    resumed.load_state_dict(saved["model"])
    sam.load_state_dict(saved["optimizer"])
    for k in range(saved_at, STEPS):
        assert closure(resumed, sam, k) is (k > 0)
    assert same_bits(copies(resumed.parameters()), copies(whole.parameters()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on(copied):
    model, sam = make()
    for k in range(2):
        closure(model, sam, k)
    other, twin = copied((model, sam))
    assert twin.direction == "momentum"
    for k in range(2, STEPS):
        assert closure(model, sam, k)
        assert closure(other, twin, k)
    assert same_bits(copies(other.parameters()), copies(model.parameters()))


def test_it_does_not_keep_itself_alive():
    model, sam = make()
    closure(model, sam, 0)
    closure(model, sam, 1)
    gone = weakref.ref(sam)
    del sam
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("form", ["two calls", "known scaler", "closure"])
def test_with_a_grad_scaler(form):
    """One backward a step; the momentum carries no scale, so neither does the perturbation."""
    scaler = make_scaler() if form == "two calls" else GradScaler("cpu", init_scale=8.0)
    model, sam = make(grad_scaler=None if form == "two calls" else scaler)
    hand = ByHand()
    for k in range(STEPS):
        if form == "closure":

            def run(k=k):
                sam.zero_grad()
                scaler.scale(loss_of(model, k)).backward()

            sam.step(run)
        else:
            assert sam.first_step() is (k > 0)
            scaler.scale(loss_of(model, k)).backward()
            if form == "two calls":
                scaler.step(sam)
            else:
                sam.second_step()
            sam.zero_grad()
        scaler.update()
        hand.train(k)
        torch.testing.assert_close(copies(model.parameters()), copies(hand.params), rtol=1e-9, atol=1e-12)
    v = [sam.state[p]["momentum_buffer"] for p in model.parameters()]
    assert sam.first_step()
    torch.testing.assert_close(sam.grad_norm, torch.stack([t.norm() for t in v]).norm())


def test_a_skipped_step_counts_and_makes_no_momentum():
    model, sam = make()
    scaler = GradScaler("cpu", init_scale=8.0)
    for k in range(3):
        assert sam.first_step() is (k > 1)
        (scaler.scale(loss_of(model, k)) * (float("inf") if k == 0 else 1.0)).backward()
        scaler.step(sam)
        scaler.update()
        sam.zero_grad()
    assert sam.param_groups[0]["sam_step"] == 3


def test_micro_batches_add_up_at_the_same_point(backend):
    model, sam = make(backend)
    hand = ByHand()
    for k in range(STEPS):
        assert sam.first_step() is (k > 0)
        for part in range(2):
            (loss_of(model, 10 * k + part) / 2).backward()
        sam.second_step(zero_grad=True)
        w = copies(hand.params)
        v = [hand.base.state[p].get("momentum_buffer") for p in hand.params]
        if k:
            norm = torch.stack([t.norm() for t in v]).norm()
            with torch.no_grad():
                for p, t in zip(hand.params, v, strict=True):
                    p.sub_(RHO / norm * t)
        hand.base.zero_grad()
        for part in range(2):
            (loss_of(hand.model, 10 * k + part) / 2).backward()
        with torch.no_grad():
            for p, a in zip(hand.params, w, strict=True):
                p.copy_(a)
        hand.base.step()
        torch.testing.assert_close(copies(model.parameters()), copies(hand.params), rtol=1e-9, atol=1e-12)


class MSAM:
    """The loop of the paper's own code, in its arithmetic: it lives at w~ between the steps and has one group.

    Departures: there the weights that are saved and evaluated are w~ unless one asks; weight decay is that of w~.
    """

    def __init__(self, params, rho, lr, momentum):
        self.params, self.rho, self.lr, self.momentum = list(params), rho, lr, momentum
        self.buffers = [torch.zeros_like(p) for p in self.params]
        self.factor = 0.0

    @torch.no_grad()
    def step(self):
        for p, v in zip(self.params, self.buffers, strict=True):
            p.add_(v, alpha=self.factor)  # back to w
            v.mul_(self.momentum).add_(p.grad)
            p.sub_(v, alpha=self.lr)
        norm = torch.stack([v.norm() for v in self.buffers]).norm()
        self.factor = float(self.rho / (norm + 1e-12))
        for p, v in zip(self.params, self.buffers, strict=True):
            p.sub_(v, alpha=self.factor)  # on to the next w~


def test_against_the_papers_own_loop(backend):
    model, sam = make(backend)
    other, _ = make()
    peer = MSAM(other.parameters(), RHO, LR, 0.9)
    for k in range(STEPS):
        two_calls(model, sam, k)
        other.zero_grad()
        loss_of(other, k).backward()
        peer.step()
        w = [p + peer.factor * v for p, v in zip(peer.params, peer.buffers, strict=True)]
        torch.testing.assert_close(copies(model.parameters()), w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (torch.optim.SGD, {}, "SGD has momentum=0"),
        (torch.optim.RMSprop, {"momentum": 0.9}, "preconditioned"),
        (torch.optim.Adagrad, {}, "Adagrad does not keep"),
        (torch.optim.ASGD, {}, "ASGD does not keep"),
        (torch.optim.Rprop, {}, "Rprop does not keep"),
        (torch.optim.Adafactor, {}, "Adafactor does not keep"),
    ],
)
def test_a_base_without_momentum_is_refused(base, options, message):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=rf"direction='momentum'.*{message}.*use torch.optim.SGD"):
        FusedSAM([p], base, lr=0.1, direction="momentum", **options)
    with pytest.raises(ValueError, match=message):
        FusedSAM(base([p], lr=0.1, **options), direction="momentum")


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax])
def test_other_bases_with_momentum(backend, base):
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    sam = FusedSAM([p], base, lr=0.1, direction="momentum", backend=backend)
    for k in range(3):
        assert sam.first_step() is (k > 0)
        p.square().sum().backward()
        sam.second_step(zero_grad=True)


class Keeper(torch.optim.Optimizer):
    """Says that it has a momentum, and keeps it by another name."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["m"] = p.grad.clone()


def test_a_momentum_by_another_name_is_an_error():
    p = nn.Parameter(torch.ones(2))
    sam = FusedSAM([p], Keeper, lr=0.1, direction="momentum")
    assert not sam.first_step()
    p.sum().backward()
    sam.second_step()
    with pytest.raises(RuntimeError, match="neither momentum_buffer nor exp_avg in the state of Keeper"):
        sam.first_step()
    assert torch.equal(p, torch.ones(2))


def test_no_momentum_after_steps_is_told(monkeypatch):
    monkeypatch.setattr(notices, "told", set())
    _, sam = make()
    with pytest.warns(UserWarning, match="second_step\\(\\) found no gradient.*whatever it returned"):
        sam.first_step()
        sam.second_step()
    with pytest.warns(UserWarning, match="finds no momentum yet, after 1 steps"):
        assert not sam.first_step()


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_at_w_is_told(monkeypatch, form):
    monkeypatch.setattr(notices, "told", set())
    model, sam = make()
    form(model, sam, 0)
    hand = ByHand()
    hand.train(0)
    loss_of(model, 7).backward()
    with pytest.warns(UserWarning, match="needs no gradient at w"):
        if form is two_calls:
            sam.first_step(zero_grad=True)
            loss_of(model, 1).backward()
            sam.second_step(zero_grad=True)
        else:
            sam.step(lambda: loss_of(model, 1).backward())
    hand.train(1)
    torch.testing.assert_close(copies(model.parameters()), copies(hand.params))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"start": 2}, {"interval": 2}], ids=str)
def test_a_loop_of_davda54_climbs_along_the_momentum(monkeypatch, backend, form, options):
    """Its gradient at w is told of at the first step, plain or not. It is that of a plain step, or part of none."""
    monkeypatch.setattr(notices, "told", set())
    model, sam = make(backend, **options)
    hand = ByHand(**options)
    for k in range(STEPS):
        # The first step has no momentum to go by.
        is_sam = k >= max(1, options.get("start", 0)) and (k + 1) % options.get("interval", 1) == 0
        loss_of(model, k + 50 if is_sam or form is closure else k).backward()
        with pytest.warns(UserWarning, match="needs no gradient at w") if k == 0 else warnings.catch_warnings():
            if form is two_calls:
                if sam.first_step(zero_grad=True):
                    loss_of(model, k).backward()
                sam.second_step(zero_grad=True)
            else:
                sam.step(lambda k=k: loss_of(model, k).backward())
                sam.zero_grad()
        hand.train(k)
        torch.testing.assert_close(copies(model.parameters()), copies(hand.params), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("zero_grad", [False, True])
def test_a_gradient_that_is_added_to_the_one_at_w_of_a_plain_step_is_an_error(monkeypatch, zero_grad):
    """As a loop of davda54's would, which computes a second one whatever first_step returns."""
    monkeypatch.setattr(notices, "told", set())
    model, sam = make()
    w = copies(model.parameters())
    loss_of(model, 0).backward()
    with pytest.warns(UserWarning, match="needs no gradient at w"):
        assert not sam.first_step(zero_grad=zero_grad)
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="needs no gradient at w, so leave out the backward before first_step"):
        sam.second_step(zero_grad=True)
    assert same_bits(copies(model.parameters()), w)


@pytest.mark.usefixtures("hears_nothing")
def test_after_first_step_a_closure_adds_to_the_micro_batches_that_came_since(backend):
    """On the first step, which has no momentum, as on the others; and hears nothing."""
    model, sam = make(backend)
    other, twin = make(backend)
    for k in range(3):
        assert sam.first_step() is twin.first_step() is (k > 0)
        for m in (model, other):
            loss_of(m, k).backward()
        sam.step(lambda k=k: loss_of(model, k + 10).backward())
        sam.zero_grad()
        loss_of(other, k + 10).backward()
        twin.second_step(zero_grad=True)
        assert same_bits(copies(model.parameters()), copies(other.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"closure_passes": "one"}, "closure_passes='one' is for gradients at w"),
        ({"closure_passes": "two"}, "closure_passes='two' is for gradients at w"),
        ({"first_pass_context": torch.no_grad}, "first_pass_context is for the pass at w"),
        ({"direction": "sideways"}, "direction must be one of 'gradient', 'momentum', but got 'sideways'"),
    ],
)
def test_options_that_contradict(options, message):
    with pytest.raises(ValueError, match=message):
        FusedSAM([nn.Parameter(torch.ones(2))], torch.optim.Adam, **{"direction": "momentum", **options})


def test_options_that_contradict_later():
    model, sam = make()
    with pytest.raises(ValueError, match="closure_passes='two'"):
        sam.closure_passes = "two"
    with pytest.raises(AttributeError):
        sam.direction = "gradient"
    closure(model, sam, 0)
    w = copies(model.parameters())
    sam.first_pass_context = torch.no_grad
    with pytest.raises(ValueError, match="first_pass_context"):
        sam.step(lambda: loss_of(model, 1).backward())
    assert same_bits(copies(model.parameters()), w)


def test_step_without_first_step_is_an_error():
    model, sam = make()
    two_calls(model, sam, 0)
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="not perturbed"):
        sam.second_step()


def test_a_failing_closure_leaves_w(backend):
    model, sam = make(backend)
    closure(model, sam, 0)
    w = copies(model.parameters())

    def fail():
        assert not same_bits(copies(model.parameters()), w)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sam.step(fail)
    assert same_bits(copies(model.parameters()), w)
    assert closure(model, sam, 1)


def test_momentum_that_is_not_finite_perturbs_nothing(backend):
    model, sam = make(backend)
    closure(model, sam, 0)
    w = copies(model.parameters())
    sam.state[next(iter(model.parameters()))]["momentum_buffer"][0] = float("nan")
    assert sam.first_step()
    assert same_bits(copies(model.parameters()), w)


def test_a_momentum_of_another_dtype_is_named():
    model, sam = make()
    closure(model, sam, 0)
    state = sam.state[next(iter(model.parameters()))]
    state["momentum_buffer"] = state["momentum_buffer"].float()
    with pytest.raises(TypeError, match=r"the momentum of parameter 0 of param group 0 is torch\.float32"):
        sam.first_step()


# -- kinds of momentum, and of bases -----------------------------------------------------------------------------------


class Bits8(torch.Tensor):
    """A moment in 8 bits, as those of low-bit optimizers: it has no memory of its own, but knows its values."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = [a.values() if isinstance(a, Bits8) else a for a in args]
        return func(*plain, **(kwargs or {}))

    def values(self):
        return self.codes * self.scale


class Dequantized(Bits8):
    def dequantize(self):
        return self.values()


class LowBit(torch.optim.Optimizer):
    """SGD with its momentum in 8 bits."""

    kind = Dequantized

    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            v = self.state[p]["momentum_buffer"].values() if self.state[p] else torch.zeros_like(p)
            v = 0.9 * v + p.grad
            scale = v.abs().max() / 127
            self.state[p]["momentum_buffer"] = self.kind((v / scale).round().to(torch.int8), scale)
            p -= self.param_groups[0]["lr"] * v


class Packed(LowBit):
    kind = Bits8


def test_a_momentum_in_8_bits_is_asked_for_its_values(backend):
    model, _ = make()
    params = list(model.parameters())
    sam = FusedSAM(params, LowBit, rho=RHO, lr=LR, backend=backend, direction="momentum")
    assert two_calls(model, sam, 0) is False
    for k in range(1, 4):
        w = copies(params)
        v = [sam.state[p]["momentum_buffer"].values() for p in params]
        norm = sum(float(t.square().sum()) for t in v) ** 0.5
        assert norm > 0
        assert sam.first_step()
        assert float(sam.grad_norm) == pytest.approx(norm)
        expected = [a - RHO * b / norm for a, b in zip(w, v, strict=True)]
        torch.testing.assert_close(copies(params), expected)
        loss_of(model, k).backward()
        sam.second_step(zero_grad=True)


def test_a_momentum_that_does_not_tell_its_values_is_refused(backend):
    model, _ = make()
    sam = FusedSAM(model.parameters(), Packed, rho=RHO, lr=LR, backend=backend, direction="momentum")
    two_calls(model, sam, 0)
    w = copies(model.parameters())
    with pytest.raises(
        TypeError, match=r"momentum of parameter . of param group 0 is a Bits8.* no memory .*dequantize"
    ):
        sam.first_step()
    assert same_bits(copies(model.parameters()), w)


@pytest.mark.parametrize("kind", [Bits8, Dequantized])
def test_a_gradient_without_memory(backend, kind):
    """Beside a plain one; asked for its values, or refused by name."""
    ps = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))]
    sam = FusedSAM(ps, torch.optim.SGD, rho=RHO, lr=LR, backend=backend)
    ps[0].grad = torch.ones(4)
    ps[1].grad = kind(torch.tensor([0, 1, 2], dtype=torch.int8), torch.tensor(2.0))
    if kind is Bits8:
        with pytest.raises(TypeError, match="gradient of parameter 1 of param group 0 is a Bits8"):
            sam.first_step()
        assert all(bool((p == 1).all()) for p in ps)
        return
    sam.first_step()
    norm = (4 + 4 + 16) ** 0.5
    torch.testing.assert_close(ps[0].detach(), 1 + RHO * torch.ones(4) / norm)
    torch.testing.assert_close(ps[1].detach(), 1 + RHO * torch.tensor([0.0, 2.0, 4.0]) / norm)


@pytest.mark.parametrize("name", ["RMSpropTF", "LaProp", "ADOPT", "Lars"])
@pytest.mark.parametrize("inherited", [False, True])
def test_a_preconditioned_momentum_is_refused_by_name(name, inherited):
    """timm's optimizers, and others of the same names."""
    cls = type(name, (torch.optim.SGD,), {})
    cls = type("Mine", (cls,), {}) if inherited else cls
    with pytest.raises(ValueError, match=f"can't use {cls.__name__}'s momentum, which is preconditioned"):
        FusedSAM([nn.Parameter(torch.ones(2))], cls, lr=0.1, momentum=0.9, direction="momentum")


@pytest.mark.parametrize(
    "name", ["ADOPT", "AdaFactor", "AdaGC", "Amos", "CAME", "LARS", "LaProp", "MARS", "SM3", "Shampoo", "StableSPAM"]
)
def test_a_preconditioned_momentum_of_pytorch_optimizer_is_refused(name):
    p = nn.Parameter(torch.ones(2))
    base = getattr(pytorch_optimizer, name)([p], lr=0.1, **({"momentum": 0.9} if name in ("SM3", "Shampoo") else {}))
    with pytest.raises(ValueError, match=f"can't use {name}'s momentum, which is preconditioned"):
        FusedSAM(base, direction="momentum")


def test_a_momentum_that_is_no_tensor_is_an_error():
    p = nn.Parameter(torch.ones(2))
    sam = FusedSAM([p], pytorch_optimizer.AggMo, lr=0.1, direction="momentum")
    assert not sam.first_step()
    p.sum().backward()
    sam.second_step()
    w = p.detach().clone()
    with pytest.raises(TypeError, match="the momentum of parameter 0 of param group 0 is a dict"):
        sam.first_step()
    assert torch.equal(p, w)


@pytest.mark.parametrize("form", FORMS)
def test_a_schedule_that_ends_the_momentum_ends_the_ascent(form):
    """SGD keeps its buffers as they were; where the momentum comes back, so does the ascent."""
    model, _ = make()
    first, last = (list(model[i].parameters()) for i in (0, 2))
    base = torch.optim.SGD([{"params": first}, {"params": last}], lr=LR, momentum=0.9)
    sam = FusedSAM(base, RHO, direction="momentum")
    assert [form(model, sam, i) for i in range(2)] == [False, True]

    sam.param_groups[0]["momentum"] = 0.0
    w, norm = copies(first), torch.cat([sam.state[p]["momentum_buffer"].flatten() for p in last]).norm()
    assert sam.first_step()
    assert same_bits(copies(first), w)
    torch.testing.assert_close(sam.grad_norm, norm)
    sam.restore()
    sam.param_groups[1]["momentum"] = 0.0
    assert form(model, sam, 2) is False
    sam.param_groups[0]["momentum"] = 0.9
    assert form(model, sam, 3) is True


def test_the_momentum_has_a_radius_of_its_own():
    assert make(rho=1.0)[1].rho == 1.0
    p = nn.Parameter(torch.ones(2))
    for args in [([p], torch.optim.SGD), (torch.optim.SGD([p], lr=0.1, momentum=0.9),)]:
        own = {"lr": 0.1, "momentum": 0.9} if len(args) == 2 else {}
        assert FusedSAM(*args, direction="momentum", **own).rho == 1.0
        p = nn.Parameter(torch.ones(2))
    assert FusedSAM([p], torch.optim.SGD, lr=0.1, momentum=0.9).rho == 0.05


# -- maximize ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_to_maximise_is_to_minimise_the_negated_loss(backend, direction, form, base):
    """torch promises the same path, so the worst nearby point is the same."""
    options = {"rho": RHO, "backend": backend, "direction": direction}
    torch.manual_seed(0)
    low = nn.Linear(4, 3).double()
    high = copy.deepcopy(low)
    optimizer, own = BASES[base]
    minimising = FusedSAM(optimizer(low.parameters(), lr=LR, **own), **options)
    maximising = FusedSAM(optimizer(high.parameters(), lr=LR, maximize=True, **own), **options)
    for k in range(STEPS):
        for model, sam, sign in ((low, minimising, 1.0), (high, maximising, -1.0)):

            def run(model=model, sam=sam, sign=sign, k=k):
                sam.zero_grad()
                loss = sign * loss_of(model, k)
                loss.backward()
                return loss

            if form is closure:
                sam.step(run)
            else:
                if direction == "gradient":
                    run()
                sam.first_step(zero_grad=True)
                run()
                sam.second_step(zero_grad=True)
        torch.testing.assert_close(copies(high.parameters()), copies(low.parameters()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_each_group_climbs_by_its_own_sign(backend, adaptive):
    """A game in one optimizer: one group minimises, the other maximises, and maximize changes while training."""
    ps = [nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([0.5, 3.0, 1.0]))]
    groups = [{"params": [ps[0]]}, {"params": [ps[1]], "maximize": True, "rho": 0.2}]
    sam = FusedSAM(groups, torch.optim.SGD, rho=0.1, adaptive=adaptive, lr=0.1, backend=backend)
    for signs in [(1, -1), (-1, 1), (1, 1)]:
        for group, sign in zip(sam.param_groups, signs, strict=True):
            group["maximize"] = sign < 0
        w = copies(ps)
        sum(p.pow(3).sum() for p in ps).backward()
        g = [p.grad.clone() for p in ps]
        sam.first_step(zero_grad=True)
        scaled = [a.abs() * b if adaptive else b for a, b in zip(w, g, strict=True)]
        norm = sum(float(t.double().square().sum()) for t in scaled) ** 0.5
        rhos = (0.1, 0.2)
        for p, a, b, rho, sign in zip(ps, w, g, rhos, signs, strict=True):
            torch.testing.assert_close(p.detach(), a + sign * rho * (a * a * b if adaptive else b) / norm)
        sam.restore()
        assert same_bits(copies(ps), w)
        sam.zero_grad()
