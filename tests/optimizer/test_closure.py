"""step(closure): which gradients are fresh, so that the closure runs once or twice; what it returns and clears."""

import functools

import pytest
import torch
from torch import nn

from fastsam import FusedSAM
from tests.oracle import same_bits

BACKENDS = ["foreach", "cpp"]  # what is tested here depends on no arithmetic


class Problem:
    """A loss whose gradient differs at w and at w + e_w, a plain twin of the base optimizer, and a log of passes."""

    def __init__(self, **options):
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.x = torch.randn(5, 4)
        self.sam = FusedSAM(self.model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9, **options)
        self.passes = []

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]

    def backward(self, scale=1.0):
        loss = self.model(self.x).pow(4).mean() * scale
        loss.backward()
        return loss

    def closure(self, clears=True):
        self.passes.append("perturbed" if self.sam.perturbed else "w")
        if clears:
            self.sam.zero_grad()
        return self.backward()

    def step(self, clears=True):
        """One step(closure); returns where the closure ran. One that clears says that it computes both passes."""
        self.passes = []
        self.loss = self.sam.step(functools.partial(self.closure, clears))
        return self.passes


ONCE = ["perturbed"]
TWICE = ["w", "perturbed"]


@pytest.fixture
def problem(backend):
    return Problem(backend=backend)


def test_without_gradients_it_runs_twice(problem):
    assert problem.step() == TWICE


def test_with_fresh_gradients_it_runs_once(problem):
    problem.backward()
    assert problem.step() == ONCE


def test_both_ways_make_the_same_step(backend):
    a, b = Problem(backend=backend), Problem(backend=backend)
    for _ in range(4):
        a.sam.zero_grad()
        a.backward()
        assert a.step(clears=False) == ONCE
        b.sam.zero_grad()
        assert b.step() == TWICE
        assert same_bits(a.weights(), b.weights())


def test_gradients_of_the_last_step_are_stale(problem):
    for _ in range(3):
        assert problem.step() == TWICE
    problem.sam.first_step(zero_grad=True)
    problem.backward()
    problem.sam.second_step(zero_grad=False)
    assert problem.step() == TWICE


def test_accumulation_onto_stale_gradients_makes_them_fresh(problem):
    problem.step()
    problem.backward()
    assert problem.step() == ONCE


def test_accumulated_gradients_are_the_first_pass(backend):
    """Micro-batches outside of step(): their sum is the gradient at w."""
    a, b = Problem(backend=backend), Problem(backend=backend)
    a.backward(0.25)
    a.backward(0.75)
    b.backward(1.0)
    assert a.step() == ONCE
    assert b.step() == ONCE
    torch.testing.assert_close(a.weights(), b.weights())


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("who", ["sam", "base"])
@pytest.mark.parametrize("when", ["after a backward", "after a step", "at the start"])
def test_zero_grad_leaves_nothing_fresh(problem, set_to_none, who, when):
    if when != "at the start":
        problem.backward()
    if when == "after a step":
        problem.step()
    optimizer = problem.sam if who == "sam" else problem.sam.base_optimizer
    optimizer.zero_grad(set_to_none=set_to_none)
    assert problem.step() == TWICE


def test_backward_onto_zeros_is_fresh(problem):
    problem.step()
    problem.sam.zero_grad(set_to_none=False)
    problem.backward()
    assert problem.step() == ONCE


def test_an_assigned_gradient_is_fresh(problem):
    problem.step()
    with torch.no_grad():
        for p in problem.model.parameters():
            p.grad = p.grad.clone()
    assert problem.step() == ONCE


def test_a_gradient_in_the_memory_of_the_last_one_is_fresh(problem):
    for _ in range(20):
        for p in problem.model.parameters():
            p.grad = None
        problem.backward()  # the allocator often gives the freed memory, and Python the freed id
        assert problem.step(clears=False) == ONCE


def test_one_fresh_gradient_is_enough(problem):
    problem.step()
    problem.model.bias.grad = torch.ones(3)
    assert problem.step() == ONCE


def test_clipping_in_place_makes_fresh(problem):
    problem.step()
    problem.backward()
    nn.utils.clip_grad_norm_(problem.model.parameters(), 0.1)
    assert problem.step() == ONCE


