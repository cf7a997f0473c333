"""Hooks and schedulers, on FusedSAM, its base optimizer or all optimizers: once a step, in every form of call."""

import copy
import gc
import pickle
import types
import warnings

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastsam import FusedSAM
from tests.linear import backward, loss_of, make, two_calls
from tests.oracle import PlainSAM, copies, same_bits


def closure(model, sam):
    def run():
        sam.zero_grad()
        return backward(model)

    sam.step(run)


def closure_after_backward(model, sam):
    sam.zero_grad()
    backward(model)
    sam.step(lambda: backward(model))


FORMS = [two_calls, closure, closure_after_backward]
each_form = pytest.mark.parametrize("form", FORMS)


@each_form
def test_each_hook_runs_once_a_step(form):
    model, sam = make()
    log = []

    def note(name):
        return lambda optimizer, args, kwargs: log.append((name, type(optimizer).__name__))

    handles = [
        sam.register_step_pre_hook(note("pre")),
        sam.register_step_post_hook(note("post")),
        sam.base_optimizer.register_step_pre_hook(note("base pre")),
        sam.base_optimizer.register_step_post_hook(note("base post")),
    ]
    for _ in range(2):
        log.clear()
        form(model, sam)
        assert log == [("pre", "FusedSAM"), ("base pre", "SGD"), ("base post", "SGD"), ("post", "FusedSAM")]
    for handle in handles:
        handle.remove()
    log.clear()
    form(model, sam)
    assert log == []


@each_form
def test_each_global_hook_runs_once_a_step(form):
    model, sam = make()
    log = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: log.append("pre")),
        register_optimizer_step_post_hook(lambda *_: log.append("post")),
    ]
    try:
        form(model, sam)
    finally:
        for handle in handles:
            handle.remove()
    assert log == ["pre", "post"]


def test_hooks_see_w():
    model, sam = make()
    before = copies(model.parameters())
    seen = {}
    sam.base_optimizer.register_step_pre_hook(lambda *_: seen.update(base=copies(model.parameters())))
    two_calls(model, sam)
    assert same_bits(seen["base"], before)


@each_form
@pytest.mark.parametrize("on", ["sam", "base"])
def test_schedulers_do_not_warn_and_do_schedule(form, on):
    model, sam = make()
    optimizer = sam if on == "sam" else sam.base_optimizer
    schedulers = [
        torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if k < 3 else 0.1),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            form(model, sam)
            for scheduler in schedulers:
                scheduler.step()
    assert sam.param_groups[0]["lr"] != 0.1


# -- what FusedSAM hangs on its base -----------------------------------------------------------------------------------


class Bare(torch.optim.Optimizer):
    """An optimizer around another that does without the constructor of torch's: no hooks, no defaults."""

    def __init__(self, inner):
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)

    def __getstate__(self):
        return self.__dict__

    def __setstate__(self, state):
        self.__dict__.update(state)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def step(self, closure=None):
        self.inner.step(closure)


def make_base(bare):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, Bare(base) if bare else base


each_base = pytest.mark.parametrize("bare", [False, True])


@each_base
@pytest.mark.parametrize("kept", [False, True], ids=["dropped", "kept"])
def test_wrapping_a_base_again_and_again(bare, kept):
    """A new FusedSAM each epoch: weights as of one alone, and nothing piles up."""
    (model, base), (other, single) = make_base(bare), make_base(bare)
    sam = FusedSAM(single, rho=0.5)
    once = FusedSAM(base, rho=0.5)
    sams = []
    for k in range(1200):
        again = once if k == 0 else FusedSAM(base, rho=0.5)
        if kept and k < 3:
            sams.append(again)  # others that live
        if k % 100 == 0:
            two_calls(model, again)
            two_calls(other, sam)
    assert same_bits(copies(model.parameters()), copies(other.parameters()))
    del again, once
    gc.collect()
    alive = len(sams)
    if bare:
        assert len(base.step.__func__.around) <= alive + 3  # those of the dead go when the next one comes
    else:
        assert len(base._optimizer_step_pre_hooks) == len(base._optimizer_step_post_hooks) == alive
        assert len(base._optimizer_load_state_dict_pre_hooks) == alive
    assert len(vars(base)["zero_grad"].marks) <= alive + 3
    backward(model)
    base.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert base.param_groups[0]["sam_step"] == 12


@each_base
@each_form
def test_two_around_one_base_count_each_step_once(bare, form):
    """SAM and ASAM in turn; and the base by itself."""
    model, base = make_base(bare)
    other, plain = make_base(False)
    sams = [FusedSAM(base, rho=0.5, interval=2), FusedSAM(base, rho=0.5, interval=2)]
    hand = PlainSAM(other, plain, rho=0.5, interval=2)
    for k in range(7):
        assert sams[0].is_sam_step is sams[1].is_sam_step is hand.is_sam_step
        if k % 3 == 2 and not hand.is_sam_step:
            sams[0].zero_grad()
            backward(model)
            base.step()
        else:
            form(model, sams[k % 2])
        hand.train(lambda: loss_of(other))
        assert base.param_groups[0]["sam_step"] == k + 1
        torch.testing.assert_close(copies(model.parameters()), copies(other.parameters()))


