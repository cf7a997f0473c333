"""Interrupted between perturb and restore: the weights are w, bit for bit, in what is saved."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsam import FusedSAM
from tests.oracle import copies, same_bits

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def make(backend: str | None = None) -> tuple[nn.Module, FusedSAM]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, FusedSAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9, backend=backend)


@contextmanager
def handler(call: Callable[[], None]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class SignalAt(TorchDispatchMode):
    """Sends this process SIGTERM, a real one, at one of the operations."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return func(*args, **(kwargs or {}))


def test_signal_handler_saves_w_wherever_first_step_is(backend: str) -> None:
    """The handler calls restore() and saves, at every operation of first_step in turn."""
    model, sam = make(backend)
    w = copies(model.parameters())
    model(X).square().mean().backward()
    saved: list[list[Tensor]] = []

    def save() -> None:
        sam.restore()
        saved.append(copies(model.parameters()))

    refused = 0
    with handler(save):
        for at in range(1, 1000):
            with SignalAt(at) as mode:
                try:
                    sam.first_step()
                except RuntimeError as error:
                    assert "signal handler" in str(error)  # noqa: PT017
                    assert not sam.perturbed
                    refused += 1
            sam.restore()
            assert same_bits(copies(model.parameters()), w)
            if mode.count < at:
                break
    assert len(saved) == at - 1
    assert all(same_bits(s, w) for s in saved)
    assert refused > 0


@pytest.mark.parametrize("passes", [1, 2])
def test_signal_handler_saves_w_inside_the_closure(passes: int) -> None:
    model, sam = make()
    w = copies(model.parameters())
    saved: list[list[Tensor]] = []
    runs = 0

    def save() -> None:
        assert sam.perturbed is (passes == 2)
        sam.restore()
        saved.append(copies(model.parameters()))
        assert sam.state_dict()["param_groups"][0]["sam_step"] == 0
        raise SystemExit

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        loss = model(X).square().mean()
        if runs == passes:
            os.kill(os.getpid(), signal.SIGTERM)
        loss.backward()
        return loss

    with handler(save), pytest.raises(SystemExit):
        sam.step(closure)
    assert same_bits(saved[0], w)
    assert same_bits(copies(model.parameters()), w)


@pytest.mark.usefixtures("sigint")
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit, GeneratorExit])
@pytest.mark.parametrize("form", ["closure", "with", "try"])
def test_exception_between_perturb_and_restore_leaves_w(form: str, error: type[BaseException]) -> None:
    """KeyboardInterrupt by a real SIGINT."""
    model, sam = make()
    w = copies(model.parameters())

    def second_pass() -> None:
        assert not same_bits(copies(model.parameters()), w)
        if error is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        raise error

    def closure() -> Tensor:
        loss = model(X).square().mean()
        loss.backward()
        if sam.perturbed:
            second_pass()
        return loss

    def two_calls() -> None:
        closure()
        sam.first_step(zero_grad=True)
        closure()

    def run() -> None:
        if form == "closure":
            sam.step(closure)
        elif form == "with":
            with sam:
                two_calls()
        else:
            try:
                two_calls()
            finally:
                sam.restore()

    with pytest.raises(error):
        run()
    assert same_bits(copies(model.parameters()), w)
    assert not sam.perturbed
    assert sam.state_dict()["param_groups"][0]["sam_step"] == 0
    assert not sam.state  # no base step


def test_interrupted_step_is_repeated_with_the_same_outcome() -> None:
    """The gradients that an interrupted step left behind are not taken for fresh ones."""
    expected, sam = make()

    def closure_of(model: nn.Module, sam: FusedSAM) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            sam.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            return loss

        return closure

    sam.step(closure_of(expected, sam))
    model, sam = make()
    once = closure_of(model, sam)

    def interrupted() -> Tensor:
        loss = once()
        if sam.perturbed:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        sam.step(interrupted)
    sam.step(once)
    assert same_bits(copies(model.parameters()), copies(expected.parameters()))
