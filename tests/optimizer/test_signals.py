"""A timer's signals at random points of training: the handler's restore() gives w, bit for bit, wherever it strikes."""

import contextlib
import random
import signal

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsam import FusedSAM
from tests.oracle import copies, same_bits

BACKENDS = ["reference", "foreach", "cpp"]  # not the interpreted Triton: there a signal cuts a kernel in two

SIGNALS = 60
REASONS = ["signal handler", "not perturbed", "modified by an inplace operation"]


class Training:
    """Knows which weights a checkpoint must hold: `w`, but while the base optimizer writes (None)."""

    def __init__(self, backend):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)]
        self.model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.model[4].weight.data = torch.stack([self.model[4].weight.data] * 2, dim=-1)[..., 0]  # with gaps
        self.sam = FusedSAM(self.model.parameters(), torch.optim.SGD, rho=0.5, backend=backend, lr=0.01)
        self.sam.base_optimizer.register_step_pre_hook(lambda *_: self.expect(None))
        self.x = torch.randn(4, 1, 6, 6)
        self.expect(self.weights())

    def weights(self):
        return copies(self.model.parameters())

    def expect(self, w):
        self.w = w

    def closure(self):
        self.sam.zero_grad()
        loss = self.model(self.x).pow(2).mean()
        loss.backward()
        return loss

    def two_calls(self):
        self.closure()
        self.sam.first_step(zero_grad=True)
        self.closure()
        self.sam.second_step()

    def by_closure(self):
        self.sam.step(self.closure)


@pytest.mark.parametrize("form", ["two_calls", "by_closure"])
def test_random_signals(backend, form):
    training = Training(backend)
    generator = random.Random(0)
    checked = wrong = at_perturbed = 0

    def handler(*_):
        nonlocal checked, wrong, at_perturbed
        w = training.w
        at_perturbed += training.sam.perturbed
        training.sam.restore()
        if w is not None:
            checked += 1
            wrong += not same_bits(training.weights(), w)
        if checked < SIGNALS:
            signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-5, 3e-3))

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1e-3)
    refused = 0
    try:
        while checked < SIGNALS:
            try:
                getattr(training, form)()
            except RuntimeError as error:
                # The interrupted step ends without a base step: its second gradient would be of two places. Often it
                # is backward that refuses, since restore() wrote to what forward saved.
                assert any(reason in str(error) for reason in REASONS), error  # noqa: PT017
                training.sam.restore()
                training.sam.zero_grad()
                assert same_bits(training.weights(), training.w)
                refused += 1
            training.expect(training.weights())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert wrong == 0
    assert at_perturbed > 0
    assert refused > 0
    getattr(training, form)()  # and training goes on


class SignalsFrom(TorchDispatchMode):
    """Sends this process a signal before every operation from one on."""

    def __init__(self, at):
        super().__init__()
        self.at = at
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count >= self.at:
            signal.raise_signal(signal.SIGALRM)
        return func(*args, **(kwargs or {}))


def test_many_signals_in_one_first_step(backend):
    """perturb goes on writing after the first handler, and the second must find w all the same."""
    training = Training(backend)
    w = training.weights()
    wrong = []

    def handler(*_):
        training.sam.restore()
        wrong.append(not same_bits(training.weights(), w))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for at in range(1, 1000):
            training.closure()
            with SignalsFrom(at) as mode, contextlib.suppress(RuntimeError):
                training.sam.first_step()
            training.sam.restore()
            assert same_bits(training.weights(), w)
            if mode.count < at:
                break
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(wrong) > 50
    assert not any(wrong)


def test_restore_while_a_closure_runs_ends_the_step():
    """Without a base step, whose gradients would be of two places; and not counted."""
    training = Training(None)
    w = training.weights()

    def interrupted():
        loss = training.closure()
        training.sam.restore()
        return loss

    training.closure()
    with pytest.raises(RuntimeError, match=r"restore.*while the closure ran"):
        training.sam.step(interrupted)
    assert same_bits(training.weights(), w)
    assert training.sam.param_groups[0]["sam_step"] == 0
    training.by_closure()
    assert training.sam.param_groups[0]["sam_step"] == 1


def test_restore_while_perturb_writes_ends_first_step(backend, monkeypatch):
    """The handler's restore() comes in the midst; perturb goes on, and then w has to be restored once more."""
    training = Training(backend)
    training.closure()
    w = training.weights()
    perturbation = training.sam._state.perturbation
    usual = type(perturbation).perturb

    def interrupted():
        training.sam.restore()  # before the first write: what follows is the rest of perturb
        usual(perturbation)

    monkeypatch.setattr(perturbation, "perturb", interrupted)
    with pytest.raises(RuntimeError, match="by a signal handler, while first_step"):
        training.sam.first_step()
    assert not training.sam.perturbed
    assert same_bits(training.weights(), w)
    monkeypatch.undo()
    training.two_calls()  # and the next step is as any other
    assert not training.sam.perturbed
