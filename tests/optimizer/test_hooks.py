"""Hooks and schedulers, on FusedSAM, its base optimizer or all optimizers: once a step, in every form of call."""

import warnings

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.linear import backward, make, two_calls
from tests.oracle import copies, same_bits


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
