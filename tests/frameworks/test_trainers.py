"""What FusedSAM says, once, of trainers that call it in a way that can't work or works badly."""

import os
import re
import subprocess
import sys
import types
import warnings
from functools import partial
from pathlib import Path

import pytest

from fastsam import notices
from tests.linear import backward, make

ROOT = Path(__file__).parents[2]


def closure_of(module, model, sam):
    """A closure that says that it was written in `module`; the real one is in test_composer_trainer.py."""

    def closure():
        sam.zero_grad()
        return backward(model)

    closure.__module__ = module
    return closure


def test_composers_trainer_is_told_from_its_closure_once(monkeypatch):
    monkeypatch.setattr(notices, "told", set())
    if "composer" not in sys.modules:  # as it is where its Trainer runs
        monkeypatch.setitem(sys.modules, "composer", types.ModuleType("composer"))
    model, sam = make()
    closure = closure_of("composer.trainer.trainer", model, sam)
    with pytest.warns(UserWarning, match=r"use fastsam\.composer\.SAM"):
        sam.step(closure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sam.step(closure)


def test_other_closures_say_nothing():
    model, sam = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sam.step(closure_of("composer_like.trainer", model, sam))
        sam.step(partial(closure_of("__main__", model, sam)))


ADVICE = {
    "transformers.trainer": r"SAMTrainer, from examples/train_transformers\.py",
    "accelerate": r"sam\.optimizer\.first_step\(\)",
    "no_such_trainer": r"a closure; for a plain step, sam\.base_optimizer\.step\(\)$",
}


def test_a_step_alone_is_told_what_the_imported_trainer_needs():
    """In a process of its own: other tests import all of them."""
    script = f"""
import sys, types, torch
from fastsam import FusedSAM
for imported in {list(ADVICE)}:
    sys.modules[imported] = types.ModuleType(imported)
    w = torch.nn.Parameter(torch.ones(2))
    sam = FusedSAM([w], torch.optim.SGD, lr=0.1)
    w.grad = torch.ones(2)
    try:
        sam.step()
    except RuntimeError as error:
        print(error)
    del sys.modules[imported]
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    messages = result.stdout.splitlines()
    assert len(messages) == len(ADVICE), result.stderr
    for message, advice in zip(messages, ADVICE.values(), strict=True):
        assert message.startswith("the weights are not perturbed"), message
        assert re.search(advice, message), message
