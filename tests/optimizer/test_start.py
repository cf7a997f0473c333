"""start: SAM in the last part of training only; and what tells the pass that climbs from the others."""

import contextlib
import gc
import io
import subprocess
import sys
import warnings

import pytest
import torch
from pytorch_optimizer import SAM as Peer
from torch import nn

import fastsam
from fastsam import FusedSAM
from tests.oracle import PlainSAM, copies, same_bits

BACKENDS = ["foreach", "cpp"]  # what is tested here depends on no arithmetic

STEPS = 7


def make(backend=None, base=torch.optim.SGD, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    momentum = {"momentum": 0.9} if base is torch.optim.SGD else {}
    return model, FusedSAM(model.parameters(), base, rho=0.5, lr=0.1, backend=backend, **momentum, **options)


def batch(i, n=8):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def loss_of(model, x):
    return model(x).square().mean()


def two_calls(model, sam, i):
    loss_of(model, batch(i)).backward()
    climbed = sam.first_step(zero_grad=True)
    if climbed:
        loss_of(model, batch(i)).backward()
    sam.second_step(zero_grad=True)
    return climbed


def closure(model, sam, i):
    passes = []

    def run():
        passes.append(sam.perturbed)
        sam.zero_grad()
        loss = loss_of(model, batch(i))
        loss.backward()
        return loss

    assert sam.step(run) is not None
    return len(passes) == 2


FORMS = [two_calls, closure]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("start", "interval"), [(0, 1), (3, 1), (2, 2), (3, 2), (5, 3), (100, 1)])
def test_which_steps_are_sam_steps(backend, form, start, interval):
    model, sam = make(backend, start=start, interval=interval)
    twin, other = make()
    plain = PlainSAM(twin, other.base_optimizer, 0.5, start=start, interval=interval)
    for k in range(STEPS):
        is_sam = k >= start and (k + 1) % interval == 0
        assert sam.is_sam_step is is_sam
        assert form(model, sam, k) is is_sam
        plain.train(lambda k=k: loss_of(twin, batch(k)))
        torch.testing.assert_close(copies(model.parameters()), copies(plain.params), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("saved_at", [2, 3, 4])
def test_resuming_before_at_and_after_start(form, saved_at):
    whole, sam = make(start=3)
    for k in range(STEPS):
        form(whole, sam, k)
    model, sam = make(start=3)
    for k in range(saved_at):
        form(model, sam, k)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": sam.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, sam = make(start=3)
    resumed.load_state_dict(saved["model"])
    sam.load_state_dict(saved["optimizer"])
    for k in range(saved_at, STEPS):
        assert form(resumed, sam, k) is (k >= 3)
    assert same_bits(copies(resumed.parameters()), copies(whole.parameters()))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_against_temperon(backend, base):
    """The one package on PyPI that does this: the last `tail_frac` of `total_steps`."""
    from temperon import Temperon

    total, share = 20, 0.3
    model, sam = make(backend, base, start=round((1 - share) * total))
    other, _ = make(None, base)
    options = {"lr": 0.1} | ({"momentum": 0.9} if base is torch.optim.SGD else {})
    peer = Temperon(base(other.parameters(), **options), total_steps=total, tail_frac=share, rho=0.5)
    for k in range(total):
        closure(model, sam, k)

        def run(k=k):
            peer.zero_grad()
            loss = loss_of(other, batch(k))
            loss.backward()
            return loss

        peer.step(run)
        torch.testing.assert_close(copies(model.parameters()), copies(other.parameters()), rtol=1e-6, atol=1e-6)


def test_it_may_change_while_training():
    model, sam = make(start=100)
    assert not two_calls(model, sam, 0)
    sam.start = 2
    assert [two_calls(model, sam, k) for k in (1, 2, 3)] == [False, True, True]
    sam.start = 10
    assert not two_calls(model, sam, 4)


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (0.7, TypeError), ("0.7dur", TypeError), (True, TypeError)]
)
def test_it_is_a_number_of_steps(value, error):
    with pytest.raises(error, match="start must be"):
        make(start=value)
    _, sam = make()
    with pytest.raises(error, match="start must be"):
        sam.start = value
    assert sam.start == 0


# -- what a SAM step would refuse is met at the first step, not at 70 % of the run -------------------------------------


@pytest.mark.parametrize("options", [{"start": 100}, {"interval": 100}], ids=str)
@pytest.mark.parametrize("form", ["two calls", "closure"])
@pytest.mark.parametrize(
    ("what", "error", "match"),
    [
        ("sparse", TypeError, "is sparse"),
        ("shared", ValueError, "share memory"),
        ("dtype", TypeError, "FusedSAM perturbs"),
    ],
)
def test_the_first_plain_step_refuses_what_a_sam_step_would(backend, what, error, match, form, options):
    if what == "sparse":
        params = [nn.Parameter(torch.ones(3, 2))]
    elif what == "shared":
        memory = torch.ones(4)
        params = [nn.Parameter(memory[:3]), nn.Parameter(memory[1:])]
    else:
        params = [nn.Parameter(torch.ones(3))]
    sam = FusedSAM(params, torch.optim.SGD, lr=0.1, backend=backend, **options)
    before = copies(params)

    def backward():
        for p in params:
            p.grad = torch.ones_like(p)
        if what == "sparse":
            params[0].grad = torch.sparse_coo_tensor([[0]], [[1.0, 1.0]], (3, 2))
        elif what == "dtype":
            params[0].data = params[0].data.to(torch.complex64)
            params[0].grad = torch.ones_like(params[0])
        return torch.tensor(1.0)

    def step():
        if form == "closure":
            sam.step(backward)
        else:
            backward()
            sam.first_step()

    with pytest.raises(error, match=match):
        step()
    assert all(torch.equal(p.detach().real, w) for p, w in zip(params, before, strict=True))


