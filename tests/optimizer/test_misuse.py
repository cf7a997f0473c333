"""Loops that go wrong between the calls: what the user is told, and that the weights are not lost."""

import gc
import warnings

import pytest
import torch
from torch import nn

from fastsam import FusedSAM, notices
from tests.oracle import copies, same_bits

BACKENDS = ["foreach", "cpp"]  # what is tested here depends on no arithmetic

X = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
SECOND_GRADIENT = r"a second gradient was added .*`if sam\.first_step\(zero_grad=True\)"


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    monkeypatch.setattr(notices, "told", set())


def make(backend, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    return model, FusedSAM(
        model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9, backend=backend, **options
    )


def backward(model):
    loss = model(X).square().mean()
    loss.backward()
    return loss


# -- a plain step that first_step() announces by False -----------------------------------------------------------------


@pytest.mark.parametrize("end", [FusedSAM.second_step, FusedSAM.step])
@pytest.mark.parametrize("between", ["nothing", "clip", "unscale"])
def test_a_second_gradient_on_a_plain_step_is_an_error(backend, end, between):
    """davda54/sam's loop with an interval, which does not look at what first_step returns."""
    model, sam = make(backend, interval=2)
    w = copies(model.parameters())
    backward(model)
    sam.first_step(zero_grad=True)
    backward(model)
    if between == "clip":
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    elif between == "unscale":
        torch._foreach_mul_([p.grad for p in model.parameters()], 0.5)
    with pytest.raises(RuntimeError, match=SECOND_GRADIENT):
        end(sam)
    assert same_bits(copies(model.parameters()), w)
    assert not sam.state
    assert sam.param_groups[0]["sam_step"] == 0


@pytest.mark.parametrize("between", ["nothing", "clip", "sam.zero_grad", "sam.zero_grad False", "model.zero_grad"])
def test_what_is_no_second_gradient(backend, between):
    """One gradient, however it is written to, or another one in its place."""
    (model, sam), (other, plain) = make(backend, interval=2), make(backend)
    for m in (model, other):
        backward(m)
    assert not sam.first_step(zero_grad=True)
    for m, optimizer in ((model, sam), (other, plain)):
        if between == "clip":
            nn.utils.clip_grad_norm_(m.parameters(), 0.1)
        elif between.startswith("sam.zero_grad"):
            optimizer.zero_grad(set_to_none=not between.endswith("False"))
            backward(m)
        elif between == "model.zero_grad":
            m.zero_grad()
            backward(m)
    sam.second_step()
    plain.base_optimizer.step()
    assert same_bits(copies(model.parameters()), copies(other.parameters()))


def test_micro_batches_before_first_step_are_no_second_gradient(backend):
    model, sam = make(backend, interval=2)
    for _ in range(4):
        backward(model)
        backward(model)
        if sam.first_step(zero_grad=True):
            backward(model)
            backward(model)
        sam.second_step(zero_grad=True)
    assert sam.param_groups[0]["sam_step"] == 4


@pytest.mark.parametrize("fails", [False, True])
def test_the_watch_ends_with_the_step(backend, fails):
    """No hook stays on a parameter, whichever way the step ends."""
    model, sam = make(backend, interval=2)
    backward(model)
    sam.first_step(zero_grad=True)
    assert any(p._post_accumulate_grad_hooks for p in model.parameters())
    if fails:
        sam.register_step_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sam.second_step()
    else:
        sam.second_step()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_first_step_again_watches_anew(backend):
    """A loop that goes on with `continue` on a plain step."""
    model, sam = make(backend, interval=2)
    backward(model)
    sam.first_step()
    backward(model)
    sam.first_step()  # the sum of two micro-batches is the gradient now
    sam.second_step()
    assert sam.param_groups[0]["sam_step"] == 1


# -- the base optimizer's own step -------------------------------------------------------------------------------------


def test_the_base_step_while_perturbed_is_refused(backend):
    """Code that restores by hand from state[p]["old_p"], if it is there, then steps the base optimizer."""
    model, sam = make(backend)
    w = copies(model.parameters())
    backward(model)
    sam.first_step(zero_grad=True)
    backward(model)
    for p in model.parameters():
        if "old_p" in sam.state[p]:
            p.data = sam.state[p]["old_p"]
    with pytest.raises(RuntimeError, match=r"restore\(\) first"):
        sam.base_optimizer.step()
    assert sam.perturbed
    sam.restore()
    assert same_bits(copies(model.parameters()), w)
    sam.base_optimizer.step()
    assert not same_bits(copies(model.parameters()), w)


class Unhooked(torch.optim.Optimizer):
    """An optimizer that does without the constructor of torch's, and so without its hooks."""

    def __init__(self, params, lr):
        self.defaults, self.state = {"lr": lr}, {}
        self.param_groups = [{"params": list(params), "lr": lr}]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)

    def zero_grad(self):
        for p in self.param_groups[0]["params"]:
            p.grad = None


def test_an_optimizer_without_hooks_is_watched_too(backend):
    model = nn.Linear(4, 2)
    base = Unhooked(model.parameters(), lr=0.1)
    backward(model)
    base.step()
    sam = FusedSAM(base, rho=0.5, backend=backend)
    passes = []

    def closure():
        passes.append(sam.perturbed)
        base.zero_grad()
        return backward(model)

    sam.step(closure)
    assert passes == [False, True]
    base.step()
    sam.step(closure)
    assert passes == [False, True] * 2
    backward(model)
    sam.first_step()
    with pytest.raises(RuntimeError, match=r"restore\(\) first"):
        base.step()
    sam.restore()


# -- a pass that is missing --------------------------------------------------------------------------------------------


def test_a_forgotten_second_backward_is_told_once(backend):
    model, sam = make(backend)
    w = copies(model.parameters())
    with pytest.warns(UserWarning, match="found no gradient") as caught:
        for _ in range(2):
            backward(model)
            sam.first_step(zero_grad=True)
            sam.second_step(zero_grad=True)
    assert len(caught) == 1
    assert same_bits(copies(model.parameters()), w)


# -- a FusedSAM that nobody finishes -----------------------------------------------------------------------------------


def test_a_new_one_restores_what_an_earlier_one_left_perturbed(backend):
    """A notebook cell that was interrupted between the calls, and runs again: the old one is still there by then."""
    model, sam = make(backend)
    w = copies(model.parameters())
    backward(model)
    sam.first_step(zero_grad=True)
    old = sam
    with pytest.warns(UserWarning, match="are restored"):
        sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    assert same_bits(copies(model.parameters()), w)
    backward(model)
    sam.first_step(zero_grad=True)
    above = copies(model.parameters())
    old.restore()
    del old
    gc.collect()
    assert same_bits(copies(model.parameters()), above)
    sam.restore()


def test_one_of_other_parameters_is_left_alone(backend):
    """As in a GAN."""
    model, sam = make(backend)
    backward(model)
    sam.first_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FusedSAM(nn.Linear(2, 2).parameters(), torch.optim.SGD, lr=0.1, backend=backend)
    assert sam.perturbed
    sam.restore()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("written", [False, True])
def test_a_collected_one_restores_unless_somebody_wrote_since(backend, written):
    model, sam = make(backend)
    w = copies(model.parameters())
    backward(model)
    sam.first_step(zero_grad=True)
    if written:
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
    with pytest.warns(UserWarning, match="stay as written" if written else "are restored"):
        del sam
        gc.collect()
    after = [torch.zeros_like(p) for p in w] if written else w
    assert same_bits(copies(model.parameters()), after)
