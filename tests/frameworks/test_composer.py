"""fastsam.composer without Composer: the closures of its Trainer, and what is said where it isn't installed."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastsam
from fastsam.composer import SAMOptimizer
from tests.oracle import copies, same_bits

ROOT = Path(__file__).parents[2]
LR, MOMENTUM, RHO, EPSILON = 0.1, 0.9, 0.5, 1e-12
SAM_STEP = [{"ddp_sync": False}, {"loss_dict": {}}]


class Rank:
    """One of two ranks as Composer's closure serves it: the first gradient is its own, the others are the mean's.

    `overflow` says in which passes, counted from 0, a gradient overflows: then the closure returns None.
    """

    def __init__(self, interval=1, overflow=(), **options):
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3, dtype=torch.float64)
        self.own, self.all = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
        base = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM)
        self.sam = SAMOptimizer(base, RHO, EPSILON, interval, **options)
        self.overflow = overflow
        self.passes = []

    def loss(self, model, x):
        return model(x).pow(4).mean()

    def closure(self, **kwargs):
        self.passes.append(kwargs)
        assert self.sam.perturbed == ("loss_dict" in kwargs)
        self.sam.zero_grad()
        loss = self.loss(self.model, self.own if "ddp_sync" in kwargs else self.all)
        loss.backward()
        return None if len(self.passes) - 1 in self.overflow else loss.item()

    def step(self):
        self.passes = []
        return self.sam.step(closure=self.closure)

    def weights(self):
        return copies(self.model.parameters())


class Oracle:
    """The same by the formulas, without an optimizer."""

    def __init__(self, rank):
        self.rank = rank
        self.model = copy.deepcopy(rank.model)
        self.momentum = [torch.zeros_like(p) for p in self.model.parameters()]

    def gradients(self, x):
        return torch.autograd.grad(self.rank.loss(self.model, x), list(self.model.parameters()))

    @torch.no_grad()
    def step(self, is_sam_step=True):
        params = list(self.model.parameters())
        w = copies(params)
        if is_sam_step:
            with torch.enable_grad():
                g = self.gradients(self.rank.own)
            norm = torch.cat([t.reshape(-1) for t in g]).norm()
            for p, t in zip(params, g, strict=True):
                p += RHO * t / (norm + EPSILON)
        with torch.enable_grad():
            g = self.gradients(self.rank.all)
        for i, p in enumerate(params):
            self.momentum[i] = MOMENTUM * self.momentum[i] + g[i]
            p.copy_(w[i] - LR * self.momentum[i])


def assert_close(rank, oracle):
    for p, q in zip(rank.model.parameters(), oracle.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("interval", [1, 3])
def test_the_steps_are_those_of_the_formulas(backend, interval):
    rank = Rank(interval, backend=backend)
    oracle = Oracle(rank)
    for k in range(7):
        is_sam_step = (k + 1) % interval == 0
        expected = rank.loss(rank.model, rank.own if is_sam_step else rank.all).item()
        assert rank.step() == expected
        assert rank.passes == (SAM_STEP if is_sam_step else [{}])
        oracle.step(is_sam_step)
        assert_close(rank, oracle)
        assert rank.sam.global_step == k + 1


@pytest.mark.parametrize(("interval", "overflow"), [(1, 0), (1, 1), (2, 0)], ids=["at w", "at w + e_w", "plain step"])
def test_an_overflow_ends_the_step_at_w(interval, overflow):
    rank = Rank(interval, overflow=[overflow])
    w, loss = rank.weights(), rank.loss(rank.model, rank.own).item()
    base_steps = []
    rank.sam.base_optimizer.register_step_post_hook(lambda *_: base_steps.append(1))
    returned = rank.step()
    assert returned == (loss if overflow == 1 else None)
    assert len(rank.passes) == overflow + 1
    assert same_bits(rank.weights(), w)
    assert not rank.sam.perturbed
    assert not base_steps
    assert rank.sam.global_step == 1
    rank.overflow = []
    oracle = Oracle(rank)
    rank.step()
    oracle.step()  # of an interval of 2 too, the second step is a SAM step
    assert_close(rank, oracle)


@pytest.mark.parametrize("zero", [0.0, torch.zeros(1)], ids=["float", "tensor"])
@pytest.mark.parametrize("interval", [1, 2])
def test_a_loss_of_zero_is_a_step(interval, zero):
    rank = Rank(interval)
    oracle = Oracle(rank)

    def closure(**kwargs):
        rank.closure(**kwargs)
        return zero

    assert rank.sam.step(closure) is zero
    oracle.step(is_sam_step=interval == 1)
    assert_close(rank, oracle)


def test_an_exception_at_w_plus_e_w_leaves_w():
    rank = Rank()
    w = rank.weights()

    def closure(**kwargs):
        loss = rank.closure(**kwargs)
        if "loss_dict" in kwargs:
            assert not same_bits(rank.weights(), w)
            raise MemoryError
        return loss

    with pytest.raises(MemoryError):
        rank.sam.step(closure=closure)
    assert same_bits(rank.weights(), w)
    assert rank.sam.global_step == 0


def test_two_calls_and_a_missing_closure():
    rank = Rank()
    with pytest.raises(RuntimeError, match="closure"):
        rank.sam.step()
    oracle = Oracle(rank)
    rank.closure(ddp_sync=False)
    assert rank.sam.first_step(zero_grad=True)
    rank.closure(loss_dict={})
    rank.sam.second_step()
    oracle.step()
    assert_close(rank, oracle)


@pytest.mark.parametrize(
    "carry",
    [
        copy.deepcopy,
        lambda sam: pickle.loads(pickle.dumps(sam)),
        lambda sam: (new := Rank(3).sam, new.load_state_dict(sam.state_dict()))[0],
    ],
    ids=["deepcopy", "pickle", "state_dict"],
)
def test_the_count_of_steps_is_carried_over(carry):
    rank = Rank(3)
    rank.step()
    sam = carry(rank.sam)
    assert type(sam) is SAMOptimizer
    assert sam.global_step == 1
    sam.global_step = 2
    passes = []

    def closure(**kwargs):
        passes.append(kwargs)
        for p in sam.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        return 1.0

    sam.step(closure)
    assert passes == SAM_STEP


def test_the_trainer_sees_that_closures_work_under_fp16():
    assert Rank().sam._step_supports_amp_closure is True


@pytest.mark.parametrize("option", ["grad_scaler", "first_pass_context"])
def test_what_the_trainer_sees_to_is_refused(option):
    with pytest.raises(TypeError, match=f"{option} is not for SAMOptimizer"):
        Rank(**{option: None})


def test_the_form_with_a_class_is_refused():
    with pytest.raises(TypeError, match="base_optimizer must be an optimizer"):
        SAMOptimizer(nn.Linear(2, 2).parameters(), torch.optim.SGD)


def test_options_of_fused_sam_pass_through():
    sam = Rank(adaptive=True, flatten_parameters=True).sam
    assert sam.param_groups[0]["adaptive"] is True
    assert sam.flatten_parameters


def test_without_composer():
    """In a process where it can't be imported, whether it is installed or not."""
    script = """
import sys
sys.modules["composer"] = None
import torch, fastsam.composer as c
sam = c.SAMOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
try:
    c.SAM()
except ImportError as error:
    assert "pip install mosaicml" in str(error), error
else:
    raise AssertionError
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], env=env, check=True)


def test_importing_fastsam_imports_no_optional_dependency():
    """Here, because here Composer may be installed."""
    script = """
import sys, torch
before = set(sys.modules)
import fastsam, fastsam.lightning
optional = {"triton", "composer", "accelerate", "transformers", "matplotlib", "sklearn", "rich"}
new = {name.partition(".")[0] for name in set(sys.modules) - before}
found = {name for name in new if name in optional or "lightning" in name}
assert not found, found
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], env=env, check=True)
    assert "composer" not in fastsam.__all__