def test_the_memory_of_a_backup_is_met_too(monkeypatch):
    from fastsam.bucket import ParameterBucket

    def fail(self):
        raise torch.OutOfMemoryError("no memory")

    model, sam = make(start=100)
    monkeypatch.setattr(ParameterBucket, "allocate_backup", fail)
    loss_of(model, batch(0)).backward()
    with pytest.raises(torch.OutOfMemoryError):
        sam.first_step()


def test_it_is_met_once(backend):
    """Plain steps cost nothing more; and what there is to say of 16-bit parameters is said once."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    sam = FusedSAM([p], torch.optim.SGD, lr=0.1, start=2, backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            p.grad = torch.ones_like(p)
            if sam.first_step():
                p.grad = torch.ones_like(p)
            sam.second_step()
    assert len([w for w in caught if "16 bits" in str(w.message)]) == 1


# -- the pass that climbs may do with a part of the batch --------------------------------------------------------------


def test_ascending_is_the_pass_at_w_of_a_sam_step():
    model, sam = make(interval=2)
    seen = []
    for k in range(4):

        def run(k=k):
            seen.append((k, sam.ascending))
            sam.zero_grad()
            loss = loss_of(model, batch(k))
            loss.backward()
            return loss

        sam.step(run)
    assert seen == [(0, False), (1, True), (1, False), (2, False), (3, True), (3, False)]


@pytest.mark.parametrize("form", ["two calls", "closure"])
def test_the_ascent_on_a_quarter_of_the_batch(backend, form):
    """Against pytorch_optimizer's SAM in two calls with a batch each. step() returns the loss that it climbed by."""
    model, sam = make(backend)
    other, _ = make()
    peer = Peer(other.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
    for k in range(5):
        x = batch(k)
        quarter = x[: len(x) // 4]
        loss_of(other, quarter).backward()
        peer.first_step(zero_grad=True)
        loss_of(other, x).backward()
        peer.second_step(zero_grad=True)
        if form == "closure":
            expected = loss_of(model, quarter).detach()

            def run(x=x):
                sam.zero_grad()
                loss = loss_of(model, x[: len(x) // 4] if sam.ascending else x)
                loss.backward()
                return loss

            assert torch.equal(sam.step(run).detach(), expected)
        else:
            loss_of(model, quarter if sam.ascending else x).backward()
            assert sam.first_step(zero_grad=True)
            loss_of(model, quarter if sam.ascending else x).backward()
            sam.second_step(zero_grad=True)
        torch.testing.assert_close(copies(model.parameters()), copies(other.parameters()), rtol=1e-6, atol=1e-7)


def test_a_quarter_with_batchnorm_counts_the_whole_batch():
    """Freeze the first pass then, and not the second: that one sees all samples."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    x = batch(0)

    def run():
        sam.zero_grad()
        if sam.ascending:
            with fastsam.frozen_running_stats(model):
                loss = loss_of(model, x[:2])
        else:
            inputs.append(model[0](x).detach())
            loss = loss_of(model, x)
        loss.backward()
        return loss

    inputs = []
    sam.step(run)
    assert int(model[1].num_batches_tracked) == 1
    torch.testing.assert_close(model[1].running_mean, 0.1 * inputs[0].mean(0))


# -- SAM that was promised and never came ------------------------------------------------------------------------------

WITHOUT = "ended after {} steps without one SAM step: start={} and interval={}"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("options", "steps"), [({"start": 100}, 3), ({"start": 4, "interval": 3}, 5)], ids=str)
def test_a_training_without_one_sam_step_is_told(form, options, steps):
    """As of a start that was computed from the wrong number of steps."""
    model, sam = make(**options)
    for i in range(steps):
        form(model, sam, i)
    message = WITHOUT.format(steps, options.get("start", 0), options.get("interval", 1))
    with pytest.warns(UserWarning, match=message) as caught:
        del sam
        gc.collect()
    assert len(caught) == 1


@contextlib.contextmanager
def silence():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert not [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"start": 2}, 3),
        ({"interval": 3}, 3),
        ({"start": 3, "interval": 2}, 4),
        ({"start": 9}, 0),
        ({"interval": 10}, 3),
        ({"start": 1, "interval": 10}, 9),
    ],
)
def test_one_sam_step_is_enough_and_so_are_fewer_steps_than_the_interval(options, steps):
    model, sam = make(**options)
    for i in range(steps):
        two_calls(model, sam, i)
    with silence():
        del sam


def test_a_first_step_that_nobody_ended_is_no_training():
    model, sam = make(start=9)
    loss_of(model, batch(0)).backward()
    sam.first_step()
    with silence():
        del sam


def test_sam_steps_before_a_checkpoint_count():
    """Resumed after them, in the middle of an interval."""
    model, sam = make(interval=3)
    for i in range(4):
        two_calls(model, sam, i)
    resumed, other = make(interval=3)
    other.load_state_dict(sam.state_dict())
    two_calls(resumed, other, 4)
    del sam
    with silence():
        del other


def test_it_is_told_at_the_end_of_the_process():
    """Of the one that never came to its start."""
    script = """
import torch
from fastsam import FusedSAM
kept = []
for start in (1, 9):
    p = torch.nn.Parameter(torch.ones(2))
    kept.append(sam := FusedSAM([p], torch.optim.SGD, lr=0.1, start=start))
    for _ in range(3):
        p.square().sum().backward()
        if sam.first_step(zero_grad=True): p.square().sum().backward()
        sam.second_step(zero_grad=True)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr.count("UserWarning") == 1, result.stderr
    assert WITHOUT.format(3, 9, 1) in result.stderr, result.stderr