@each_base
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("what", ["base", "sam"])
def test_a_copy_clears_and_steps_its_own(bare, how, what):
    """The copy of a base keeps nothing of the FusedSAM around the original."""
    model, base = make_base(bare)
    sam = FusedSAM(base, rho=0.5)
    two_calls(model, sam)
    copied = copy.deepcopy if how == "deepcopy" else lambda pair: pickle.loads(pickle.dumps(pair))
    twin, (other, other_sam) = copied((model, (base, sam) if what == "sam" else (base, None)))
    backward(model)
    backward(twin)
    other.zero_grad()
    assert all(p.grad is None for p in twin.parameters())
    assert all(p.grad is not None for p in model.parameters())
    backward(twin)
    sam.first_step()
    before = copies(model.parameters())
    other.step()  # the original is perturbed, the copy is not
    assert same_bits(copies(model.parameters()), before)
    sam.restore()
    assert sam.param_groups[0]["sam_step"] == 1
    if other_sam is not None:
        assert other_sam.base_optimizer is other
        assert other_sam.param_groups[0]["sam_step"] == 2
    two_calls(twin, FusedSAM(other, rho=0.5) if other_sam is None else other_sam)
    assert same_bits(copies(model.parameters()), before) is False


@each_base
def test_a_base_outlives_its_fused_sam(bare):
    model, base = make_base(bare)
    sam = FusedSAM(base, rho=0.5)
    two_calls(model, sam)
    del sam
    gc.collect()
    other, plain = make_base(bare)
    other.load_state_dict(model.state_dict())
    plain.state.update(zip(other.parameters(), copy.deepcopy([base.state[p] for p in model.parameters()]), strict=True))
    for m, optimizer in ((model, base), (other, plain)):
        optimizer.zero_grad()
        backward(m)
        optimizer.step()
    assert same_bits(copies(model.parameters()), copies(other.parameters()))


def test_a_base_without_defaults_takes_groups():
    model, base = make_base(True)
    base.add_param_group = base.inner.add_param_group
    sam = FusedSAM(base, rho=0.5)
    sam.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert [group["rho"] for group in sam.param_groups] == [0.5, 0.5]
    two_calls(model, sam)


def test_a_zero_grad_of_somebody_elses_is_still_called():
    """Put on the optimizer itself before, as some trainers do."""
    model, base = make_base(False)
    calls = []
    own = base.zero_grad
    base.zero_grad = lambda *args, **kwargs: (calls.append(args), own(*args, **kwargs))
    sam = FusedSAM(base, rho=0.5)
    two_calls(model, sam, zero_grad=False)
    assert len(calls) == 2


def test_a_copy_whose_step_somebody_wrapped_steps_its_own():
    """On the optimizer itself, as schedulers do."""
    model, base = make_base(True)
    calls = []
    base.step = types.MethodType(lambda self, closure=None: (calls.append(1), Bare.step(self, closure)), base)
    sam = FusedSAM(base, rho=0.5)
    two_calls(model, sam)
    assert len(calls) == 1
    twin, copied = copy.deepcopy((model, base))
    before = copies(model.parameters())
    backward(twin)
    backward(model)
    copied.step()
    assert same_bits(copies(model.parameters()), before)
    assert not same_bits(copies(twin.parameters()), before)
    two_calls(twin, FusedSAM(copied, rho=0.5))
    assert same_bits(copies(model.parameters()), before)


class KeepsItsDict(torch.optim.SGD):
    """torch's optimizers leave their hooks behind; one whose state is its __dict__ takes them along."""

    def __getstate__(self):
        return self.__dict__.copy()


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_that_brings_its_hooks_steps_its_own(copied):
    model = nn.Linear(4, 3)
    sam = FusedSAM(KeepsItsDict(model.parameters(), lr=0.1), rho=0.3)
    other = copied(sam.base_optimizer)
    assert other._optimizer_step_pre_hooks
    (group,) = other.param_groups
    for p in (*model.parameters(), *group["params"]):
        p.grad = torch.ones_like(p)
    sam.first_step()
    other.step()  # the original is perturbed, the copy is not
    assert sam.perturbed
    sam.restore()
    assert sam.param_groups[0]["sam_step"] == 0
    other.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.5).state_dict())
    assert (other.param_groups[0]["lr"], sam.param_groups[0]["lr"]) == (0.5, 0.1)
    again = FusedSAM(other, rho=0.2)
    p = again.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    again.first_step(zero_grad=True)
    p.grad = torch.ones_like(p)
    again.second_step()
    assert again.param_groups[0]["sam_step"] == 1


def test_hooks_in_a_pickle_hold_no_fused_sam():
    sam = FusedSAM(KeepsItsDict(nn.Linear(4, 3).parameters(), lr=0.1))
    for what in (sam, sam.base_optimizer):
        assert b"FusedSAM" not in pickle.dumps(sam.base_optimizer)
        pickle.loads(pickle.dumps(what)).zero_grad()