def test_restore_marks_stale(problem):
    problem.backward()
    problem.sam.first_step(zero_grad=True)
    problem.backward()
    problem.sam.restore()
    assert problem.step() == TWICE


@pytest.mark.parametrize("fails_at", ["w", "perturbed"])
def test_an_exception_marks_stale(problem, fails_at):
    before = problem.weights()

    def failing():
        loss = problem.closure()
        if problem.passes[-1] == fails_at:
            raise ZeroDivisionError
        return loss

    with pytest.raises(ZeroDivisionError):
        problem.sam.step(failing)
    assert not problem.sam.perturbed
    assert same_bits(problem.weights(), before)
    assert problem.step() == TWICE


def test_returns_the_loss_at_w(problem):
    at_w = problem.model(problem.x).pow(4).mean()
    problem.step()
    assert torch.equal(problem.loss, at_w)
    assert problem.loss.requires_grad


def test_returns_none_where_the_closure_did_not_run_at_w(problem):
    problem.backward()
    problem.step()
    assert problem.loss is None


@pytest.mark.parametrize("fresh", [False, True])
def test_clears_gradients_between_the_passes_for_a_closure_that_does_not(backend, fresh):
    a, b = Problem(backend=backend), Problem(backend=backend)
    if fresh:
        a.backward()
        b.backward()
    a.sam.step(lambda: a.backward())
    b.step()
    assert same_bits(a.weights(), b.weights())


def test_leaves_the_second_gradient(problem):
    seen = []

    def closure():
        loss = problem.closure()
        seen.append([p.grad.clone() for p in problem.model.parameters()])
        return loss

    problem.sam.step(closure)
    assert same_bits([p.grad for p in problem.model.parameters()], seen[1])
    assert not same_bits(seen[0], seen[1])


def test_gradients_are_enabled_in_the_closure_only(problem):
    with torch.no_grad():
        problem.step()
        assert not torch.is_grad_enabled()
    problem.step()
    assert torch.is_grad_enabled()


def test_step_with_a_closure_ends_what_first_step_began(problem):
    problem.backward()
    problem.sam.first_step(zero_grad=True)
    assert problem.step() == ONCE
    assert not problem.sam.perturbed


@pytest.mark.parametrize("cleared", ["by nobody", "by sam", "by the model", "in place"])
def test_after_first_step_too_the_gradients_at_w_are_cleared(backend, cleared):
    """Those that first_step left; a micro-batch at w + e_w that came after a clearing stays."""
    a, b = Problem(backend=backend), Problem(backend=backend)
    for problem in (a, b):
        problem.backward()
    a.sam.first_step()
    b.sam.first_step(zero_grad=True)
    if cleared != "by nobody":
        {
            "by sam": a.sam.zero_grad,
            "by the model": a.model.zero_grad,
            "in place": functools.partial(a.model.zero_grad, set_to_none=False),
        }[cleared]()
        for problem in (a, b):
            problem.backward()
    a.sam.step(a.backward)
    b.backward()
    b.sam.second_step()
    assert same_bits(a.weights(), b.weights())


def test_a_closure_without_gradients_is_an_error(problem):
    before = problem.weights()
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        problem.sam.step(lambda: torch.tensor(1.0))
    assert not problem.sam.perturbed
    assert same_bits(problem.weights(), before)


def test_first_step_in_the_closure_is_an_error(problem):
    """As in a loop in two calls that became a closure, or a training_step: w + e_w would be saved as w."""

    def closure():
        loss = problem.closure()
        if not problem.sam.perturbed:
            problem.sam.first_step()
        return loss

    before = problem.weights()
    with pytest.raises(RuntimeError, match="first_step\\(\\) was called in the closure: leave it out"):
        problem.sam.step(closure)
    assert not problem.sam.perturbed
    assert same_bits(problem.weights(), before)


def test_step_as_the_last_word_of_the_two_call_form(backend):
    """step() while perturbed is second_step: what GradScaler, the Transformers Trainer and Accelerate call."""
    a, b = Problem(backend=backend), Problem(backend=backend)
    for problem in (a, b):
        problem.backward()
        problem.sam.first_step(zero_grad=True)
        problem.backward()
    a.sam.second_step()
    assert b.sam.step() is None
    assert same_bits(a.weights(), b.weights())
